//! Hugging Face model directories: `config.json`, safetensors files and tokens added to a base model.

pub mod extension;
pub mod safetensors_header;
pub mod safetensors_writer;
pub mod tying;
pub mod weights;

use std::path::Path;

use finetune_contract::FailureReason;

use crate::{architecture::ModelConfig, failure::Failure};

/// Reads the config of a model directory. `tie_word_embeddings` follows the weights where they
/// contradict `config.json`.
///
/// # Errors
/// A [`Failure`] of reason `InvalidModel`.
pub fn read_config(directory: &Path) -> Result<ModelConfig, Failure> {
    let path = directory.join("config.json");
    let text = std::fs::read_to_string(&path).map_err(|error| {
        Failure::new(FailureReason::InvalidModel, format!("cannot read {path:?}: {error}"))
    })?;
    let config = ModelConfig::parse(&text)
        .map_err(|error| Failure::from_chain(FailureReason::InvalidModel, &error))?;
    tying::resolve(config, directory)
        .map_err(|error| Failure::from_chain(FailureReason::InvalidModel, &error))
}
