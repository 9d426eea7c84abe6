//! A model's `config.json`, read strictly: every key is understood, harmless by name, or refused.
//!
//! Both spellings are read: transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and
//! transformers 5 (`rope_parameters`, `dtype`). What was read is kept in [`ModelConfig::source`], so
//! that export writes back the file it was given.

use finetune_contract::ModuleShape;
use serde_json::{Map, Value};

use super::names;

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
}

/// The name and shape of one tensor of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// The checkpoint name, such as `model.layers.3.self_attn.q_proj.weight`.
    pub name: String,
    /// The shape.
    pub shape: Vec<usize>,
}

/// Keys that do not change the network's function in training, whatever their value.
const HARMLESS_KEYS: [&str; 27] = [
    "architectures",
    "auto_map",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "unk_token_id",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "use_cache",
    "initializer_range",
    "pretraining_tp",
    "_name_or_path",
    "is_llama_config",
    "transformers.js_config",
    "chunk_size_feed_forward",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "id2label",
    "label2id",
    "problem_type",
    "_attn_implementation_autoset",
    "task_specific_params",
    "tokenizer_class",
    "unsloth_version",
    "unsloth_fixed",
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

    /// Lists every tensor of the checkpoint; a tied head has none of its own.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let spec = |name: String, shape: &[usize]| TensorSpec { name, shape: shape.to_vec() };
        let weight = |path: &str| format!("{path}.weight");
        let mut tensors =
            vec![spec(weight(names::EMBED_TOKENS), &[self.vocab_size, self.hidden_size])];
        for layer in 0..self.num_hidden_layers {
            for (path, width) in self.block_norms() {
                tensors.push(spec(weight(&names::in_block(layer, path)), &[width]));
            }
            for (path, out, width, bias) in self.block_linears() {
                let path = names::in_block(layer, path);
                tensors.push(spec(weight(&path), &[out, width]));
                if bias {
                    tensors.push(spec(format!("{path}.bias"), &[out]));
                }
            }
        }
        tensors.push(spec(weight(names::NORM), &[self.hidden_size]));
        if !self.tie_word_embeddings {
            tensors.push(spec(weight(names::LM_HEAD), &[self.vocab_size, self.hidden_size]));
        }
        tensors
    }

    /// Lists the modules that hold weights, by leaf name; a tied head is not among them.
    pub fn modules(&self) -> Vec<ModuleShape> {
        let shape = |name: &str, out: usize, width: usize, bias: bool, count: usize| ModuleShape {
            name: names::leaf(name).to_owned(),
            out_features: out as u32,
            in_features: width as u32,
            bias,
            count: count as u32,
        };
        let layers = self.num_hidden_layers;
        let mut modules = vec![shape("embed_tokens", self.vocab_size, self.hidden_size, false, 1)];
        modules.extend(
            self.block_linears()
                .iter()
                .map(|&(path, out, width, bias)| shape(path, out, width, bias, layers)),
        );
        modules.extend(
            self.block_norms().iter().map(|&(path, width)| shape(path, width, 0, false, layers)),
        );
        modules.push(shape("norm", self.hidden_size, 0, false, 1));
        if !self.tie_word_embeddings {
            modules.push(shape("lm_head", self.vocab_size, self.hidden_size, false, 1));
        }
        modules
    }

    /// Counts the elements of all tensors, a tied head once.
    pub fn parameters(&self) -> u64 {
        self.modules().iter().map(ModuleShape::parameters).sum()
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
        let kind = table
            .get("rope_type")
            .or_else(|| table.get("type"))
            .and_then(Value::as_str)
            .unwrap_or("default");
        let number = |key: &'static str| {
            table.get(key).and_then(Value::as_f64).filter(|number| *number > 0.0).ok_or_else(|| {
                invalid(
                    "rope_scaling",
                    &Value::Object(table.clone()),
                    format!("{kind} needs a positive {key}"),
                )
            })
        };
        let scaling = match kind {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: number("factor")? },
            "llama3" => RopeScaling::Llama3 {
                factor: number("factor")?,
                low_freq_factor: number("low_freq_factor")?,
                high_freq_factor: number("high_freq_factor")?,
                original_max_position_embeddings: number("original_max_position_embeddings")?,
            },
            _ => {
                let value = Value::Object(table.clone());
                return Err(invalid(
                    "rope_scaling",
                    &value,
                    "this trainer knows the types default, linear and llama3",
                ));
            }
        };
        Ok(Rope { theta, scaling })
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
            let is_known =
                self.read.contains(&key.as_str()) || HARMLESS_KEYS.contains(&key.as_str());
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
        insta::assert_snapshot!(refusal(r#""model_type": "llama", "rope_scaling": {"rope_type": "yarn", "factor": 2.0}"#), @r#"config.json has rope_scaling = {"factor":2.0,"rope_type":"yarn"}: this trainer knows the types default, linear and llama3"#);
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
