//! Mistral 7B and its successors with the same network.

use super::{Error, Family};
use crate::architecture::{config::ModelConfig, keys::ConfigKeys};

/// The window of a config that has no `sliding_window`; null means none.
const DEFAULT_WINDOW: usize = 4096;

/// # Source
/// `transformers/models/mistral/configuration_mistral.py`, 5.23.
pub(super) static FAMILY: Family =
    Family { model_type: "mistral", class: "MistralForCausalLM", read, gguf: None };

fn read(keys: &mut ConfigKeys<'_>) -> Result<ModelConfig, Error> {
    let decoder = ModelConfig::decoder(keys, None)?;
    let window = keys.window(Some(DEFAULT_WINDOW))?;
    keys.ignore(["attention_bias", "mlp_bias", "use_sliding_window", "max_window_layers"]);
    Ok(ModelConfig {
        sliding_window: keys.layer_windows(decoder.num_hidden_layers, window, |_| window)?,
        ..decoder
    })
}
