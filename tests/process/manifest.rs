//! What a user reads when a manifest is wrong.

use finetune_api::manifest::{self, Error};

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
        include_str!("../../examples/continue.yaml"),
        include_str!("../../examples/from-checkpoint.yaml"),
        include_str!("../../examples/several-datasets.yaml"),
    ] {
        assert_eq!(messages(text), "accepted", "{text}");
    }
}

#[test]
fn knows_what_other_trainers_call_a_field() {
    insta::assert_snapshot!(with("  training: {warmupRatio: 0.1, num_train_epochs: 1, max_seq_length: 64}\n"), @r#"
spec.training.warmupRatio: is not a field; it is numWarmupSteps here, a number of steps and not a share of them
spec.training.num_train_epochs: is not a field; it is numEpochs here
spec.training.max_seq_length: is not a field; it is contextLength here
"#);
    insta::assert_snapshot!(with("  training: {learningRate: \"2e-4\", numEpochs: \"3\", packing: \"1\"}\n"), @r#"
spec.training.learningRate: is "2e-4", must be a number: write 2e-4 without quotation marks
spec.training.numEpochs: is "3", must be a number: write 3 without quotation marks
spec.training.packing: is "1", must be true or false
"#);
    for names in ["all-linear", "All-Linear", "[all-linear]"] {
        assert_eq!(with(&format!("  loraConfig: {{targetModules: {names}}}\n")), "accepted");
    }
    assert_eq!(with("  training: {numEpochs: 0.5}\n"), "accepted");
    assert_eq!(with("  training: {numEpochs: 2.0}\n"), "accepted");
    insta::assert_snapshot!(with("  training: {numEpochs: 0}\n"), @"spec.training.numEpochs: is 0, must be from 0.001 to 1000");
}

#[test]
fn training_rows_come_from_one_place_or_from_sources() {
    let dataset = |fields: &str| {
        let text = format!(
            "{{apiVersion: finetune.dev/v1alpha1, kind: FineTuneJob, metadata: {{name: a}}, spec: {{model: {{uri: 'hf://a/b'}}, output: {{uri: 's3://a/c'}}, dataset: {{{fields}}}}}}}"
        );
        messages(&text)
    };
    assert_eq!(dataset("train: 'hf://datasets/a/b'"), "accepted");
    assert_eq!(
        dataset("sources: [{uri: 's3://a/b.jsonl', weight: 0.5}], validationFraction: 0.1"),
        "accepted"
    );
    insta::assert_snapshot!(dataset("format: auto"), @"spec.dataset: needs the training rows: set train, or list several under sources, but not both");
    insta::assert_snapshot!(dataset("train: 's3://a/b.jsonl', sources: [{uri: 's3://a/b.jsonl'}]"), @"spec.dataset: needs the training rows: set train, or list several under sources, but not both");
    insta::assert_snapshot!(dataset("train: 's3://a/b.jsonl', validation: 's3://a/c.jsonl', validationFraction: 0.1"), @"spec.dataset: validation and validationFraction both say which rows are held out: keep one");
    insta::assert_snapshot!(dataset("sources: [{uri: 'ftp://a/b', weight: 0}, {format: text}], format: text"), @r#"
spec.dataset.sources[0].weight: is 0, must be from 0.001 to 100
spec.dataset.sources[1].uri: is missing and has no default
spec.dataset.sources[0].uri: "ftp://a/b" has the unknown scheme "ftp": use hf, s3, gs, az, pvc or file
spec.dataset: format is set for each of sources: move it there
"#);
    insta::assert_snapshot!(dataset("train: 's3://a/b.jsonl', validationFraction: 0.9, trainOn: last, onInvalidRow: skip"), @r#"
spec.dataset.onInvalidRow: is "skip"; allowed: error, drop
spec.dataset.trainOn: is "last"; did you mean lastTurn?; allowed: allTurns, lastTurn
spec.dataset.validationFraction: is 0.9, must be from 1e-4 to 0.5
"#);
}

#[test]
fn reports_unknown_fields_with_the_likely_one() {
    insta::assert_snapshot!(with("  lorConfig: {}\n"), @r#"spec.lorConfig: is not a field; did you mean loraConfig?"#);
    insta::assert_snapshot!(with("  training: {learning_rate: 1e-4}\n"), @r#"spec.training.learning_rate: is not a field; did you mean learningRate?"#);
}

#[test]
fn reports_missing_fields() {
    insta::assert_snapshot!(check("  model: {uri: hf://HuggingFaceTB/SmolLM2-135M-Instruct}\n", ""), @r#"spec.model: is missing and has no default"#);
    insta::assert_snapshot!(check("  name: minimal", "  labels: {}"), @r#"metadata.name: is missing: it names the run, such as support-tickets"#);
}

#[test]
fn reports_every_fault_at_once() {
    insta::assert_snapshot!(with("  loraConfig: {r: 0, loraDropout: 1.5, targetModules: 3}\n  training: {numEpochs: 3, maxSteps: 10, packing: 'yes', seed: 1.5}\n"), @r#"
spec.loraConfig.loraDropout: is 1.5, must be from 0 to 0.9
spec.loraConfig.r: is 0, must be from 1 to 1024
spec.loraConfig.targetModules: is 3, must be a list of names, or one text
spec.training.packing: is "yes", must be true or false
spec.training.seed: is 1.5, must be a whole number
spec.training: numEpochs and maxSteps both set the length of the run: keep one
    "#);
}

#[test]
fn reports_numbers_out_of_range() {
    insta::assert_snapshot!(with("  training: {learningRate: 0}\n"), @r#"spec.training.learningRate: is 0, must be from 1e-9 to 1"#);
    insta::assert_snapshot!(with("  training: {learningRate: -1}\n"), @r#"spec.training.learningRate: is -1, must be from 1e-9 to 1"#);
    insta::assert_snapshot!(with("  training: {learningRate: .nan}\n"), @r#"
the manifest is not valid YAML or JSON: error: line 10 column 28: non-finite float `.nan` rejected by the configured policy
  --> <input>:10:28
   |
 8 |   dataset: {train: file:///data/train.jsonl}
 9 |   output: {uri: file:///data/minimal}
10 |   training: {learningRate: .nan}
   |                            ^ non-finite float `.nan` rejected by the configured policy
    "#);
    insta::assert_snapshot!(with("  training: {learningRate: '0,001'}\n"), @r#"spec.training.learningRate: is "0,001", must be a number"#);
    insta::assert_snapshot!(with("  training: {learningRate: 1e400}\n"), @r#"
the manifest is not valid YAML or JSON: error: line 10 column 28: non-finite float `1e400` rejected by the configured policy
  --> <input>:10:28
   |
 8 |   dataset: {train: file:///data/train.jsonl}
 9 |   output: {uri: file:///data/minimal}
10 |   training: {learningRate: 1e400}
   |                            ^ non-finite float `1e400` rejected by the configured policy
    "#);
    insta::assert_snapshot!(with("  training: {numEpochs: 1000000000}\n"), @r#"spec.training.numEpochs: is 1000000000, must be from 0.001 to 1000"#);
    insta::assert_snapshot!(with("  activeDeadlineSeconds: 0\n"), @r#"spec.activeDeadlineSeconds: is 0, must be from 1 to 31536000"#);
}

#[test]
fn reports_unknown_words() {
    insta::assert_snapshot!(with("  training: {dtype: fp8}\n"), @r#"spec.training.dtype: is "fp8"; allowed: auto, bf16, fp32"#);
    insta::assert_snapshot!(check("train.jsonl}", "train.jsonl, format: sharegtp}"), @r#"spec.dataset.format: is "sharegtp"; did you mean sharegpt?; allowed: auto, messages, promptCompletion, text, sharegpt, alpaca, prerendered"#);
}

#[test]
fn reports_rules_between_fields() {
    insta::assert_snapshot!(with("  training: {numEpochs: 3, maxSteps: 10}\n"), @r#"spec.training: numEpochs and maxSteps both set the length of the run: keep one"#);
    insta::assert_snapshot!(with("  initialAdapter: {uri: s3://a/adapter}\n"), @"spec: initialAdapter continues training a LoRA adapter, but loraConfig is not set: set it to the adapter's shape; to continue from a full-parameter result, use it as model.uri");
    insta::assert_snapshot!(with("  loraConfig: {}\n  initialAdapter: {uri: s3://a/b}\n  initialCheckpoint: {uri: s3://a/c}\n"), @"spec: initialAdapter and initialCheckpoint both say what training starts from: keep one");
    insta::assert_snapshot!(check("minimal}", "minimal, merge: true}"), @"spec: output.merge merges a LoRA adapter, but loraConfig is not set, and a full-parameter run has none: remove merge, or set loraConfig: {}");
    insta::assert_snapshot!(check("model: {uri: hf://HuggingFaceTB/SmolLM2-135M-Instruct}", "model: {uri: file:///m, revision: main}"), @"spec.model: revision names a hub's branch, tag or commit, but uri is not hf://: remove revision");
    insta::assert_snapshot!(with("  loraConfig: {targetModules: [all-linear, q_proj]}\n"), @r#"spec.loraConfig.targetModules: has all-linear beside other names: it stands for every linear layer, so name it alone, or list modules without it"#);
}

#[test]
fn reports_uris() {
    insta::assert_snapshot!(check("file:///data/minimal", "/data/minimal/"), @r#"spec.output.uri: "/data/minimal/" has no scheme: for a file here write file:///data/minimal/, else one of hf://, s3://, gs://, az://, pvc://"#);
    insta::assert_snapshot!(check("file:///data/minimal", "hf://me/minimal"), @r#"spec.output.uri: "hf://me/minimal" is a hub repository, which is read only here: use s3, gs, az, pvc or file"#);
    insta::assert_snapshot!(check("file:///data/minimal", "ftp://me/minimal"), @r#"spec.output.uri: "ftp://me/minimal" has the unknown scheme "ftp": use hf, s3, gs, az, pvc or file"#);
    insta::assert_snapshot!(check("file:///data/minimal", "s3:///minimal"), @r#"spec.output.uri: "s3:///minimal" does not name a bucket (s3://bucket/path)"#);
    insta::assert_snapshot!(check("file:///data/minimal", "s3://a/../b"), @r#"spec.output.uri: "s3://a/../b" contains a relative path segment (`.` or `..`), which an object URI cannot have"#);
    insta::assert_snapshot!(check("file:///data/minimal", "s3://key:secret@a/b"), @r#"spec.output.uri: "s3://…@a" contains credentials before `@` (put them into a Secret), which an object URI cannot have"#);
    insta::assert_snapshot!(check("file:///data/minimal", "s3://a/b?versionId=1"), @r#"spec.output.uri: "s3://a/b?versionId=1" contains a query (`?`), which an object URI cannot have"#);
}

#[test]
fn reports_names_that_cannot_name_a_pod() {
    insta::assert_snapshot!(check("name: minimal", "name: Minimal-"), @r#"metadata.name: is "Minimal-", must have at most 52 characters, only a-z, 0-9 and '-', and start and end with a letter or digit"#);
    assert_eq!(check("name: minimal", &format!("name: {}", "a".repeat(52))), "accepted");
    assert_ne!(check("name: minimal", &format!("name: {}", "a".repeat(53))), "accepted");
}

#[test]
fn asks_for_one_job() {
    insta::assert_snapshot!(messages(&format!("{MINIMAL}---\n{MINIMAL}")), @r#"the manifest holds 2 documents, but one run needs exactly one FineTuneJob: split the file"#);
    insta::assert_snapshot!(messages(""), @r#"the manifest is empty: write one FineTuneJob"#);
    insta::assert_snapshot!(check("kind: FineTuneJob", "kind: Job"), @r#"kind: is "Job", must be FineTuneJob"#);
    insta::assert_snapshot!(messages("[]"), @r#"must be a FineTuneJob object with apiVersion, kind, metadata and spec"#);
}
