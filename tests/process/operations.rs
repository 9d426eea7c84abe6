//! docs/OPERATIONS.md, compared with the code.

use std::collections::{BTreeMap, BTreeSet};

const DOCUMENT: &str = include_str!("../../docs/OPERATIONS.md");
const README: &str = include_str!("../../charts/finetune-operator/README.md");
const LIFECYCLE: &str = include_str!("../../src/operator/lifecycle.rs");
/// Words of lifecycle.rs that are no reason of the condition `Succeeded`: of other conditions, of
/// plans, and of the kubelet.
const OTHER_WORDS: [&str; 13] = [
    "CreateContainerConfigError",
    "CreateContainerError",
    "ErrImageNeverPull",
    "ErrImagePull",
    "Full",
    "ImagePullBackOff",
    "InvalidImageName",
    "LoRA",
    "NotSuspended",
    "Planned",
    "PreflightPassed",
    "Proven",
    "RunContainerError",
];

/// Lists the reasons the condition `Succeeded` can have.
pub(crate) fn reasons() -> BTreeSet<String> {
    let is_word = |text: &&str| {
        text.starts_with(|first: char| first.is_ascii_uppercase())
            && text.chars().all(char::is_alphanumeric)
    };
    let in_code = LIFECYCLE.split('"').filter(is_word);
    let in_code = in_code.filter(|word| !OTHER_WORDS.contains(word) && quoted(word));
    // Set before anything is known.
    let first = ["Pending"];
    let of_trainer = [
        variants(include_str!("../../contract/src/run_report.rs"), "FailureReason"),
        variants(include_str!("../../contract/src/preflight_report.rs"), "ProblemReason"),
    ];
    in_code.chain(first).chain(of_trainer.into_iter().flatten()).map(str::to_owned).collect()
}

fn quoted(word: &str) -> bool {
    LIFECYCLE.contains(&format!("\"{word}\""))
}

fn variants(code: &'static str, name: &str) -> Vec<&'static str> {
    let (_, rest) = code.split_once(&format!("pub enum {name} {{")).unwrap();
    let (body, _) = rest.split_once("\n}").unwrap();
    body.lines().filter_map(|line| line.trim().strip_suffix(',')).collect()
}

/// Lists the alerts that have a runbook.
pub(crate) fn runbooks() -> BTreeSet<String> {
    section("## Runbooks")
        .lines()
        .filter_map(|line| line.strip_prefix("### "))
        .map(str::to_owned)
        .collect()
}

/// Lists the metrics of the document with their labels.
pub(crate) fn metrics() -> BTreeMap<String, BTreeSet<String>> {
    let rows = rows(section("## Metrics"));
    let pairs = rows.iter().flat_map(|[metrics, labels, _]| {
        code_words(metrics).into_iter().map(|metric| (metric, code_words(labels)))
    });
    pairs.collect()
}

#[test]
fn says_every_reason_and_no_other() {
    let rows = rows(section("### Reasons"));
    let documented: BTreeSet<String> = rows.iter().flat_map(|row| code_words(&row[0])).collect();
    let expected = reasons();
    let missing: Vec<_> = expected.difference(&documented).collect();
    let stale: Vec<_> = documented.difference(&expected).collect();
    assert!(missing.is_empty(), "not in docs/OPERATIONS.md: {missing:?}");
    assert!(stale.is_empty(), "in docs/OPERATIONS.md, but not in the code: {stale:?}");
}

#[test]
fn lists_the_settings_with_their_defaults_in_the_chart() {
    let values: serde_json::Value =
        serde_saphyr::from_str(include_str!("../../charts/finetune-operator/values.yaml")).unwrap();
    for (name, value) in values["settings"].as_object().unwrap() {
        let row = section("## Settings").lines().find(|line| line.contains(&format!("`{name}")));
        let row = row.unwrap_or_else(|| panic!("settings.{name} is not in docs/OPERATIONS.md"));
        let is_plain = value.is_number() || value.as_array().is_some_and(Vec::is_empty);
        assert!(README.contains(&format!("| `settings.{name}` |")), "{name} is not in the README");
        assert!(!is_plain || row.contains(&format!("`{value}` |")), "{name} is {value}: {row}");
    }
}

/// Returns a section without its heading; a deeper heading does not end it.
fn section(heading: &str) -> &'static str {
    let (_, rest) = DOCUMENT.split_once(&format!("\n{heading}\n")).unwrap();
    let depth = heading.split(' ').next().unwrap();
    let is_end = |line: &&str| {
        line.split_once(' ').is_some_and(|(marks, _)| {
            !marks.is_empty() && marks.chars().all(|mark| mark == '#') && marks.len() <= depth.len()
        })
    };
    let mut is_code = false;
    let end = rest.lines().find(|line| {
        is_code ^= line.starts_with("```");
        !is_code && is_end(line)
    });
    end.map_or(rest, |end| rest.split_once(&format!("\n{end}\n")).unwrap().0)
}

/// Reads the first three cells of a table's rows.
fn rows(text: &str) -> Vec<[String; 3]> {
    let lines = text.lines().filter(|line| line.starts_with("| `"));
    let cells =
        lines.map(|line| line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()));
    cells.map(|cells| cells.take(3).collect::<Vec<_>>().try_into().unwrap()).collect()
}

fn code_words(cell: &str) -> BTreeSet<String> {
    cell.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}
