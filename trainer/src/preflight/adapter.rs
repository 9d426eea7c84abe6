//! The adapter that training starts from, checked without loading its weights.

use std::collections::BTreeMap;

use finetune_contract::{LoraSettings, ProblemReason};

use super::{Findings, model::read_header, open};
use crate::{
    model::{
        adapter::{CONFIG_FILE, PREFIX, WEIGHTS_FILE, differences, parse_settings},
        attach::Attachment,
        config::ModelConfig,
        header::TensorEntry,
    },
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
    let published = match parse_settings(settings) {
        Ok(published) => published,
        Err(reason) => {
            let location = store.uri().join(CONFIG_FILE).to_string();
            return findings.problem(invalid, &location, reason);
        }
    };
    let attachment = match Attachment::lora(model, &published) {
        Ok(attachment) => attachment,
        Err(error) => {
            let message = format!("the adapter does not fit the base model: {error}");
            return findings.problem(invalid, LOCATION, message);
        }
    };
    // What is wrong with the settings asked for is already said.
    let found = differences(model, lora, &published).unwrap_or_default();
    for (field, message) in &found {
        let location = format!("spec.loraConfig.{field}");
        findings.problem(ProblemReason::InvalidSpec, &location, message.as_str());
    }
    if !found.is_empty() {
        return;
    }
    match read_header(store, WEIGHTS_FILE, size) {
        Ok(tensors) => compare(&tensors, &attachment, model, findings),
        Err((reason, message)) => {
            let location = store.uri().join(WEIGHTS_FILE).to_string();
            findings.problem(reason, &location, message);
        }
    }
}

fn compare(
    tensors: &BTreeMap<String, TensorEntry>,
    attachment: &Attachment,
    model: &ModelConfig,
    findings: &mut Findings,
) {
    for expected in attachment.trained(model) {
        let name = format!("{PREFIX}{}", expected.name);
        let message = match tensors.get(&name) {
            None => format!("its weights lack {name}: the adapter is of another model, or damaged"),
            Some(found) if found.shape != expected.shape => format!(
                "{name} is {:?}, not {:?}: the adapter is of another model",
                found.shape, expected.shape
            ),
            Some(_) => continue,
        };
        // One says it; the others are like it.
        return findings.problem(ProblemReason::InvalidModel, LOCATION, message);
    }
}
