//! The network: a Llama-like decoder whose blocks carry hand-written backward passes.
//!
//! Letters in shapes, everywhere in this module: `T` tokens of a micro-batch, flat, without
//! padding; `D` model width, `H` query heads, `K` key/value heads, `E` head width, `F` feed-forward
//! width, `V` vocabulary, `R` LoRA rank.
//!
//! Parameters are addressed by checkpoint name only (`model.layers.3.self_attn.q_proj.weight`).
//! No tensor here records a graph: each layer's `backward` is written out beside its `forward` and
//! proved against autograd in `tests/`.

pub mod adapter;
pub mod adapter_config;
pub mod adapter_weights;
pub mod attach;
pub mod attention;
pub mod block;
pub mod buckets;
pub mod config;
pub mod dropout;
pub mod embedding;
pub mod head;
pub mod header;
pub mod layout;
pub mod linear;
pub mod masters;
pub mod modules;
pub mod names;
pub mod network;
pub mod norm;
pub mod params;
pub mod rope;
pub mod sharded;
pub mod targets;
pub mod tying;
pub mod weights;

use std::path::Path;

use finetune_contract::FailureReason;

use self::config::ModelConfig;
use crate::failure::Failure;

pub use network::{Division, Model};

/// Reads a model directory's config; where the weights have a head that is not the embedding, it says so.
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
    tying::settle(config, directory)
        .map_err(|error| Failure::from_chain(FailureReason::InvalidModel, &error))
}
