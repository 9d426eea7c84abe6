//! Llama 1 to 3 and everything that calls itself `llama`, such as SmolLM2 and TinyLlama.

use super::{Error, Family, GgufFamily};
use crate::architecture::{config::ModelConfig, keys::ConfigKeys};

/// # Source
/// `transformers/models/llama/configuration_llama.py`, 5.23.
pub(super) static FAMILY: Family = Family {
    model_type: "llama",
    class: "LlamaForCausalLM",
    read,
    gguf: Some(GgufFamily { interleaves_heads: true, default_pre_tokenizer: None }),
};

fn read(keys: &mut ConfigKeys<'_>) -> Result<ModelConfig, Error> {
    let decoder = ModelConfig::decoder(keys, None)?;
    let attention_bias = keys.flag("attention_bias", false)?;
    let window = keys.window(None)?;
    keys.ignore(["use_sliding_window", "max_window_layers"]);
    Ok(ModelConfig {
        qkv_bias: attention_bias,
        o_bias: attention_bias,
        mlp_bias: keys.flag("mlp_bias", false)?,
        sliding_window: keys.layer_windows(decoder.num_hidden_layers, window, |_| None)?,
        ..decoder
    })
}
