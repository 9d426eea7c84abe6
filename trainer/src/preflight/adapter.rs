//! The adapter that training starts from, checked without loading its weights.

use finetune_contract::{LoraSettings, ProblemReason};

use crate::{
    architecture::config::ModelConfig,
    lora::{CONFIG_FILE, WEIGHTS_FILE, config, weights::PublishedAdapter},
    model::adapter::differences,
    preflight::{Findings, open, weights::read_header},
    store::{self, Environment, Role, Store},
};

const LOCATION: &str = "spec.initialAdapter.uri";

/// Checks that the adapter at `uri` is complete and of the shape asked for.
pub(super) fn check(
    uri: &str,
    lora: &LoraSettings,
    model: &ModelConfig,
    environment: &Environment,
    findings: &mut Findings,
) {
    let Some(store) = open(uri, None, Role::Adapter, environment, LOCATION, findings) else {
        return;
    };
    match read(&store) {
        Err(error) => findings.store_problem(LOCATION, &error),
        Ok(None) => {
            let message = format!(
                "{uri} has no {CONFIG_FILE} and {WEIGHTS_FILE}: name the directory of a LoRA adapter, which of a merged result is adapter/ below it; a full-parameter result is gone on from by naming it as model.uri"
            );
            findings.problem(ProblemReason::NotFound, LOCATION, message);
        }
        Ok(Some((settings, size))) => {
            judge(&store, &settings, size, lora, model, findings);
        }
    }
}

/// Reads the settings and the size of the weights; none if one is not there.
fn read(store: &Store) -> Result<Option<(String, u64)>, store::Error> {
    let (Some(_), Some(size)) = (store.size(CONFIG_FILE)?, store.size(WEIGHTS_FILE)?) else {
        return Ok(None);
    };
    let text = store.read(CONFIG_FILE)?;
    Ok(Some((String::from_utf8_lossy(&text).into_owned(), size)))
}

fn judge(
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
        Err(reason) => return findings.problem(invalid, &location(CONFIG_FILE), reason),
    };
    let tensors = match read_header(store, WEIGHTS_FILE, size) {
        Ok(tensors) => tensors,
        Err((reason, message)) => {
            return findings.problem(reason, &location(WEIGHTS_FILE), message);
        }
    };
    let published = match PublishedAdapter::new(model, &settings, &tensors) {
        Ok(published) => published,
        Err(error) => return findings.problem(invalid, LOCATION, error.to_string()),
    };
    // What is wrong with the settings asked for is already said.
    let found = differences(model, lora, &settings.lora, &published.adapters);
    for (field, message) in found.unwrap_or_default() {
        findings.problem(ProblemReason::InvalidSpec, &format!("spec.loraConfig.{field}"), message);
    }
}
