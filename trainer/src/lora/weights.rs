//! Checks a published adapter against its base model.
//!
//! Every tensor of its file is either used or a copy of a tensor of the base model; otherwise the
//! adapter is refused.

use std::collections::BTreeMap;

use crate::{
    architecture::{config::ModelConfig, modules, names},
    hf::safetensors_header::TensorEntry,
    lora::{
        PREFIX,
        config::AdapterConfig,
        targets,
        trainable::{LoraAdapters, Trainable},
    },
};

/// A published adapter, checked against its base model.
#[derive(Debug, Clone)]
pub struct PublishedAdapter {
    /// Its adapters on the base model.
    pub adapters: LoraAdapters,
    /// Copies of tensors of the base model: their names in the adapter's file and in the base.
    pub copies: Vec<(String, String)>,
}

/// Why an adapter is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Its settings do not fit the base model.
    #[error("the adapter does not fit the base model: {0}")]
    Settings(#[from] crate::lora::Error),
    /// One adapter serves both tied embeddings, which have one each here.
    #[error(
        "ensure_weight_tying is true, so that one adapter serves the embedding and the head of this model, but here each has its own: merge the adapter with PEFT, and start from the merged model"
    )]
    Tied,
    /// A tensor is missing.
    #[error("the adapter's weights lack {name}: it belongs to another model, or is damaged")]
    Missing {
        /// The tensor's name in the adapter's file.
        name: String,
    },
    /// A tensor has another shape.
    #[error("{name} has shape {found:?}, must be {expected:?}: {reason}")]
    Shape {
        /// The tensor's name in the adapter's file.
        name: String,
        /// Its shape in the file.
        found: Vec<usize>,
        /// The shape it should have.
        expected: Vec<usize>,
        /// The likely cause.
        reason: &'static str,
    },
    /// A tensor has an unsupported element type.
    #[error("{name} has dtype {dtype}, must be F32, F16 or BF16")]
    Dtype {
        /// The tensor's name in the adapter's file.
        name: String,
        /// Its element type in the file.
        dtype: String,
    },
    /// Tensors that no module uses.
    #[error(
        "the adapter's weights have {}, which its settings do not ask for: their effect is unknown, so the adapter is refused",
        first_names(names)
    )]
    Unused {
        /// The names of the unused tensors.
        names: Vec<String>,
    },
}

impl PublishedAdapter {
    /// Resolves an adapter's settings against its base model and the header of its weights.
    ///
    /// # Errors
    /// [`Error`] if they do not fit, or a tensor is missing, of another shape or dtype, or not
    /// used.
    pub fn new(
        config: &ModelConfig,
        settings: &AdapterConfig,
        tensors: &BTreeMap<String, TensorEntry>,
    ) -> Result<Self, Error> {
        let mut resolved = targets::resolve(config, &settings.lora)?;
        // PEFT compares these names as suffixes without a dot: `norm` also matches
        // `input_layernorm`. Adapters of this trainer contain only exact matches, so the file
        // decides.
        let all = modules::modules(config);
        let is_suffix_match = |path: &str| {
            settings.lora.modules_to_save.iter().any(|name| path.ends_with(name.as_str()))
        };
        let is_stored = |path: &str| tensors.contains_key(&format!("{PREFIX}{path}.weight"));
        for module in
            all.iter().filter(|module| is_suffix_match(&module.path) && is_stored(&module.path))
        {
            if !resolved.modules_to_save.contains(module) {
                resolved.modules_to_save.push(module.clone());
            }
        }
        resolved.targets.retain(|module| !resolved.modules_to_save.contains(module));
        // PEFT too ignores names without a match, as long as some name matches.
        let adapters = LoraAdapters::new(&settings.lora, resolved)?;
        if settings.ties_adapters && config.tie_word_embeddings && adapters.unties_embeddings() {
            return Err(Error::Tied);
        }
        let copies = check_tensors(config, &adapters, tensors)?;
        Ok(Self { adapters, copies })
    }
}

/// Checks that the file has every trained tensor and nothing unknown; returns the copies of base
/// tensors.
fn check_tensors(
    config: &ModelConfig,
    adapters: &LoraAdapters,
    tensors: &BTreeMap<String, TensorEntry>,
) -> Result<Vec<(String, String)>, Error> {
    let expected: BTreeMap<String, Vec<usize>> = Trainable::Lora(adapters.clone())
        .trained_tensors(config)
        .into_iter()
        .map(|spec| (format!("{PREFIX}{}", spec.name), spec.shape))
        .collect();
    for (name, shape) in &expected {
        let Some(found) = tensors.get(name) else {
            return Err(Error::Missing { name: name.clone() });
        };
        check(name, found, shape, "the adapter belongs to another model")?;
    }
    let (mut copies, mut unused) = (Vec::new(), Vec::new());
    for (name, found) in tensors.iter().filter(|(name, _)| !expected.contains_key(*name)) {
        let Some(base) = base_tensor(name) else {
            unused.push(name.clone());
            continue;
        };
        let shape = [config.vocab_size, config.hidden_size];
        check(name, found, &shape, "the base model's vocabulary was changed for this adapter")?;
        copies.push((name.clone(), base));
    }
    if unused.is_empty() { Ok(copies) } else { Err(Error::Unused { names: unused }) }
}

fn check(
    name: &str,
    found: &TensorEntry,
    expected: &[usize],
    reason: &'static str,
) -> Result<(), Error> {
    let name = || name.to_owned();
    if found.shape != expected {
        let (found, expected) = (found.shape.clone(), expected.to_vec());
        return Err(Error::Shape { name: name(), found, expected, reason });
    }
    if !["F32", "F16", "BF16"].contains(&found.dtype.as_str()) {
        return Err(Error::Dtype { name: name(), dtype: found.dtype.clone() });
    }
    Ok(())
}

/// Returns the tensor of the base model that a tensor of the adapter copies: PEFT saves the
/// embedding and the head beside adapters on them, and whenever the vocabulary was resized.
///
/// # Source
/// `get_peft_model_state_dict` of `peft/utils/save_and_load.py`, 0.21.2, `save_embedding_layers`.
fn base_tensor(name: &str) -> Option<String> {
    let path = name.strip_prefix(PREFIX)?.strip_suffix(".weight")?;
    let path = path.strip_suffix(".base_layer").unwrap_or(path);
    [names::EMBED_TOKENS, names::LM_HEAD].contains(&path).then(|| format!("{path}.weight"))
}

fn first_names(names: &[String]) -> String {
    let shown = names.iter().take(3).map(String::as_str).collect::<Vec<_>>().join(", ");
    match names.len() {
        0..=3 => shown,
        all => format!("{shown} and {} more", all - 3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lora::config;

    fn model(is_tied: bool) -> ModelConfig {
        ModelConfig::parse(&format!(
            r#"{{"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "tie_word_embeddings": {is_tied}}}"#
        ))
        .unwrap()
    }

    fn entry(shape: &[usize], dtype: &str) -> TensorEntry {
        TensorEntry { dtype: dtype.to_owned(), shape: shape.to_vec(), start: 0, end: 0 }
    }

    /// Checks an adapter of `settings` whose file is valid apart from `change`.
    fn check(
        settings: &str,
        change: impl FnOnce(&mut BTreeMap<String, TensorEntry>),
    ) -> Result<PublishedAdapter, Error> {
        let text = format!(r#"{{"peft_type": "LORA", "r": 4, "lora_alpha": 8, {settings}}}"#);
        let settings = config::parse(&text).unwrap();
        let trainable = Trainable::lora(&model(true), &settings.lora).unwrap();
        let mut tensors: BTreeMap<String, TensorEntry> = trainable
            .trained_tensors(&model(true))
            .into_iter()
            .map(|spec| (format!("{PREFIX}{}", spec.name), entry(&spec.shape, "F32")))
            .collect();
        change(&mut tensors);
        PublishedAdapter::new(&model(true), &settings, &tensors)
    }

    #[test]
    fn every_tensor_is_used_or_refused_by_name() {
        let settings = r#""target_modules": ["q_proj"]"#;
        assert!(check(settings, |_| {}).is_ok());
        let layer = "base_model.model.model.layers.0.self_attn.q_proj";
        let with = |name: String, found: TensorEntry| {
            check(settings, |tensors| drop(tensors.insert(name, found))).unwrap_err().to_string()
        };
        let messages = [
            with(format!("{layer}.lora_B.bias"), entry(&[64], "F32")),
            with(format!("{layer}.lora_magnitude_vector"), entry(&[64], "F32")),
            with("base_model.model.score.weight".to_owned(), entry(&[2, 64], "F32")),
            with("model.layers.1.mlp.up_proj.weight".to_owned(), entry(&[96, 64], "F32")),
            with(format!("{layer}.lora_A.weight"), entry(&[8, 64], "F32")),
            with(format!("{layer}.lora_A.weight"), entry(&[4, 64], "I8")),
            with("base_model.model.lm_head.weight".to_owned(), entry(&[101, 64], "F32")),
            check(settings, |tensors| drop(tensors.remove(&format!("{layer}.lora_B.weight"))))
                .unwrap_err()
                .to_string(),
        ];
        insta::assert_snapshot!(messages.join("\n"), @r"
the adapter's weights have base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias, which its settings do not ask for: their effect is unknown, so the adapter is refused
the adapter's weights have base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector, which its settings do not ask for: their effect is unknown, so the adapter is refused
the adapter's weights have base_model.model.score.weight, which its settings do not ask for: their effect is unknown, so the adapter is refused
the adapter's weights have model.layers.1.mlp.up_proj.weight, which its settings do not ask for: their effect is unknown, so the adapter is refused
base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight has shape [8, 64], must be [4, 64]: the adapter belongs to another model
base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight has dtype I8, must be F32, F16 or BF16
base_model.model.lm_head.weight has shape [101, 64], must be [100, 64]: the base model's vocabulary was changed for this adapter
the adapter's weights lack base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight: it belongs to another model, or is damaged
");
    }

    #[test]
    fn copies_of_embedding_and_head_are_known() {
        let settings = r#""target_modules": ["embed_tokens", "lm_head"]"#;
        let published = check(settings, |tensors| {
            for path in ["model.embed_tokens", "lm_head"] {
                let name = format!("{PREFIX}{path}.base_layer.weight");
                tensors.insert(name, entry(&[100, 64], "BF16"));
            }
        });
        let copies = published.unwrap().copies;
        assert_eq!(copies.len(), 2);
        assert_eq!(copies[0].1, "lm_head.weight");
        let tied = format!(r#"{settings}, "ensure_weight_tying": true"#);
        assert_eq!(check(&tied, |_| {}).unwrap_err(), Error::Tied);
        let plain = r#""target_modules": ["q_proj"], "ensure_weight_tying": true"#;
        assert!(check(plain, |_| {}).is_ok());
    }

    #[test]
    fn the_file_decides_which_norms_are_trained() {
        let settings = r#""target_modules": ["q_proj"], "modules_to_save": ["norm"]"#;
        assert_eq!(check(settings, |_| {}).unwrap().adapters.modules_to_save, ["model.norm"]);
        let name = "model.layers.1.input_layernorm";
        let published = check(settings, |tensors| {
            tensors.insert(format!("{PREFIX}{name}.weight"), entry(&[64], "F32"));
        });
        assert_eq!(published.unwrap().adapters.modules_to_save, ["model.norm", name]);
    }

    #[test]
    fn names_without_a_match_have_no_effect() {
        let settings = r#""target_modules": ["q_proj", "W_pack"], "exclude_modules": ["vision"]"#;
        let text = format!(r#"{{"peft_type": "LORA", "r": 4, "lora_alpha": 8, {settings}}}"#);
        let settings = config::parse(&text).unwrap();
        let unmatched = targets::resolve(&model(true), &settings.lora).unwrap().unmatched;
        assert_eq!(unmatched.len(), 2);
        let error = PublishedAdapter::new(&model(true), &settings, &BTreeMap::new()).unwrap_err();
        assert!(matches!(error, Error::Missing { .. }), "{error}");
    }
}
