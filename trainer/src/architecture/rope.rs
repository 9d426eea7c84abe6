//! Rotary position embedding as `config.json` describes it.

use serde_json::{Map, Value};

use super::{
    config::Error,
    keys::{ConfigKeys, invalid},
};

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

impl ConfigKeys<'_> {
    /// Reads the rotary keys in either spelling.
    pub(super) fn rope(&mut self) -> Result<Rope, Error> {
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
}
