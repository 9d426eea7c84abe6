//! Whether a model's output head is its embedding: what the weights say where they contradict the config.
//!
//! # Source
//! `PreTrainedModel.tie_weights` of `transformers/modeling_utils.py`, 5.23: where embedding and head are
//! both in the checkpoint and differ, they are not tied, whatever the config says.

use std::path::Path;

use tracing::warn;

use crate::{
    architecture::{
        config::ModelConfig,
        names::{EMBEDDING_WEIGHT, HEAD_WEIGHT},
    },
    hf::weights::{Checkpoint, Error},
};

/// What is said of a head that differs from the embedding it should be.
pub const OWN_HEAD: &str = "config.json says tie_word_embeddings: true, but the weights have an lm_head.weight that differs from model.embed_tokens.weight: the head of the weights is used, as transformers 5 does, and a published model says tie_word_embeddings: false";

/// Tells whether the weights have to be compared: the config ties what the weights have twice.
pub fn is_doubtful(config: &ModelConfig, has_tensor: impl Fn(&str) -> bool) -> bool {
    config.tie_word_embeddings && has_tensor(HEAD_WEIGHT) && has_tensor(EMBEDDING_WEIGHT)
}

/// Returns the config of a model whose head is a tensor of its own.
#[must_use]
pub fn untied(mut config: ModelConfig) -> ModelConfig {
    config.tie_word_embeddings = false;
    config.source.insert("tie_word_embeddings".to_owned(), false.into());
    config
}

/// Returns the config with `tie_word_embeddings` as the weights of the directory have it.
///
/// # Errors
/// [`Error`] if the weights cannot be read.
pub fn settle(config: ModelConfig, directory: &Path) -> Result<ModelConfig, Error> {
    if !config.tie_word_embeddings {
        return Ok(config);
    }
    let checkpoint = Checkpoint::open(directory)?;
    if !is_doubtful(&config, |name| checkpoint.contains(name))
        || checkpoint.are_equal(EMBEDDING_WEIGHT, HEAD_WEIGHT)
    {
        return Ok(config);
    }
    warn!("{OWN_HEAD}");
    Ok(untied(config))
}
