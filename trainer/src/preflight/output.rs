//! Checks that the result can be written, and compares it with what the output already contains.

use finetune_contract::{
    DatasetCensus, OutputState, PreflightConfig, ProblemReason, PublishedResult, settings_text,
};

use crate::{
    failure::Failure,
    inputs,
    preflight::findings::{Findings, open},
    store::{
        self, Environment, Role, Store,
        publish::{self, OutputContents, Published},
        sha256_hex,
    },
};

/// The manifest field of the output.
const LOCATION: &str = "spec.output.uri";

/// Checks that the output can be written and returns its state.
pub(super) fn check(
    config: &PreflightConfig,
    rows: Option<(&DatasetCensus, Option<&DatasetCensus>)>,
    environment: &Environment,
    findings: &mut Findings,
) -> (Option<OutputState>, Option<PublishedResult>) {
    let overlaps = inputs::overlaps(config);
    if !overlaps.is_empty() {
        // Do not even test whether the output can be written.
        for message in overlaps {
            findings.add_problem(ProblemReason::InvalidSpec, LOCATION, message);
        }
        return (None, None);
    }
    let opened = open(&config.output.uri, None, Role::Output, environment, LOCATION, findings);
    let Some(store) = opened else { return (None, None) };
    if let Err(error) = store.check_writable() {
        findings.add_store_error(LOCATION, &error);
        return (None, None);
    }
    match compare_output(config, &store, rows, environment) {
        Err(failure) => {
            findings.add_failure(LOCATION, &failure);
            (None, None)
        }
        Ok(OutputContents::Vacant) => (Some(OutputState::Vacant), None),
        Ok(OutputContents::SameInputs(published)) => {
            let result = result(*published);
            (Some(OutputState::SameInputs), result)
        }
        Ok(OutputContents::OtherInputs(contents)) => {
            if !config.output.overwrite {
                let uri = config.output.uri.to_string();
                findings.add_store_error(LOCATION, &store::Error::OutputExists { uri, contents });
            }
            (Some(OutputState::OtherInputs), None)
        }
    }
}

/// Compares a published result at the output with the inputs of this run.
fn compare_output(
    config: &PreflightConfig,
    store: &Store,
    rows: Option<(&DatasetCensus, Option<&DatasetCensus>)>,
    environment: &Environment,
) -> Result<OutputContents, Failure> {
    // Without rows there is nothing to compare, and their absence is already reported. Without a
    // published result the inputs need not be read.
    let (Some((train, validation)), true) = (rows, publish::has_manifest(store)?) else {
        return Ok(OutputContents::Vacant);
    };
    let validation = validation.map(|census| census.sha256.as_str());
    let planned = inputs::digests(config.into(), &train.sha256, validation, environment)?;
    Ok(publish::inspect_by_inputs(store, &planned)?)
}

fn result(published: Published) -> Option<PublishedResult> {
    let Published { manifest, manifest_sha256 } = published;
    Some(PublishedResult {
        run_id: manifest.run_id,
        kind: manifest.kind,
        manifest_sha256,
        settings_sha256: sha256_hex(settings_text(&manifest.settings?).as_bytes()),
        step: manifest.step,
    })
}
