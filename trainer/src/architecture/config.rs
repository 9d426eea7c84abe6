//! A model's `config.json`, read strictly: every key is understood, harmless by name, or refused.
//!
//! Both spellings are read: transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and
//! transformers 5 (`rope_parameters`, `dtype`). What was read is kept in [`ModelConfig::source`], so
//! that export writes back the file it was given.

use serde_json::{Map, Value};

use super::{
    families::{self, Family},
    keys::{ConfigKeys, invalid},
    rope::Rope,
};

/// Why a `config.json` cannot be trained on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The text is no JSON object.
    #[error("config.json is not a JSON object: {reason}")]
    NotAnObject {
        /// What the JSON reader said.
        reason: String,
    },
    /// The architecture is another one.
    #[error(
        "config.json says model_type {found:?}, which this trainer does not know: use a model of type {}",
        families::names().join(", ")
    )]
    UnknownModelType {
        /// The `model_type`, or nothing.
        found: String,
    },
    /// A key the trainer would have to obey but does not know.
    #[error(
        "config.json has {key} = {value}, which this trainer does not know for model_type {model_type:?}: \
         training could silently compute another model, so it is refused"
    )]
    UnknownKey {
        /// The key.
        key: String,
        /// Its value as JSON.
        value: String,
        /// The architecture.
        model_type: String,
    },
    /// A key without which the shape is unknown.
    #[error("config.json lacks {key}")]
    MissingKey {
        /// The key.
        key: &'static str,
    },
    /// A value that cannot be.
    #[error("config.json has {key} = {value}: {allowed}")]
    InvalidValue {
        /// The key.
        key: String,
        /// Its value as JSON.
        value: String,
        /// What it may be.
        allowed: String,
    },
}

/// The shape and switches of a Llama-like decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The family's name, as in [`super::families::FAMILIES`].
    pub model_type: String,
    /// `V`, rows of the embedding.
    pub vocab_size: usize,
    /// `D`, model width.
    pub hidden_size: usize,
    /// `F`, feed-forward width.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// `H`, query heads.
    pub num_attention_heads: usize,
    /// `K`, key/value heads.
    pub num_key_value_heads: usize,
    /// `E`, width of one head.
    pub head_dim: usize,
    /// The norms' epsilon.
    pub rms_norm_eps: f64,
    /// Rotary embedding.
    pub rope: Rope,
    /// Longest position the model was made for.
    pub max_position_embeddings: usize,
    /// Whether the output head is the embedding.
    pub tie_word_embeddings: bool,
    /// Whether `q_proj`, `k_proj` and `v_proj` have a bias.
    pub qkv_bias: bool,
    /// Whether `o_proj` has a bias.
    pub o_bias: bool,
    /// Whether the feed-forward layers have biases.
    pub mlp_bias: bool,
    /// Whether queries and keys are normalised per head before the rotation.
    pub qk_norm: bool,
    /// For each block, how many positions back a query may look; `None` means all.
    pub sliding_window: Vec<Option<usize>>,
    /// The file as read.
    pub source: Map<String, Value>,
}

impl ModelConfig {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// [`Error`] for an unknown family, a key that would change the network in an unknown way, or an
    /// impossible shape.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let source = match serde_json::from_str(text) {
            Ok(Value::Object(object)) => object,
            Ok(other) => {
                return Err(Error::NotAnObject { reason: format!("it is {}", kind_of(&other)) });
            }
            Err(error) => return Err(Error::NotAnObject { reason: error.to_string() }),
        };
        let model_type = source.get("model_type").and_then(Value::as_str).unwrap_or_default();
        let family = Family::of_model_type(model_type)
            .ok_or_else(|| Error::UnknownModelType { found: model_type.to_owned() })?;
        let mut keys = ConfigKeys::new(&source);
        let config = (family.read)(&mut keys)?;
        keys.refuse_unread(family.model_type)?;
        Ok(Self { model_type: family.model_type.to_owned(), source, ..config })
    }

    /// Reads what all families share: a Llama-like decoder without biases, query and key norms or
    /// attention windows, which the family's own reader adds.
    pub(super) fn decoder(
        keys: &mut ConfigKeys<'_>,
        default_head_dim: Option<usize>,
    ) -> Result<Self, Error> {
        let hidden_size = keys.size("hidden_size", None)?;
        let num_hidden_layers = keys.size("num_hidden_layers", None)?;
        let num_attention_heads = keys.size("num_attention_heads", None)?;
        let num_key_value_heads = keys.size("num_key_value_heads", Some(num_attention_heads))?;
        let default_head_dim = default_head_dim.unwrap_or(hidden_size / num_attention_heads);
        let head_dim = keys.size("head_dim", Some(default_head_dim))?;
        if num_attention_heads % num_key_value_heads != 0 {
            return Err(invalid(
                "num_key_value_heads",
                &num_key_value_heads.into(),
                format!("it must divide num_attention_heads = {num_attention_heads}"),
            ));
        }
        if head_dim % 2 != 0 {
            let allowed = "it must be even for rotary embedding";
            return Err(invalid("head_dim", &head_dim.into(), allowed));
        }
        match keys.text("hidden_act", "silu")? {
            "silu" | "swish" => {}
            other => {
                return Err(invalid("hidden_act", &other.into(), "this trainer knows only silu"));
            }
        }
        let dropout = keys.number("attention_dropout", Some(0.0))?;
        if dropout != 0.0 {
            return Err(invalid("attention_dropout", &dropout.into(), "this trainer knows only 0"));
        }
        Ok(Self {
            model_type: String::new(),
            vocab_size: keys.size("vocab_size", None)?,
            hidden_size,
            intermediate_size: keys.size("intermediate_size", None)?,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            rms_norm_eps: keys.number("rms_norm_eps", Some(1e-6))?,
            rope: keys.rope()?,
            max_position_embeddings: keys.size("max_position_embeddings", Some(2048))?,
            tie_word_embeddings: keys.flag("tie_word_embeddings", false)?,
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            qk_norm: false,
            sliding_window: vec![None; num_hidden_layers],
            source: Map::new(),
        })
    }

    /// Returns the query heads that share one key/value head.
    pub fn query_groups(&self) -> usize {
        self.num_attention_heads / self.num_key_value_heads
    }

    /// Lists the linear layers of one block as (path below the block, out, in, bias).
    pub fn block_linears(&self) -> [(&'static str, usize, usize, bool); 7] {
        let queries = self.num_attention_heads * self.head_dim;
        let keys = self.num_key_value_heads * self.head_dim;
        let (width, ffn) = (self.hidden_size, self.intermediate_size);
        [
            ("self_attn.q_proj", queries, width, self.qkv_bias),
            ("self_attn.k_proj", keys, width, self.qkv_bias),
            ("self_attn.v_proj", keys, width, self.qkv_bias),
            ("self_attn.o_proj", width, queries, self.o_bias),
            ("mlp.gate_proj", ffn, width, self.mlp_bias),
            ("mlp.up_proj", ffn, width, self.mlp_bias),
            ("mlp.down_proj", width, ffn, self.mlp_bias),
        ]
    }

    /// Lists the norms of one block as (path below the block, width).
    pub fn block_norms(&self) -> Vec<(&'static str, usize)> {
        let mut norms = vec![
            ("input_layernorm", self.hidden_size),
            ("post_attention_layernorm", self.hidden_size),
        ];
        if self.qk_norm {
            norms
                .extend([("self_attn.q_norm", self.head_dim), ("self_attn.k_norm", self.head_dim)]);
        }
        norms
    }
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::architecture::rope::RopeScaling;

    const TINY: &str = r#""hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100"#;

    fn parse(rest: &str) -> Result<ModelConfig, Error> {
        ModelConfig::parse(&format!("{{{TINY}, {rest}}}"))
    }

    fn refusal(rest: &str) -> String {
        parse(rest).unwrap_err().to_string()
    }

    #[test]
    fn reads_rope_in_both_spellings() {
        let old = parse(
            r#""model_type": "llama", "rope_theta": 500000.0, "rope_scaling": {"type": "linear", "factor": 4.0}"#,
        );
        let new = parse(
            r#""model_type": "llama", "rope_parameters": {"rope_theta": 500000.0, "rope_type": "linear", "factor": 4.0}"#,
        );
        let expected = Rope { theta: 500_000.0, scaling: RopeScaling::Linear { factor: 4.0 } };
        assert_eq!(old.unwrap().rope, expected);
        assert_eq!(new.unwrap().rope, expected);
    }

    #[test]
    fn reads_yarn_with_the_defaults_of_transformers() {
        let scaling = |rest: &str| {
            let text = format!(
                r#""model_type": "qwen2", "max_position_embeddings": 32768, "rope_scaling": {{{rest}}}"#
            );
            parse(&text).unwrap().rope.scaling
        };
        let yarn = |factor: f64, original: f64, attention_factor: f64| RopeScaling::Yarn {
            factor,
            original_max_position_embeddings: original,
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate: true,
            attention_factor,
        };
        let usual = 0.1 * 4_f64.ln() + 1.0;
        assert_eq!(scaling(r#""type": "yarn", "factor": 4.0"#), yarn(4.0, 32768.0, usual));
        let original =
            r#""rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 8192"#;
        assert_eq!(scaling(&format!("{original}, \"finetuned\": true")), yarn(4.0, 8192.0, usual));
        assert_eq!(
            scaling(&format!("{original}, \"attention_factor\": 0.5")),
            yarn(4.0, 8192.0, 0.5)
        );
        let ratio = (0.1 * 4_f64.ln() + 1.0) / (0.2 * 4_f64.ln() + 1.0);
        let mscales = format!("{original}, \"mscale\": 1.0, \"mscale_all_dim\": 2.0");
        assert_eq!(scaling(&mscales), yarn(4.0, 8192.0, ratio));
        let by_ratio =
            r#""type": "yarn", "factor": null, "original_max_position_embeddings": 8192"#;
        assert_eq!(scaling(by_ratio), yarn(4.0, 8192.0, usual));
        let dynamic = r#""type": "dynamic", "factor": 2.0"#;
        assert_eq!(scaling(dynamic), RopeScaling::Dynamic { factor: 2.0 });
    }

    #[test]
    fn settings_of_generation_and_of_old_releases_are_harmless() {
        for rest in [
            r#""max_sequence_length": 2048, "temperature": 1.0, "top_p": 1.0, "do_sample": true, "num_beams": 1"#,
            r#""max_length": 4096, "repetition_penalty": 1.1, "top_k": 50, "bad_words_ids": [[1]]"#,
            r#""torchscript": true, "is_decoder": true, "sep_token_id": 3, "finetuning_task": "chat""#,
        ] {
            assert!(parse(&format!(r#""model_type": "llama", {rest}"#)).is_ok(), "{rest}");
        }
    }

    #[test]
    fn an_absent_mistral_window_is_not_a_null_one() {
        assert_eq!(parse(r#""model_type": "mistral""#).unwrap().sliding_window, [Some(4096); 2]);
        assert_eq!(
            parse(r#""model_type": "mistral", "sliding_window": null"#).unwrap().sliding_window,
            [None; 2]
        );
    }

    #[test]
    fn family_switches_follow_transformers() {
        let qwen2 = parse(r#""model_type": "qwen2", "sliding_window": 8, "use_sliding_window": true, "max_window_layers": 1"#).unwrap();
        assert_eq!((qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm), (true, false, false));
        assert_eq!(qwen2.sliding_window, [None, Some(8)]);
        let qwen3 = parse(r#""model_type": "qwen3""#).unwrap();
        assert_eq!((qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim), (false, true, 128));
    }

    #[test]
    fn counts_parameters_and_tensors_alike() {
        let config =
            parse(r#""model_type": "llama", "attention_bias": true, "mlp_bias": true"#).unwrap();
        let elements: usize =
            config.tensors().iter().map(|tensor| tensor.shape.iter().product::<usize>()).sum();
        assert_eq!(config.parameters(), elements as u64);
    }

    #[test]
    fn refuses_what_it_does_not_know() {
        let unknown = refusal(r#""model_type": "gpt2""#);
        assert_eq!(
            unknown,
            format!(
                r#"config.json says model_type "gpt2", which this trainer does not know: use a model of type {}"#,
                families::names().join(", ")
            )
        );
        assert!(unknown.contains("llama, mistral, qwen2, qwen3"), "{unknown}");
        insta::assert_snapshot!(refusal(r#""model_type": "llama", "logit_cap": 30.0"#), @r#"config.json has logit_cap = 30.0, which this trainer does not know for model_type "llama": training could silently compute another model, so it is refused"#);
        insta::assert_snapshot!(refusal(r#""model_type": "llama", "hidden_act": "gelu""#), @r#"config.json has hidden_act = "gelu": this trainer knows only silu"#);
        let rope =
            |table: &str| refusal(&format!(r#""model_type": "llama", "rope_scaling": {table}"#));
        insta::assert_snapshot!(rope(r#"{"rope_type": "longrope", "factor": 2.0}"#), @r#"config.json has rope_scaling = {"rope_type":"longrope","factor":2.0}: this trainer knows the types default, linear, dynamic, llama3 and yarn"#);
        insta::assert_snapshot!(rope(r#"{"rope_type": "yarn"}"#), @r#"config.json has rope_scaling = {"rope_type":"yarn"}: yarn needs a positive factor"#);
        insta::assert_snapshot!(rope(r#"{"rope_type": "yarn", "factor": 4.0, "beta_fast": -1}"#), @r#"config.json has rope_scaling = {"rope_type":"yarn","factor":4.0,"beta_fast":-1}: beta_fast must be a positive number"#);
        insta::assert_snapshot!(rope(r#"{"type": "default", "mrope_section": [16, 24, 24]}"#), @r#"config.json has rope_scaling = {"type":"default","mrope_section":[16,24,24]}: this trainer does not know its key mrope_section"#);
        insta::assert_snapshot!(rope(r#"{"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}"#), @"config.json has partial_rotary_factor = 0.5: this trainer rotates whole heads only");
        assert_eq!(
            parse(r#""model_type": "llama", "some_future_switch": false"#).map(|_| ()),
            Ok(())
        );
    }

    #[test]
    fn refuses_shapes_that_cannot_be() {
        insta::assert_snapshot!(ModelConfig::parse("[1]").unwrap_err(), @"config.json is not a JSON object: it is an array");
        insta::assert_snapshot!(ModelConfig::parse(r#"{"model_type": "llama"}"#).unwrap_err(), @"config.json lacks hidden_size");
        insta::assert_snapshot!(refusal(r#""model_type": "llama", "head_dim": 7"#), @"config.json has head_dim = 7: it must be even for rotary embedding");
        insta::assert_snapshot!(refusal(r#""model_type": "llama", "head_dim": -2"#), @"config.json has head_dim = -2: it must be a positive whole number");
    }
}
