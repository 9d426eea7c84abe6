//! A model's `config.json`, read strictly: every key is understood, harmless by name, or refused.
//!
//! Both spellings are read: transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and
//! transformers 5 (`rope_parameters`, `dtype`). What was read is kept in [`ModelConfig::source`], so
//! that export writes back the file it was given.

use serde_json::{Map, Value};

/// The architectures this trainer knows, by `model_type`.
pub const SUPPORTED_MODEL_TYPES: [&str; 4] = ["llama", "mistral", "qwen2", "qwen3"];

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
        SUPPORTED_MODEL_TYPES.join(", ")
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
    /// `llama`, `mistral`, `qwen2` or `qwen3`.
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

/// Rotary position embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the geometric series of wavelengths.
    pub theta: f64,
    /// How the series is stretched.
    pub scaling: RopeScaling,
}

/// How rotary frequencies are stretched to longer contexts.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1's: long wavelengths divided by `factor`, short ones kept, a ramp between.
    Llama3 {
        /// The divisor of long wavelengths.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are long.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are short.
        high_freq_factor: f64,
        /// The context length before stretching.
        original_max_position_embeddings: f64,
    },
    /// Other frequencies beyond `max_position_embeddings`, which no run reaches; none up to there.
    Dynamic {
        /// The divisor at as many times the longest position.
        factor: f64,
    },
    /// YaRN's: pairs that turn seldom within the original context divided by `factor`, those that turn
    /// often kept, a ramp between; and all angles' sines and cosines scaled.
    Yarn {
        /// The divisor of the slow pairs.
        factor: f64,
        /// The context length before stretching.
        original_max_position_embeddings: f64,
        /// Turns within the original context from which on a pair is kept.
        beta_fast: f64,
        /// Turns below which a pair is divided.
        beta_slow: f64,
        /// Whether the ramp's ends are whole pairs.
        truncate: bool,
        /// What sines and cosines are multiplied by.
        attention_factor: f64,
    },
}

/// Keys that do not change the network's function in training, whatever their value.
const HARMLESS_KEYS: [&str; 34] = [
    "architectures",
    "auto_map",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "unk_token_id",
    "sep_token_id",
    "cls_token_id",
    "mask_token_id",
    "decoder_start_token_id",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "use_cache",
    "initializer_range",
    "pretraining_tp",
    "is_decoder",
    "is_llama_config",
    "transformers.js_config",
    "chunk_size_feed_forward",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "torchscript",
    "id2label",
    "label2id",
    "problem_type",
    "task_specific_params",
    "finetuning_task",
    "tokenizer_class",
    // Llama 1 and Vicuna, beside max_position_embeddings, which is what counts.
    "max_sequence_length",
    "tokenizer_model_max_length",
    "unsloth_version",
    "unsloth_fixed",
];

/// Settings of generation, which old releases of transformers saved into config.json.
const GENERATION_KEYS: [&str; 28] = [
    "bad_words_ids",
    "begin_suppress_tokens",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "length_penalty",
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_new_tokens",
    "min_p",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_scores",
    "prefix",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict_in_generate",
    "suppress_tokens",
    "temperature",
    "top_k",
    "top_p",
];

impl ModelConfig {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// [`Error`] for an unknown architecture, a key that would change the network in an unknown
    /// way, or a shape that cannot be.
    ///
    /// # Source
    /// Defaults are those of `transformers/models/{llama,mistral,qwen2,qwen3}/configuration_*.py`, 5.23.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let source = match serde_json::from_str(text) {
            Ok(Value::Object(object)) => object,
            Ok(other) => {
                return Err(Error::NotAnObject { reason: format!("it is {}", kind_of(&other)) });
            }
            Err(error) => return Err(Error::NotAnObject { reason: error.to_string() }),
        };
        let model_type =
            source.get("model_type").and_then(Value::as_str).unwrap_or_default().to_owned();
        if !SUPPORTED_MODEL_TYPES.contains(&model_type.as_str()) {
            return Err(Error::UnknownModelType { found: model_type });
        }
        let mut keys = Keys { source: &source, read: vec!["model_type"] };

        let hidden_size = keys.size("hidden_size", None)?;
        let num_hidden_layers = keys.size("num_hidden_layers", None)?;
        let num_attention_heads = keys.size("num_attention_heads", None)?;
        let num_key_value_heads = keys.size("num_key_value_heads", Some(num_attention_heads))?;
        let default_head_dim =
            if model_type == "qwen3" { 128 } else { hidden_size / num_attention_heads };
        let head_dim = keys.size("head_dim", Some(default_head_dim))?;
        if num_attention_heads % num_key_value_heads != 0 {
            return Err(invalid(
                "num_key_value_heads",
                &num_key_value_heads.into(),
                format!("it must divide num_attention_heads = {num_attention_heads}"),
            ));
        }
        if head_dim % 2 != 0 {
            return Err(invalid(
                "head_dim",
                &head_dim.into(),
                "it must be even for rotary embedding",
            ));
        }
        let attention_bias = keys.flag("attention_bias", false)?;
        let (qkv_bias, o_bias) = match model_type.as_str() {
            "qwen2" => (true, false),
            "mistral" => (false, false),
            _ => (attention_bias, attention_bias),
        };
        let mlp_bias = keys.flag("mlp_bias", false)?;
        let config = Self {
            vocab_size: keys.size("vocab_size", None)?,
            intermediate_size: keys.size("intermediate_size", None)?,
            rms_norm_eps: keys.number("rms_norm_eps", Some(1e-6))?,
            rope: keys.rope()?,
            max_position_embeddings: keys.size("max_position_embeddings", Some(2048))?,
            tie_word_embeddings: keys.flag("tie_word_embeddings", false)?,
            qk_norm: model_type == "qwen3",
            sliding_window: keys.sliding_window(&model_type, num_hidden_layers)?,
            mlp_bias: mlp_bias && model_type == "llama",
            hidden_size,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            qkv_bias,
            o_bias,
            model_type: model_type.clone(),
            source: Map::new(),
        };
        match keys.text("hidden_act", "silu")? {
            "silu" | "swish" => {}
            other => {
                return Err(invalid("hidden_act", &other.into(), "this trainer knows only silu"));
            }
        }
        if keys.number("attention_dropout", Some(0.0))? != 0.0 {
            let value = source["attention_dropout"].clone();
            return Err(invalid("attention_dropout", &value, "this trainer knows only 0"));
        }
        keys.refuse_unread(&model_type)?;
        Ok(Self { source, ..config })
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

/// Reads keys and remembers which, so that the rest can be refused.
struct Keys<'a> {
    source: &'a Map<String, Value>,
    read: Vec<&'static str>,
}

impl<'a> Keys<'a> {
    /// Returns the value of a key that is present and not null.
    fn get(&mut self, key: &'static str) -> Option<&'a Value> {
        self.read.push(key);
        self.source.get(key).filter(|value| !value.is_null())
    }

    fn size(&mut self, key: &'static str, default: Option<usize>) -> Result<usize, Error> {
        let Some(value) = self.get(key) else {
            return default.ok_or(Error::MissingKey { key });
        };
        match value.as_u64() {
            Some(size) if (1..=1 << 31).contains(&size) => Ok(size as usize),
            _ => Err(invalid(key, value, "it must be a positive whole number")),
        }
    }

    fn number(&mut self, key: &'static str, default: Option<f64>) -> Result<f64, Error> {
        let Some(value) = self.get(key) else {
            return default.ok_or(Error::MissingKey { key });
        };
        value.as_f64().ok_or_else(|| invalid(key, value, "it must be a number"))
    }

    fn flag(&mut self, key: &'static str, default: bool) -> Result<bool, Error> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value.as_bool().ok_or_else(|| invalid(key, value, "it must be true or false"))
    }

    fn text(&mut self, key: &'static str, default: &'a str) -> Result<&'a str, Error> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value.as_str().ok_or_else(|| invalid(key, value, "it must be a string"))
    }

    /// Reads the rotary keys in either spelling.
    fn rope(&mut self) -> Result<Rope, Error> {
        let (parameters, scaling, theta) =
            (self.get("rope_parameters"), self.get("rope_scaling"), self.get("rope_theta"));
        if self.flag("rope_interleaved", false)? {
            return Err(invalid(
                "rope_interleaved",
                &true.into(),
                "this trainer rotates halves only",
            ));
        }
        let table = match parameters.or(scaling) {
            None => None,
            Some(Value::Object(table)) => Some(table),
            Some(other) => return Err(invalid("rope_scaling", other, "it must be an object")),
        };
        let inner_theta = table.and_then(|table| table.get("rope_theta"));
        let theta = match inner_theta.or(theta) {
            None => 10_000.0,
            Some(value) => value
                .as_f64()
                .filter(|theta| *theta > 0.0)
                .ok_or_else(|| invalid("rope_theta", value, "it must be a positive number"))?,
        };
        let Some(table) = table else { return Ok(Rope { theta, scaling: RopeScaling::None }) };
        let scaling = self.rope_scaling(table)?;
        Ok(Rope { theta, scaling })
    }

    /// Reads how the frequencies are stretched.
    ///
    /// # Source
    /// `modeling_rope_utils.py` of transformers 5.23, with the defaults of `standardize_rope_params`.
    fn rope_scaling(&mut self, table: &Map<String, Value>) -> Result<RopeScaling, Error> {
        const KNOWN: [&str; 15] = [
            "rope_type",
            "type",
            "rope_theta",
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
            "partial_rotary_factor",
            // Of the first YaRN models; transformers does not read it.
            "finetuned",
        ];
        let wrong =
            |allowed: String| invalid("rope_scaling", &Value::Object(table.clone()), allowed);
        let set = |key: &str| table.get(key).filter(|value| !value.is_null());
        let unknown = table.keys().find(|key| !KNOWN.contains(&key.as_str()));
        if let Some(key) = unknown.filter(|key| set(key).is_some()) {
            return Err(wrong(format!("this trainer does not know its key {key}")));
        }
        let outer =
            [self.get("original_max_position_embeddings"), self.get("partial_rotary_factor")];
        let [outer_original, outer_partial] = outer;
        if let Some(part) = set("partial_rotary_factor").or(outer_partial)
            && part.as_f64() != Some(1.0)
        {
            return Err(invalid(
                "partial_rotary_factor",
                part,
                "this trainer rotates whole heads only",
            ));
        }
        let kind = set("rope_type").or_else(|| set("type")).and_then(Value::as_str);
        let kind = kind.unwrap_or("default");
        let optional = |key: &str| match set(key) {
            None => Ok(None),
            Some(value) => value
                .as_f64()
                .filter(|number| *number > 0.0)
                .map(Some)
                .ok_or_else(|| wrong(format!("{key} must be a positive number"))),
        };
        let number = |key: &str| {
            optional(key)?.ok_or_else(|| wrong(format!("{kind} needs a positive {key}")))
        };
        // The one beside the table goes first.
        let original = match outer_original {
            None => optional("original_max_position_embeddings")?,
            Some(value) => {
                Some(value.as_f64().filter(|number| *number > 0.0).ok_or_else(|| {
                    invalid(
                        "original_max_position_embeddings",
                        value,
                        "it must be a positive number",
                    )
                })?)
            }
        };
        let longest = self.size("max_position_embeddings", Some(2048))? as f64;
        Ok(match kind {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: number("factor")? },
            "dynamic" => RopeScaling::Dynamic { factor: number("factor")? },
            "llama3" => RopeScaling::Llama3 {
                factor: number("factor")?,
                low_freq_factor: number("low_freq_factor")?,
                high_freq_factor: number("high_freq_factor")?,
                original_max_position_embeddings: original.unwrap_or(longest),
            },
            "yarn" => {
                let original = original.unwrap_or(longest);
                let factor = match set("factor") {
                    None if table.contains_key("factor") => longest / original,
                    _ => number("factor")?,
                };
                let scale = |mscale: f64| {
                    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
                };
                let mscales = optional("mscale")?.zip(optional("mscale_all_dim")?);
                let usual = mscales.map_or(scale(1.0), |(one, all)| scale(one) / scale(all));
                RopeScaling::Yarn {
                    factor,
                    original_max_position_embeddings: original,
                    beta_fast: optional("beta_fast")?.unwrap_or(32.0),
                    beta_slow: optional("beta_slow")?.unwrap_or(1.0),
                    truncate: set("truncate").is_none_or(|value| *value != Value::Bool(false)),
                    attention_factor: optional("attention_factor")?.unwrap_or(usual),
                }
            }
            _ => {
                return Err(wrong(
                    "this trainer knows the types default, linear, dynamic, llama3 and yarn"
                        .to_owned(),
                ));
            }
        })
    }

    /// Reads the attention window of each block.
    ///
    /// # Source
    /// `configuration_mistral.py`: an absent `sliding_window` is 4096, null is none;
    /// `configuration_qwen2.py`: only with `use_sliding_window`, from layer `max_window_layers` on.
    fn sliding_window(
        &mut self,
        model_type: &str,
        layers: usize,
    ) -> Result<Vec<Option<usize>>, Error> {
        let window = match self.get("sliding_window") {
            Some(_) => Some(self.size("sliding_window", None)?),
            None if model_type == "mistral" && !self.source.contains_key("sliding_window") => {
                Some(4096)
            }
            None => None,
        };
        let use_window = self.flag("use_sliding_window", false)?;
        let first_windowed = match self.get("max_window_layers") {
            Some(value) => value
                .as_u64()
                .ok_or_else(|| invalid("max_window_layers", value, "it must be a whole number"))?,
            None => 28,
        };
        let layer_types = self.get("layer_types").cloned();
        let by_default = |layer: usize| match model_type {
            "mistral" => window,
            "qwen2" | "qwen3" if use_window && layer as u64 >= first_windowed => window,
            _ => None,
        };
        let Some(layer_types) = layer_types else {
            return Ok((0..layers).map(by_default).collect());
        };
        let wrong = || {
            invalid(
                "layer_types",
                &layer_types,
                format!("it must list {layers} times full_attention or sliding_attention"),
            )
        };
        let types =
            layer_types.as_array().filter(|types| types.len() == layers).ok_or_else(wrong)?;
        types
            .iter()
            .map(|kind| match kind.as_str() {
                Some("full_attention") => Ok(None),
                Some("sliding_attention") => window.map(Some).ok_or_else(wrong),
                _ => Err(wrong()),
            })
            .collect()
    }

    /// Refuses any key that was neither read nor is harmless, unless its value says "not used".
    fn refuse_unread(&self, model_type: &str) -> Result<(), Error> {
        for (key, value) in self.source {
            // Keys with a leading underscore are transformers' own bookkeeping.
            let is_known = key.starts_with('_')
                || self.read.contains(&key.as_str())
                || HARMLESS_KEYS.contains(&key.as_str())
                || GENERATION_KEYS.contains(&key.as_str());
            let is_unused = match value {
                Value::Null | Value::Bool(false) => true,
                Value::Array(items) => items.is_empty(),
                Value::Object(items) => items.is_empty(),
                Value::Bool(true) | Value::Number(_) | Value::String(_) => false,
            };
            if !is_known && !is_unused {
                return Err(Error::UnknownKey {
                    key: key.clone(),
                    value: value.to_string(),
                    model_type: model_type.to_owned(),
                });
            }
        }
        Ok(())
    }
}

fn invalid(key: &str, value: &Value, allowed: impl Into<String>) -> Error {
    Error::InvalidValue { key: key.to_owned(), value: value.to_string(), allowed: allowed.into() }
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
        insta::assert_snapshot!(refusal(r#""model_type": "gpt2""#), @r#"config.json says model_type "gpt2", which this trainer does not know: use a model of type llama, mistral, qwen2, qwen3"#);
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
