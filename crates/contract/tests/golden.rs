//! One document of each kind, as it crosses between releases: read, written, and refused.
//!
//! A change of these files is a change of the contract: it needs another version. A field that is
//! absent where it says nothing new is no change; a file of its own shows it (`…_ranks.json`, `…_paced.json`).
#![allow(missing_docs, clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use finetune_contract::{
    CONTRACT_VERSION, Comparison, Document, Manifest, ParseDocumentError, PreflightConfig,
    PreflightReport, Progress, RunConfig, RunReport, decisive_settings, parse, render,
    settings_differences,
};
use serde_json::{Value, json};

/// Checks a document that nothing unknown may be in.
fn check<D: Document + std::fmt::Debug + PartialEq>(text: &str) {
    let mut unknown = check_round_trip::<D>(text);
    unknown["surprise"] = json!(1);
    let refused = parse::<D>(&unknown.to_string()).unwrap_err().to_string();
    assert!(refused.contains("surprise") && refused.contains(D::NAME), "{refused}");
}

/// Checks a document that trainers of a newer release write and operators of an older one read.
fn check_tolerant<D: Document + std::fmt::Debug + PartialEq>(text: &str) {
    let mut newer = check_round_trip::<D>(text);
    newer["surprise"] = json!(1);
    if let Some(proof) = newer.pointer_mut("/outcome/proof") {
        proof["surprise"] = json!({"of": "a newer release"});
    }
    assert_eq!(parse::<D>(&newer.to_string()).unwrap(), parse::<D>(text).unwrap());
}

/// Checks that a document is the same both ways and no other version is read; returns its JSON.
fn check_round_trip<D: Document + std::fmt::Debug>(text: &str) -> Value {
    let golden: Value = serde_json::from_str(text).unwrap();
    let document: D = parse(text).unwrap();
    let written: Value = serde_json::from_str(&render(&document)).unwrap();
    assert_eq!(written, golden, "{}", D::NAME);

    let mut other = golden.clone();
    other["version"] = json!(CONTRACT_VERSION + 1);
    let refused = parse::<D>(&other.to_string()).unwrap_err();
    let found = u64::from(CONTRACT_VERSION) + 1;
    assert_eq!(refused, ParseDocumentError::UnknownVersion { document: D::NAME, found });
    golden
}

#[test]
fn every_document_is_read_and_written_as_it_was() {
    check::<PreflightConfig>(include_str!("golden/preflight_config.json"));
    check::<PreflightConfig>(include_str!("golden/preflight_config_continued.json"));
    check::<PreflightConfig>(include_str!("golden/preflight_config_from_step.json"));
    check::<PreflightConfig>(include_str!("golden/preflight_config_pattern.json"));
    check::<PreflightReport>(include_str!("golden/preflight_report.json"));
    check::<PreflightReport>(include_str!("golden/preflight_report_lora.json"));
    check::<PreflightReport>(include_str!("golden/preflight_report_published.json"));
    check::<RunConfig>(include_str!("golden/run_config.json"));
    check::<RunConfig>(include_str!("golden/run_config_modules.json"));
    check::<RunConfig>(include_str!("golden/run_config_ranks.json"));
    check::<RunConfig>(include_str!("golden/run_config_paced.json"));
    check::<RunConfig>(include_str!("golden/run_config_continued.json"));
    check::<RunConfig>(include_str!("golden/run_config_from_step.json"));
    check_tolerant::<Progress>(include_str!("golden/progress.json"));
    check_tolerant::<Progress>(include_str!("golden/progress_saved.json"));
    check_tolerant::<RunReport>(include_str!("golden/run_report_succeeded.json"));
    check_tolerant::<RunReport>(include_str!("golden/run_report_succeeded_ranks.json"));
    check_tolerant::<RunReport>(include_str!("golden/run_report_succeeded_early.json"));
    check_tolerant::<RunReport>(include_str!("golden/run_report_failed.json"));
    check_tolerant::<RunReport>(include_str!("golden/run_report_interrupted.json"));
    check_tolerant::<RunReport>(include_str!("golden/run_report_already_published.json"));
    check::<Manifest>(include_str!("golden/manifest.json"));
    check::<Manifest>(include_str!("golden/manifest_inputs.json"));
}

#[test]
fn settings_that_decide_the_result_are_told_from_those_that_do_not() {
    let first: RunConfig = parse(include_str!("golden/run_config.json")).unwrap();
    let differences = |change: &dyn Fn(&mut RunConfig)| {
        let mut second = first.clone();
        change(&mut second);
        settings_differences(&decisive_settings(&first), &decisive_settings(&second)).join("; ")
    };
    // How and where it is computed, and where rows and results lie.
    let same = differences(&|config| {
        config.attempt += 1;
        config.run_id.0 = "another".to_owned();
        config.dataset.train = Some("s3://elsewhere/rows.jsonl".parse().unwrap());
        config.output.uri = "s3://elsewhere/out".parse().unwrap();
        config.output.overwrite = !config.output.overwrite;
        config.training.num_checkpoints_to_keep += 1;
        config.training.micro_batch_size *= 2;
        config.training.gradient_accumulation_steps /= 2;
        config.parallelism.local_world_size += 1;
    });
    assert_eq!(same, "");
    let changed = |change: &dyn Fn(&mut RunConfig)| differences(change);
    insta::assert_snapshot!(changed(&|config| config.training.learning_rate = 0.5), @"training.learningRate (0.0001 there, 0.5 here)");
    insta::assert_snapshot!(changed(&|config| config.model.revision = Some("v2".to_owned())), @r#"model.revision (unset there, "v2" here)"#);
    insta::assert_snapshot!(changed(&|config| config.dataset.rendering.chat_template = Some("chatml".to_owned())), @r#"dataset.rendering (unset there, {"chatTemplate":"chatml"} here)"#);
    insta::assert_snapshot!(changed(&|config| config.lora.as_mut().unwrap().r = 4), @"loraConfig.r (8 there, 4 here)");
    insta::assert_snapshot!(changed(&|config| config.output.merge = !config.output.merge), @"output.merge (false there, true here)");
    insta::assert_snapshot!(changed(&|config| config.training.seed += 1), @"training.seed (42 there, 43 here)");
    insta::assert_snapshot!(changed(&|config| {
        config.dataset.on_overflow = finetune_contract::OnOverflow::Drop;
    }), @r#"dataset.onOverflow ("truncate" there, "drop" here)"#);
    insta::assert_snapshot!(changed(&|config| config.lora = None), @r#"loraConfig.loraAlpha (16.0 there, unset here); loraConfig.loraDropout (0.05 there, unset here); loraConfig.modulesToSave ([] there, unset here); loraConfig.r (8 there, unset here); loraConfig.targetModules ("allLinear" there, unset here); loraConfig.useRslora (false there, unset here)"#);
}

fn digests(manifest: &mut Manifest) -> &mut finetune_contract::InputDigests {
    manifest.inputs.as_mut().unwrap()
}

#[test]
fn a_manifest_says_what_differs_and_what_an_earlier_release_did_not_record() {
    let there: Manifest = parse(include_str!("golden/manifest_inputs.json")).unwrap();
    let compare = |change: &dyn Fn(&mut Manifest)| {
        let mut here = there.clone();
        change(&mut here);
        match there.compare(&here) {
            Comparison::Equal => "equal".to_owned(),
            Comparison::Unknown => "unknown".to_owned(),
            Comparison::Different(differences) => differences.join("; "),
        }
    };
    insta::assert_snapshot!(compare(&|here| here.run_id.0 = "another".to_owned()), @"equal");
    insta::assert_snapshot!(compare(&|here| digests(here).train_sha256 = "1".to_owned()), @"the rows of dataset.train");
    insta::assert_snapshot!(compare(&|here| digests(here).validation_sha256 = None), @"the rows of dataset.validation");
    insta::assert_snapshot!(compare(&|here| digests(here).model_sha256 = "1".to_owned()), @"the files of model.uri");
    insta::assert_snapshot!(compare(&|here| digests(here).initial_sha256 = Some("1".to_owned())), @"what training starts from (initialAdapter or initialCheckpoint)");
    insta::assert_snapshot!(compare(&|here| digests(here).chat_template_sha256 = Some("1".to_owned())), @"the template at dataset.chatTemplate");
    insta::assert_snapshot!(compare(&|here| {
        here.settings.as_mut().unwrap().insert("training.seed".to_owned(), json!(7));
    }), @"training.seed (42 there, 7 here)");
    let before: Manifest = parse(include_str!("golden/manifest.json")).unwrap();
    let mut here = there.clone();
    assert_eq!(before.compare(&here), Comparison::Unknown);
    here.train_sha256 = "mended".to_owned();
    assert!(matches!(before.compare(&here), Comparison::Different(_)));
}
