//! docs/OPERATIONS.md, compared with the code.

use std::collections::{BTreeMap, BTreeSet};

use finetune_contract::{Reason, ReasonPhase};

const DOCUMENT: &str = include_str!("../../docs/OPERATIONS.md");
const README: &str = include_str!("../../charts/finetune-operator/README.md");
const REASONS: &str = include_str!("../../docs/reference/reasons.md");

/// Lists the reasons the condition `Succeeded` can have.
pub(crate) fn reasons() -> BTreeSet<String> {
    let of_succeeded = |reason: &&Reason| reason.phase() != ReasonPhase::OtherCondition;
    Reason::ALL.iter().filter(of_succeeded).map(ToString::to_string).collect()
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
    let (of_succeeded, of_others) = REASONS.split_once("\n## Of other conditions\n").unwrap();
    let documented: BTreeSet<String> =
        rows(of_succeeded).iter().flat_map(|row| code_words(&row[0])).collect();
    let expected = reasons();
    let missing: Vec<_> = expected.difference(&documented).collect();
    let stale: Vec<_> = documented.difference(&expected).collect();
    assert!(missing.is_empty(), "not in docs/reference/reasons.md: {missing:?}");
    assert!(stale.is_empty(), "in docs/reference/reasons.md, but not in the code: {stale:?}");
    assert_eq!(rows(of_others).len() + expected.len(), Reason::ALL.len());
    assert!(section("### Reasons").contains("(reference/reasons.md)"), "a reader finds the page");
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
