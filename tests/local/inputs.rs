//! What is published is what the inputs gave: whatever changes, an older result is not taken for it.

use std::{fs, os::unix::fs::symlink};

use serde_json::{Value, json};

use crate::sandbox::{Sandbox, rows, sha256};

const NOTHING: &str = "the same inputs are already published at ";

/// Runs a job that is published, after a change; returns what is said, without digests and paths.
fn again(sandbox: &Sandbox, job: &Value) -> String {
    let ran = sandbox.run(job);
    if ran.stdout.starts_with(NOTHING) {
        "nothing was trained".to_owned()
    } else {
        sandbox.shown(&ran)
    }
}

/// Checks that a run stopped because exactly this differs.
#[track_caller]
fn assert_differs(shown: &str, what: &str) {
    assert!(shown.starts_with("exit 78\n"), "{shown}");
    assert!(shown.contains(&format!("a result of different inputs (differing: {what}")), "{shown}");
}

#[test]
fn rows_mended_in_place_are_never_taken_for_what_was_trained() {
    let Some(sandbox) = Sandbox::new() else { return };
    let mut job = sandbox.job("output");
    sandbox.run(&job).ok();
    let before = sandbox.published("output");
    assert_eq!(again(&sandbox, &job), "nothing was trained");
    // White space between rows is no change; neither is another place of the same rows.
    sandbox.write("train.jsonl", &rows(0..12).replace('\n', "\n\n"));
    assert_eq!(again(&sandbox, &job), "nothing was trained");

    sandbox.write_rows("train.jsonl", 0..13);
    assert_differs(&again(&sandbox, &job), "the rows of dataset.train");
    assert_eq!(sandbox.published("output"), before);
    job["spec"]["output"]["overwrite"] = json!(true);
    sandbox.run(&job).ok();
    let after = sandbox.published("output");
    assert_ne!(after.files, before.files, "trained on the new rows");
    assert_eq!(
        again(&sandbox, &job),
        "nothing was trained",
        "the same again, also when told to replace"
    );

    // Rows may move.
    fs::rename(sandbox.path("train.jsonl"), sandbox.path("moved.jsonl")).unwrap();
    job["spec"]["dataset"]["train"] = json!(sandbox.uri("moved.jsonl"));
    assert_eq!(again(&sandbox, &job), "nothing was trained");
}

#[test]
fn other_validation_rows_weights_or_tokens_are_other_inputs() {
    let Some(sandbox) = Sandbox::new() else { return };
    sandbox.write_rows("validation.jsonl", 20..24);
    let mut job = sandbox.job("output");
    job["spec"]["dataset"]["validation"] = json!(sandbox.uri("validation.jsonl"));
    sandbox.run(&job).ok();
    assert_eq!(again(&sandbox, &job), "nothing was trained");

    sandbox.write_rows("validation.jsonl", 20..25);
    assert_differs(&again(&sandbox, &job), "the rows of dataset.validation");
    sandbox.write_rows("validation.jsonl", 20..24);
    assert_eq!(again(&sandbox, &job), "nothing was trained");

    // Other weights, of the same size and name: one bit.
    let weights = sandbox.path("model/model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    let mut changed = bytes.clone();
    *changed.last_mut().unwrap() ^= 1;
    fs::write(&weights, changed).unwrap();
    assert_differs(&again(&sandbox, &job), "the files of model.uri");
    // The same weights at another time.
    fs::write(&weights, &bytes).unwrap();
    assert_eq!(again(&sandbox, &job), "nothing was trained");

    // Another template, another end of text: what rows become changes.
    let settings = sandbox.path("model/tokenizer_config.json");
    let text = fs::read_to_string(&settings).unwrap();
    fs::write(&settings, format!("{text}\n")).unwrap();
    assert_differs(&again(&sandbox, &job), "the files of model.uri");
}

#[test]
fn another_start_is_another_input() {
    let Some(sandbox) = Sandbox::new() else { return };
    sandbox.run(&sandbox.job("first")).ok();
    let mut job = sandbox.job("output");
    job["spec"]["initialAdapter"] = json!({"uri": sandbox.uri("first")});
    sandbox.run(&job).ok();
    assert_eq!(again(&sandbox, &job), "nothing was trained");
    let mut first = sandbox.job("first");
    first["spec"]["training"]["seed"] = json!(7);
    first["spec"]["output"]["overwrite"] = json!(true);
    sandbox.run(&first).ok();
    assert_differs(&again(&sandbox, &job), "what training starts from");
}

#[test]
fn a_result_of_an_earlier_release_is_not_taken_for_what_it_does_not_say() {
    let Some(sandbox) = Sandbox::new() else { return };
    let mut job = sandbox.job("output");
    sandbox.run(&job).ok();
    let path = sandbox.path("output/finetune-manifest.json");
    let mut manifest: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    let fields = manifest.as_object_mut().unwrap();
    assert!(fields.remove("inputs").is_some() && fields.remove("settings").is_some());
    fs::write(&path, manifest.to_string()).unwrap();
    insta::assert_snapshot!(again(&sandbox, &job).replace(manifest["runId"].as_str().unwrap(), "RUN"), @r#"
exit 78
error: the run cannot start:
  spec.output.uri: file://DIR/output already contains the result of run RUN, published by an earlier release that recorded only the training rows, which are the same; the validation rows, the model files and the settings cannot be compared: choose another output.uri, or set output.overwrite: true to replace it
"#);
    job["spec"]["output"]["overwrite"] = json!(true);
    sandbox.run(&job).ok();
    assert!(sandbox.published("output").inputs.is_some(), "trained and recorded");
}

#[test]
fn a_run_that_failed_on_bad_rows_trains_when_they_are_mended() {
    let Some(sandbox) = Sandbox::new() else { return };
    let job = sandbox.job("output");
    sandbox.write("train.jsonl", &format!("{}{{\"text\": 1\n", rows(0..12)));
    assert_eq!(sandbox.run(&job).code, 65);
    sandbox.write_rows("train.jsonl", 0..12);
    sandbox.run(&job).ok();
    sandbox.published("output");
}

#[test]
fn a_result_with_a_lost_file_is_made_again() {
    let Some(sandbox) = Sandbox::new() else { return };
    let job = sandbox.job("output");
    sandbox.run(&job).ok();
    let weights = sandbox.path("output/adapter_model.safetensors");
    let before = sha256(&weights);
    fs::remove_file(&weights).unwrap();
    sandbox.run(&job).ok();
    assert_eq!(sha256(&weights), before);
}

#[test]
fn an_output_that_touches_an_input_is_refused_before_a_byte_is_written() {
    let Some(sandbox) = Sandbox::new() else { return };
    fs::create_dir(sandbox.path("rows")).unwrap();
    sandbox.write_rows("rows/train.jsonl", 0..12);
    symlink(sandbox.path("model"), sandbox.path("link")).unwrap();
    symlink(sandbox.path("rows"), sandbox.path("other")).unwrap();
    let names = |directory: &str| -> Vec<_> {
        let entries = fs::read_dir(sandbox.path(directory)).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let before = (names("model"), names("rows"));
    let mut shown = Vec::new();
    for output in ["model", "model/", "model/out", "rows", "", "link", "link/out", "other"] {
        let mut job = sandbox.job("output");
        job["spec"]["dataset"]["train"] = json!(sandbox.uri("rows/train.jsonl"));
        job["spec"]["output"] = json!({"uri": sandbox.uri(output), "overwrite": true});
        let file = sandbox.path("job.json");
        fs::write(&file, job.to_string()).unwrap();
        let ran = sandbox.finetune(&["run", "-f", "job.json", "--work-dir", "work"]);
        assert_eq!(ran.code, 78, "{output}: {}", ran.stderr);
        let text = sandbox.shown(&ran);
        let line = text.lines().find(|line| line.contains("spec.output.uri")).unwrap();
        shown.push(format!(
            "{output:?}: {}",
            line.trim().split(": the output must").next().unwrap()
        ));
    }
    insta::assert_snapshot!(shown.join("\n"), @r#"
"model": spec.output.uri: "file://DIR/model" is the same place as spec.model.uri (file://DIR/model)
"model/": spec.output.uri: "file://DIR/model/" is the same place as spec.model.uri (file://DIR/model)
"model/out": spec.output.uri: "file://DIR/model/out" lies inside spec.model.uri (file://DIR/model)
"rows": spec.output.uri: "file://DIR/rows" holds spec.dataset.train (file://DIR/rows/train.jsonl)
"": spec.output.uri: "file://DIR/" holds spec.model.uri (file://DIR/model)
"link": spec.output.uri: "file://DIR/link" is the same place as spec.model.uri (file://DIR/model)
"link/out": spec.output.uri: "file://DIR/link/out" lies inside spec.model.uri (file://DIR/model)
"other": spec.output.uri: "file://DIR/other" holds spec.dataset.train (file://DIR/rows/train.jsonl)
"#);
    assert_eq!((names("model"), names("rows")), before);
}
