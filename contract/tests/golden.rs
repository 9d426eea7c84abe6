//! One document of each kind, as it crosses between releases: read, written, and refused.
//!
//! A change of these files is a change of the contract: it needs another version. A field that is
//! absent where it says nothing new is no change; a file of its own shows it (`…_ranks.json`, `…_paced.json`).
#![allow(missing_docs, clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use finetune_contract::{
    CONTRACT_VERSION, Document, Manifest, ParseDocumentError, PreflightConfig, PreflightReport,
    Progress, RunConfig, RunReport, parse, render,
};
use serde_json::{Value, json};

/// Checks a document: both ways the same, nothing unknown taken, no other version read.
fn check<D: Document + std::fmt::Debug>(text: &str) {
    let golden: Value = serde_json::from_str(text).unwrap();
    let document: D = parse(text).unwrap();
    let written: Value = serde_json::from_str(&render(&document)).unwrap();
    assert_eq!(written, golden, "{}", D::NAME);

    let mut other = golden.clone();
    other["version"] = json!(CONTRACT_VERSION + 1);
    let refused = parse::<D>(&other.to_string()).unwrap_err();
    let found = u64::from(CONTRACT_VERSION) + 1;
    assert_eq!(refused, ParseDocumentError::UnknownVersion { document: D::NAME, found });

    let mut unknown = golden;
    unknown["surprise"] = json!(1);
    let refused = parse::<D>(&unknown.to_string()).unwrap_err().to_string();
    assert!(refused.contains("surprise") && refused.contains(D::NAME), "{refused}");
}

#[test]
fn every_document_is_read_and_written_as_it_was() {
    check::<PreflightConfig>(include_str!("golden/preflight_config.json"));
    check::<PreflightConfig>(include_str!("golden/preflight_config_continued.json"));
    check::<PreflightConfig>(include_str!("golden/preflight_config_from_step.json"));
    check::<PreflightReport>(include_str!("golden/preflight_report.json"));
    check::<RunConfig>(include_str!("golden/run_config.json"));
    check::<RunConfig>(include_str!("golden/run_config_ranks.json"));
    check::<RunConfig>(include_str!("golden/run_config_paced.json"));
    check::<RunConfig>(include_str!("golden/run_config_continued.json"));
    check::<RunConfig>(include_str!("golden/run_config_from_step.json"));
    check::<Progress>(include_str!("golden/progress.json"));
    check::<Progress>(include_str!("golden/progress_saved.json"));
    check::<RunReport>(include_str!("golden/run_report_succeeded.json"));
    check::<RunReport>(include_str!("golden/run_report_succeeded_ranks.json"));
    check::<RunReport>(include_str!("golden/run_report_succeeded_early.json"));
    check::<RunReport>(include_str!("golden/run_report_failed.json"));
    check::<RunReport>(include_str!("golden/run_report_interrupted.json"));
    check::<Manifest>(include_str!("golden/manifest.json"));
}
