//! Qwen3: queries and keys normalised per head, and a head width of its own.

use super::{Error, Family, GgufFamily, qwen2};
use crate::architecture::{config::ModelConfig, keys::ConfigKeys};

/// The head width of a config that has no `head_dim`.
const DEFAULT_HEAD_DIM: usize = 128;

/// # Source
/// `transformers/models/qwen3/configuration_qwen3.py`, 5.23.
pub(super) static FAMILY: Family = Family {
    model_type: "qwen3",
    class: "Qwen3ForCausalLM",
    read,
    gguf: Some(GgufFamily { interleaves_heads: false, default_pre_tokenizer: Some("qwen2") }),
};

fn read(keys: &mut ConfigKeys<'_>) -> Result<ModelConfig, Error> {
    let decoder = ModelConfig::decoder(keys, Some(DEFAULT_HEAD_DIM))?;
    let attention_bias = keys.flag("attention_bias", false)?;
    keys.ignore(["mlp_bias"]);
    Ok(ModelConfig {
        qkv_bias: attention_bias,
        o_bias: attention_bias,
        qk_norm: true,
        sliding_window: qwen2::layer_windows(keys, decoder.num_hidden_layers)?,
        ..decoder
    })
}
