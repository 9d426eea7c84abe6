//! Strict reading of `config.json`: every key is used, known to be harmless, or refused.

use serde_json::{Map, Value};

use super::config::Error;

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

/// Reads the keys of a config and remembers which, so that the others can be refused.
pub(super) struct ConfigKeys<'a> {
    source: &'a Map<String, Value>,
    read: Vec<&'static str>,
}

impl<'a> ConfigKeys<'a> {
    pub(super) fn new(source: &'a Map<String, Value>) -> Self {
        Self { source, read: vec!["model_type"] }
    }

    /// Returns the value of a key that is present and not null.
    pub(super) fn get(&mut self, key: &'static str) -> Option<&'a Value> {
        self.read.push(key);
        self.source.get(key).filter(|value| !value.is_null())
    }

    pub(super) fn size(
        &mut self,
        key: &'static str,
        default: Option<usize>,
    ) -> Result<usize, Error> {
        let Some(value) = self.get(key) else {
            return default.ok_or(Error::MissingKey { key });
        };
        match value.as_u64() {
            Some(size) if (1..=1 << 31).contains(&size) => Ok(size as usize),
            _ => Err(invalid(key, value, "it must be a positive whole number")),
        }
    }

    pub(super) fn number(&mut self, key: &'static str, default: Option<f64>) -> Result<f64, Error> {
        let Some(value) = self.get(key) else {
            return default.ok_or(Error::MissingKey { key });
        };
        value.as_f64().ok_or_else(|| invalid(key, value, "it must be a number"))
    }

    pub(super) fn flag(&mut self, key: &'static str, default: bool) -> Result<bool, Error> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value.as_bool().ok_or_else(|| invalid(key, value, "it must be true or false"))
    }

    pub(super) fn text(&mut self, key: &'static str, default: &'a str) -> Result<&'a str, Error> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value.as_str().ok_or_else(|| invalid(key, value, "it must be a string"))
    }

    /// Accepts keys that the family's network does not read, whatever their value.
    pub(super) fn ignore(&mut self, keys: impl IntoIterator<Item = &'static str>) {
        self.read.extend(keys);
    }

    /// Reads `sliding_window`: null means none, and an absent key means `absent`.
    pub(super) fn window(&mut self, absent: Option<usize>) -> Result<Option<usize>, Error> {
        match self.get("sliding_window") {
            Some(_) => self.size("sliding_window", None).map(Some),
            None if self.source.contains_key("sliding_window") => Ok(None),
            None => Ok(absent),
        }
    }

    /// Reads the attention window of each block from `layer_types`, or takes `default` of its number.
    pub(super) fn layer_windows(
        &mut self,
        layers: usize,
        window: Option<usize>,
        default: impl Fn(usize) -> Option<usize>,
    ) -> Result<Vec<Option<usize>>, Error> {
        let Some(value) = self.get("layer_types") else {
            return Ok((0..layers).map(default).collect());
        };
        let wrong = || {
            let allowed =
                format!("it must list {layers} times full_attention or sliding_attention");
            invalid("layer_types", value, allowed)
        };
        let types = value.as_array().filter(|types| types.len() == layers).ok_or_else(wrong)?;
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
    pub(super) fn refuse_unread(&self, model_type: &str) -> Result<(), Error> {
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

/// Reports a value that cannot be.
pub(super) fn invalid(key: &str, value: &Value, allowed: impl Into<String>) -> Error {
    Error::InvalidValue { key: key.to_owned(), value: value.to_string(), allowed: allowed.into() }
}
