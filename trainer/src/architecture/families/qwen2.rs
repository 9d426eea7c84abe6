//! Qwen2 and Qwen2.5: biases on queries, keys and values, and windows in the upper blocks.

use super::{Error, Family, GgufFamily};
use crate::architecture::{
    config::ModelConfig,
    keys::{ConfigKeys, invalid},
};

/// # Source
/// `transformers/models/qwen2/configuration_qwen2.py`, 5.23.
pub(super) static FAMILY: Family = Family {
    model_type: "qwen2",
    class: "Qwen2ForCausalLM",
    read,
    gguf: Some(GgufFamily { interleaves_heads: false, default_pre_tokenizer: Some("qwen2") }),
};

fn read(keys: &mut ConfigKeys<'_>) -> Result<ModelConfig, Error> {
    let decoder = ModelConfig::decoder(keys, None)?;
    keys.ignore(["attention_bias", "mlp_bias"]);
    Ok(ModelConfig {
        qkv_bias: true,
        sliding_window: layer_windows(keys, decoder.num_hidden_layers)?,
        ..decoder
    })
}

/// Reads the attention window of each block: with `use_sliding_window`, from `max_window_layers` on.
pub(super) fn layer_windows(
    keys: &mut ConfigKeys<'_>,
    layers: usize,
) -> Result<Vec<Option<usize>>, Error> {
    let window = keys.window(None)?;
    let uses_window = keys.flag("use_sliding_window", false)?;
    let first = match keys.get("max_window_layers") {
        Some(value) => value
            .as_u64()
            .ok_or_else(|| invalid("max_window_layers", value, "it must be a whole number"))?,
        None => 28,
    };
    let default = |layer: usize| window.filter(|_| uses_window && layer as u64 >= first);
    keys.layer_windows(layers, window, default)
}
