//! Decides whether the output head of a model is tied to its embedding. Where the weights contradict
//! the config, the weights win.
//!
//! # Source
//! `PreTrainedModel.tie_weights` of `transformers/modeling_utils.py`, 5.23: where embedding and head are
//! both in the weights and differ, they are not tied, whatever `config.json` says.

use std::path::Path;

use tracing::warn;

use crate::{
    architecture::{
        config::ModelConfig,
        names::{EMBEDDING_WEIGHT, HEAD_WEIGHT},
    },
    hf::weights::{Error, WeightFiles},
};

/// The warning about a head that differs from the embedding although the config ties them.
pub const UNTIED_HEAD_WARNING: &str = "config.json says tie_word_embeddings: true, but the weights have an lm_head.weight that differs from model.embed_tokens.weight: the head of the weights is used, as transformers 5 does, and a published model says tie_word_embeddings: false";

/// Returns whether head and embedding must be compared: the config ties them, but the weights have
/// both.
pub fn needs_comparison(config: &ModelConfig, has_tensor: impl Fn(&str) -> bool) -> bool {
    config.tie_word_embeddings && has_tensor(HEAD_WEIGHT) && has_tensor(EMBEDDING_WEIGHT)
}

/// Returns the config with the head untied from the embedding.
#[must_use]
pub fn untied(mut config: ModelConfig) -> ModelConfig {
    config.tie_word_embeddings = false;
    config.source.insert("tie_word_embeddings".to_owned(), false.into());
    config
}

/// Returns the config with the `tie_word_embeddings` that the weights of the directory imply.
///
/// # Errors
/// [`Error`] if the weights cannot be read.
pub fn resolve(config: ModelConfig, directory: &Path) -> Result<ModelConfig, Error> {
    if !config.tie_word_embeddings {
        return Ok(config);
    }
    let weights = WeightFiles::open(directory)?;
    if !needs_comparison(&config, |name| weights.contains(name))
        || weights.are_equal(EMBEDDING_WEIGHT, HEAD_WEIGHT)
    {
        return Ok(config);
    }
    warn!("{UNTIED_HEAD_WARNING}");
    Ok(untied(config))
}
