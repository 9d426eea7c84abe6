//! The model families: one file each, from `config.json` to what the network is built from.
//!
//! A family sets what distinguishes it from the plain decoder of `ModelConfig::decoder`, and says
//! how its GGUF files deviate from its Hugging Face files.

mod cwm;
mod llama;
mod mistral;
mod qwen2;
mod qwen3;

use super::{
    config::{Error, ModelConfig},
    keys::ConfigKeys,
};

/// Every family this trainer knows.
pub const FAMILIES: [&Family; 5] =
    [&llama::FAMILY, &mistral::FAMILY, &qwen2::FAMILY, &qwen3::FAMILY, &cwm::FAMILY];

/// A model family.
#[derive(Debug)]
pub struct Family {
    /// `model_type` in `config.json`.
    pub model_type: &'static str,
    /// The transformers class that loads it.
    pub class: &'static str,
    /// Reads the family's `config.json`.
    pub(super) read: fn(&mut ConfigKeys<'_>) -> Result<ModelConfig, Error>,
    /// How its GGUF files are read; `None` if llama.cpp has no architecture of this name.
    pub gguf: Option<GgufFamily>,
}

/// What the GGUF files of a family have of their own; their `general.architecture` is the
/// `model_type`.
#[derive(Debug)]
pub struct GgufFamily {
    /// Whether llama.cpp stores the rows of `q_proj` and `k_proj` with each head's two halves
    /// interleaved, because it rotates neighbours.
    pub interleaves_heads: bool,
    /// The pre-tokenizer of files that do not name one.
    pub default_pre_tokenizer: Option<&'static str>,
}

impl Family {
    /// Finds the family of a `model_type`.
    pub fn of_model_type(model_type: &str) -> Option<&'static Self> {
        FAMILIES.into_iter().find(|family| family.model_type == model_type)
    }
}

impl GgufFamily {
    /// Finds what is special about the GGUF files of an architecture; `None` if there are none.
    pub fn of_architecture(architecture: &str) -> Option<&'static Self> {
        Family::of_model_type(architecture)?.gguf.as_ref()
    }
}

/// Lists the families' names.
pub fn names() -> Vec<&'static str> {
    FAMILIES.iter().map(|family| family.model_type).collect()
}
