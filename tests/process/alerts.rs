//! Alerts and dashboards: tested by promtool, and about what the code exports.

use std::{
    collections::{BTreeMap, BTreeSet},
    process::Command,
};

use serde_json::Value;

use crate::{needs, operations, promql};

const RULES: &str = include_str!("../../charts/finetune-operator/files/rules.yaml");
const RULES_TEST: &str = include_str!("../alerts.test.yaml");
const DASHBOARDS: [(&str, &str); 2] = [
    ("dashboards/operator.json", include_str!("../../dashboards/operator.json")),
    ("dashboards/job.json", include_str!("../../dashboards/job.json")),
];
const OPERATORS_METRICS: &str = include_str!("../../src/operator/runtime/metrics.rs");
const TRAINERS_METRICS: &str = include_str!("../../trainer/src/metrics/prometheus.rs");

/// Metrics that Prometheus makes itself.
const BUILT_IN: [&str; 1] = ["up"];
/// Labels that a scrape adds.
const SCRAPE_LABELS: [&str; 4] = ["namespace", "pod", "instance", "job"];
/// The label that the scrape of trainers adds, as the PodMonitor and docs/OPERATIONS.md say.
const TRAINER_LABEL: &str = "finetunejob";

/// Runs promtool on files of the checkout.
fn promtool(arguments: &[&str]) {
    let Some(program) = needs::program("alerts", "FINETUNE_TEST_PROMTOOL", Some("promtool")) else {
        return;
    };
    let mut command = Command::new(program);
    let output = command.current_dir(env!("CARGO_MANIFEST_DIR")).args(arguments).output().unwrap();
    let [said, complained] =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    assert!(output.status.success(), "{said}{complained}");
}

#[test]
fn rules_are_ones_that_prometheus_reads() {
    promtool(&["check", "rules", "charts/finetune-operator/files/rules.yaml"]);
}

#[test]
fn alerts_fire_when_they_must_and_only_then() {
    promtool(&["test", "rules", "tests/alerts.test.yaml"]);
}

#[test]
fn each_alert_is_tested_and_has_a_runbook() {
    let alerts: BTreeSet<String> = rules().into_iter().map(|rule| word(&rule["alert"])).collect();
    for rule in rules() {
        let (alert, annotations) = (word(&rule["alert"]), &rule["annotations"]);
        let anchor = format!("docs/OPERATIONS.md#{}", alert.to_lowercase());
        assert_eq!(annotations["runbook_url"], *anchor);
        let fires = format!("alertname: {alert}\n        exp_alerts:\n          - exp_labels");
        assert!(RULES_TEST.contains(&fires), "no test lets {alert} fire");
    }
    assert_eq!(operations::runbooks(), alerts);
}

#[test]
fn alerts_and_dashboards_name_what_the_code_exports() {
    let exported = exported();
    let mut faults = Vec::new();
    for rule in rules() {
        check(&exported, &word(&rule["alert"]), &word(&rule["expr"]), &mut faults);
    }
    for (file, text) in DASHBOARDS {
        for expression in expressions(&serde_json::from_str(text).unwrap()) {
            check(&exported, file, &expression, &mut faults);
        }
    }
    let tests: Value = serde_saphyr::from_str(RULES_TEST).unwrap();
    for test in tests["tests"].as_array().unwrap() {
        for series in test["input_series"].as_array().unwrap() {
            check(&exported, "tests/alerts.test.yaml", &word(&series["series"]), &mut faults);
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn the_metrics_in_the_document_are_those_of_the_code() {
    let mut exported = exported();
    // A histogram is one metric for people.
    let buckets: Vec<String> =
        exported.keys().filter(|name| name.ends_with("_bucket")).cloned().collect();
    for bucket in buckets {
        let name = bucket.trim_end_matches("_bucket");
        let mut labels = exported.remove(&bucket).unwrap();
        labels.remove("le");
        exported.remove(&format!("{name}_sum"));
        exported.remove(&format!("{name}_count"));
        exported.insert(name.to_owned(), labels);
    }
    assert_eq!(operations::metrics(), exported);
}

fn rules() -> Vec<Value> {
    let file: Value = serde_saphyr::from_str(RULES).unwrap();
    let groups = file["groups"].as_array().unwrap();
    groups.iter().flat_map(|group| group["rules"].as_array().unwrap()).cloned().collect()
}

fn word(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}

/// Lists what a dashboard asks Prometheus for.
fn expressions(value: &Value) -> Vec<String> {
    match value {
        Value::Array(items) => items.iter().flat_map(expressions).collect(),
        Value::Object(fields) => {
            let own = ["expr", "definition", "query"].into_iter().filter_map(|key| fields.get(key));
            let own = own.filter_map(Value::as_str).filter(|text| *text != "prometheus");
            own.map(str::to_owned).chain(fields.values().flat_map(expressions)).collect()
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => Vec::new(),
    }
}

/// Adds what is wrong with an expression.
fn check(
    exported: &BTreeMap<String, BTreeSet<String>>,
    place: &str,
    text: &str,
    faults: &mut Vec<String>,
) {
    let expression = promql::read(text);
    let mut known: BTreeSet<&str> = SCRAPE_LABELS.into();
    for selector in &expression.selectors {
        let name = selector.metric.as_str();
        if BUILT_IN.contains(&name) {
            continue;
        }
        let Some(labels) = exported.get(name) else {
            faults.push(format!("{place}: the metric of {} does not exist", selector.text));
            continue;
        };
        let mut own: BTreeSet<&str> = SCRAPE_LABELS.into();
        own.extend(labels.iter().map(String::as_str));
        own.extend(name.starts_with("finetune_trainer_").then_some(TRAINER_LABEL));
        for (label, value) in &selector.matchers {
            if !own.contains(label.as_str()) {
                faults.push(format!("{place}: {name} has no label {label}"));
            }
            let reasons = value.split('|').filter(|_| label == "reason");
            for reason in reasons.filter(|reason| !operations::reasons().contains(*reason)) {
                faults.push(format!("{place}: {reason} is no reason of the condition Succeeded"));
            }
        }
        known.extend(own);
    }
    if expression.selectors.is_empty() {
        faults.push(format!("{place}: {text:?} names no metric"));
    }
    for label in expression.groupings.iter().filter(|label| !known.contains(label.as_str())) {
        faults.push(format!("{place}: no metric of {text} has a label {label}"));
    }
}

/// Reads the metrics and their labels out of the code that makes them.
fn exported() -> BTreeMap<String, BTreeSet<String>> {
    let mut exported = BTreeMap::new();
    let pieces: Vec<&str> = OPERATORS_METRICS.split("\"finetune_").collect();
    for [before, piece] in pieces.array_windows() {
        let (rest, piece) = piece.split_once('"').unwrap();
        let name = format!("finetune_{rest}");
        let mut labels = quoted_list(piece);
        if !before.trim_end().ends_with("HistogramOpts::new(") {
            exported.insert(name, labels);
            continue;
        }
        for part in ["sum", "count"] {
            exported.insert(format!("{name}_{part}"), labels.clone());
        }
        labels.insert("le".to_owned());
        exported.insert(format!("{name}_bucket"), labels);
    }
    let run_id = || BTreeSet::from(["run_id".to_owned()]);
    let code = TRAINERS_METRICS;
    assert!(code.contains(r#"const_label("run_id""#), "the trainer's label has another name");
    for piece in code.split("gauge(").skip(1) {
        if let Some((name, _)) =
            piece.trim_start().strip_prefix('"').and_then(|text| text.split_once('"'))
        {
            exported.insert(format!("finetune_trainer_{name}"), run_id());
        }
    }
    for piece in code.split("\"finetune_trainer_").skip(1) {
        let (name, piece) = piece.split_once('"').unwrap();
        if name.chars().all(|character| character.is_alphanumeric() || character == '_') {
            let labels = quoted_list(piece).union(&run_id()).cloned().collect();
            exported.insert(format!("finetune_trainer_{name}"), labels);
        }
    }
    for name in ["finetune_operator_leader", "finetune_trainer_loss", "finetune_trainer_stage"] {
        assert!(exported.contains_key(name), "{name} is not found in {exported:?}");
    }
    exported
}

/// Reads the first `&["a", "b"]`.
fn quoted_list(code: &str) -> BTreeSet<String> {
    let list = code.split_once("&[").and_then(|(_, rest)| rest.split_once(']'));
    let items = list.map_or("", |(items, _)| items);
    items.split('"').skip(1).step_by(2).map(str::to_owned).collect()
}
