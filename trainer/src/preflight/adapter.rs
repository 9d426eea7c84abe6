//! Checks the initial adapter without loading its weights.

use finetune_contract::{LoraSettings, ObjectUri, ProblemReason};

use crate::{
    architecture::config::ModelConfig,
    lora::{CONFIG_FILE, WEIGHTS_FILE, config, weights::PublishedAdapter},
    model::adapter::differences,
    preflight::{
        findings::{Findings, open},
        weights::read_header,
    },
    store::{self, Environment, Role, Store},
};

const LOCATION: &str = "spec.initialAdapter.uri";

/// Checks that the adapter at `uri` is complete and has the requested shape.
pub(super) fn check(
    uri: &ObjectUri,
    lora: &LoraSettings,
    model: &ModelConfig,
    environment: &Environment,
    findings: &mut Findings,
) {
    let Some(store) = open(uri, None, Role::Adapter, environment, LOCATION, findings) else {
        return;
    };
    match read(&store) {
        Err(error) => findings.add_store_error(LOCATION, &error),
        Ok(None) => {
            let message = format!(
                "{uri} lacks {CONFIG_FILE} or {WEIGHTS_FILE}: give the directory of a LoRA adapter (of a merged result its subdirectory adapter/); to continue from a full-parameter result, set it as model.uri"
            );
            findings.add_problem(ProblemReason::NotFound, LOCATION, message);
        }
        Ok(Some((settings, size))) => {
            compare(&store, &settings, size, lora, model, findings);
        }
    }
}

/// Reads the settings and the size of the weights; `None` if a file is missing.
fn read(store: &Store) -> Result<Option<(String, u64)>, store::Error> {
    let (Some(_), Some(size)) = (store.size(CONFIG_FILE)?, store.size(WEIGHTS_FILE)?) else {
        return Ok(None);
    };
    let text = store.read(CONFIG_FILE)?;
    Ok(Some((String::from_utf8_lossy(&text).into_owned(), size)))
}

fn compare(
    store: &Store,
    settings: &str,
    size: u64,
    lora: &LoraSettings,
    model: &ModelConfig,
    findings: &mut Findings,
) {
    let invalid = ProblemReason::InvalidModel;
    let location = |file: &str| store.uri().join(file).to_string();
    let settings = match config::parse(settings) {
        Ok(settings) => settings,
        Err(reason) => return findings.add_problem(invalid, &location(CONFIG_FILE), reason),
    };
    let tensors = match read_header(store, WEIGHTS_FILE, size) {
        Ok(tensors) => tensors,
        Err((reason, message)) => {
            return findings.add_problem(reason, &location(WEIGHTS_FILE), message);
        }
    };
    let published = match PublishedAdapter::new(model, &settings, &tensors) {
        Ok(published) => published,
        Err(error) => return findings.add_problem(invalid, LOCATION, error.to_string()),
    };
    // Errors in the requested settings are already reported.
    let found = differences(model, lora, &settings.lora, &published.adapters);
    for (field, message) in found.unwrap_or_default() {
        findings.add_problem(
            ProblemReason::InvalidSpec,
            &format!("spec.loraConfig.{field}"),
            message,
        );
    }
}
