//! What a user reads when a manifest is wrong.

use finetune_operator::manifest::{self, Error};

const MINIMAL: &str = include_str!("../../examples/minimal.yaml");

/// Replaces `from` by `to` in the minimal example and returns the reader's messages.
fn check(from: &str, to: &str) -> String {
    assert!(MINIMAL.contains(from), "{from:?} is not in the example");
    messages(&MINIMAL.replacen(from, to, 1))
}

/// Adds lines below `spec` and returns the reader's messages.
fn with(lines: &str) -> String {
    messages(&format!("{MINIMAL}{lines}"))
}

fn messages(text: &str) -> String {
    match manifest::parse(text) {
        Ok(_) => "accepted".to_owned(),
        Err(Error::Violations(violations)) => {
            violations.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
        }
        Err(error) => error.to_string(),
    }
}

#[test]
fn examples_are_accepted() {
    for text in [
        MINIMAL,
        include_str!("../../examples/lora.yaml"),
        include_str!("../../examples/full-parameter.yaml"),
    ] {
        assert_eq!(messages(text), "accepted", "{text}");
    }
}

#[test]
fn reports_unknown_fields_with_the_likely_one() {
    insta::assert_snapshot!(with("  lorConfig: {}\n"), @"");
    insta::assert_snapshot!(with("  training: {learning_rate: 1e-4}\n"), @"");
}

#[test]
fn reports_missing_fields() {
    insta::assert_snapshot!(check("  model: {uri: hf://HuggingFaceTB/SmolLM2-135M-Instruct}\n", ""), @"");
    insta::assert_snapshot!(check("  name: minimal", "  labels: {}"), @"");
}

#[test]
fn reports_every_fault_at_once() {
    insta::assert_snapshot!(with("  loraConfig: {r: 0, loraDropout: 1.5, targetModules: q_proj}\n  training: {numEpochs: 3, maxSteps: 10, packing: 'yes', seed: 1.5}\n"), @"");
}

#[test]
fn reports_numbers_out_of_range() {
    insta::assert_snapshot!(with("  training: {learningRate: 0}\n"), @"");
    insta::assert_snapshot!(with("  training: {learningRate: -1}\n"), @"");
    insta::assert_snapshot!(with("  training: {learningRate: .nan}\n"), @"");
    insta::assert_snapshot!(with("  training: {learningRate: '0,001'}\n"), @"");
    insta::assert_snapshot!(with("  training: {learningRate: 1e400}\n"), @"");
    insta::assert_snapshot!(with("  training: {numEpochs: 1000000000}\n"), @"");
    insta::assert_snapshot!(with("  activeDeadlineSeconds: 0\n"), @"");
}

#[test]
fn reports_unknown_words() {
    insta::assert_snapshot!(with("  training: {dtype: fp8}\n"), @"");
    insta::assert_snapshot!(check("train.jsonl}", "train.jsonl, format: sharegtp}"), @"");
}

#[test]
fn reports_rules_between_fields() {
    insta::assert_snapshot!(with("  training: {numEpochs: 3, maxSteps: 10}\n"), @"");
    insta::assert_snapshot!(with("  loraConfig: {targetModules: [all-linear, q_proj]}\n"), @"");
}

#[test]
fn reports_uris() {
    insta::assert_snapshot!(check("file:///data/minimal", "/data/minimal/"), @"");
    insta::assert_snapshot!(check("file:///data/minimal", "hf://me/minimal"), @"");
    insta::assert_snapshot!(check("file:///data/minimal", "ftp://me/minimal"), @"");
    insta::assert_snapshot!(check("file:///data/minimal", "s3:///minimal"), @"");
    insta::assert_snapshot!(check("file:///data/minimal", "s3://a/../b"), @"");
    insta::assert_snapshot!(check("file:///data/minimal", "s3://key:secret@a/b"), @"");
    insta::assert_snapshot!(check("file:///data/minimal", "s3://a/b?versionId=1"), @"");
}

#[test]
fn reports_names_that_cannot_name_a_pod() {
    insta::assert_snapshot!(check("name: minimal", "name: Minimal-"), @"");
    assert_eq!(check("name: minimal", &format!("name: {}", "a".repeat(52))), "accepted");
    assert_ne!(check("name: minimal", &format!("name: {}", "a".repeat(53))), "accepted");
}

#[test]
fn asks_for_one_job() {
    insta::assert_snapshot!(messages(&format!("{MINIMAL}---\n{MINIMAL}")), @"");
    insta::assert_snapshot!(messages(""), @"");
    insta::assert_snapshot!(check("kind: FineTuneJob", "kind: Job"), @"");
    insta::assert_snapshot!(messages("[]"), @"");
}
