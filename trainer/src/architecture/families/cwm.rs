//! Code World Model: a Llama whose blocks have a sliding window, except for every fourth.

use super::{Error, Family};
use crate::architecture::{
    config::ModelConfig,
    keys::ConfigKeys,
    rope::{Rope, RopeScaling},
};

/// The head width of a config that has no `head_dim`.
const DEFAULT_HEAD_DIM: usize = 128;
/// The window of a config that has no `sliding_window`; null means none.
const DEFAULT_WINDOW: usize = 8192;
/// Without `layer_types`, the blocks whose index is a multiple of this attend to everything.
const WINDOW_PATTERN: usize = 4;

/// # Source
/// `transformers/models/cwm/configuration_cwm.py`, 5.23.
pub(super) static FAMILY: Family =
    Family { model_type: "cwm", class: "CwmForCausalLM", read, gguf: None };

fn read(keys: &mut ConfigKeys<'_>) -> Result<ModelConfig, Error> {
    let mut decoder = ModelConfig::decoder(keys, Some(DEFAULT_HEAD_DIM))?;
    if keys.get("rope_parameters").or_else(|| keys.get("rope_scaling")).is_none() {
        decoder.rope = Rope {
            theta: 1_000_000.0,
            scaling: RopeScaling::Llama3 {
                factor: 16.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max_position_embeddings: 8192.0,
            },
        };
    }
    let window = keys.window(Some(DEFAULT_WINDOW))?;
    let default = |layer: usize| window.filter(|_| !layer.is_multiple_of(WINDOW_PATTERN));
    Ok(ModelConfig {
        rms_norm_eps: keys.number("rms_norm_eps", Some(1e-5))?,
        mlp_bias: keys.flag("mlp_bias", false)?,
        sliding_window: keys.layer_windows(decoder.num_hidden_layers, window, default)?,
        ..decoder
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absent_keys_mean_what_they_mean_in_transformers() {
        let config = ModelConfig::parse(
            r#"{"model_type": "cwm", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100}"#,
        )
        .unwrap();
        let window = Some(DEFAULT_WINDOW);
        assert_eq!(config.sliding_window, [None, window, window, window, None]);
        assert_eq!((config.head_dim, config.rms_norm_eps), (128, 1e-5));
        assert!(matches!(config.rope.scaling, RopeScaling::Llama3 { factor: 16.0, .. }));
    }
}
