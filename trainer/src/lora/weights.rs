//! A published adapter put beside its base model: its settings resolved, its tensors accounted for.
//!
//! Every tensor of the file is used, or a copy of a tensor of the base model, or the adapter is refused.

use std::collections::BTreeMap;

use crate::{
    architecture::{config::ModelConfig, modules, names},
    hf::safetensors_header::TensorEntry,
    lora::{
        PREFIX,
        config::AdapterConfig,
        targets,
        trainable::{Attachment, LoraAttachment},
    },
};

/// A published adapter, checked against its base model.
#[derive(Debug, Clone)]
pub struct Published {
    /// What it is on the base model.
    pub attachment: LoraAttachment,
    /// Tensors that only repeat the base model's: their names in the adapter's file and in the base.
    pub copies: Vec<(String, String)>,
}

/// Why an adapter is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Its settings do not fit the base model.
    #[error("the adapter does not fit the base model: {0}")]
    Settings(#[from] crate::lora::Error),
    /// It ties what is independent here.
    #[error(
        "ensure_weight_tying is true, so that one adapter would serve the embedding and the head of this model: here each has its own; merge it with PEFT, and start from the result"
    )]
    Tied,
    /// A tensor is not there.
    #[error("its weights lack {name}: the adapter is of another model, or damaged")]
    Missing {
        /// The tensor.
        name: String,
    },
    /// A tensor has another shape.
    #[error("{name} is {found:?}, not {expected:?}: {reason}")]
    Shape {
        /// The tensor.
        name: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape it should have.
        expected: Vec<usize>,
        /// What that means.
        reason: &'static str,
    },
    /// A tensor has an element type nothing is computed in.
    #[error("{name} has dtype {dtype}, but only F32, F16 and BF16 can be used")]
    Dtype {
        /// The tensor.
        name: String,
        /// Its type.
        dtype: String,
    },
    /// Tensors that nothing uses.
    #[error(
        "its weights have {}, which its settings do not ask for: what they change is unknown, so the adapter is refused",
        some(names)
    )]
    Unused {
        /// The tensors.
        names: Vec<String>,
    },
}

impl Published {
    /// Resolves an adapter's settings against its base model and the header of its weights.
    ///
    /// # Errors
    /// [`Error`] if they do not fit, or a tensor is missing, of another shape or dtype, or not used.
    pub fn new(
        config: &ModelConfig,
        settings: &AdapterConfig,
        tensors: &BTreeMap<String, TensorEntry>,
    ) -> Result<Self, Error> {
        let mut resolved = targets::resolve(config, &settings.lora)?;
        // PEFT compares these names without a dot: `norm` also means `input_layernorm`. An adapter of
        // ours has only what we mean by them; the file tells.
        let all = modules::modules(config);
        let is_meant = |path: &str| {
            settings.lora.modules_to_save.iter().any(|name| path.ends_with(name.as_str()))
        };
        let is_there = |path: &str| tensors.contains_key(&format!("{PREFIX}{path}.weight"));
        for module in all.iter().filter(|module| is_meant(&module.path) && is_there(&module.path)) {
            if !resolved.saved.contains(module) {
                resolved.saved.push(module.clone());
            }
        }
        resolved.targets.retain(|module| !resolved.saved.contains(module));
        // Names that mean nothing have no effect in PEFT either, as long as some mean something.
        let attachment = LoraAttachment::new(&settings.lora, resolved)?;
        if settings.ties_adapters && config.tie_word_embeddings && attachment.unties() {
            return Err(Error::Tied);
        }
        let copies = account(config, &attachment, tensors)?;
        Ok(Self { attachment, copies })
    }
}

/// Checks that what is trained is there and nothing else is; returns the copies of base tensors.
fn account(
    config: &ModelConfig,
    attachment: &LoraAttachment,
    tensors: &BTreeMap<String, TensorEntry>,
) -> Result<Vec<(String, String)>, Error> {
    let expected: BTreeMap<String, Vec<usize>> = Attachment::Lora(attachment.clone())
        .trained(config)
        .into_iter()
        .map(|spec| (format!("{PREFIX}{}", spec.name), spec.shape))
        .collect();
    for (name, shape) in &expected {
        let Some(found) = tensors.get(name) else {
            return Err(Error::Missing { name: name.clone() });
        };
        check(name, found, shape, "the adapter is of another model")?;
    }
    let (mut copies, mut unused) = (Vec::new(), Vec::new());
    for (name, found) in tensors.iter().filter(|(name, _)| !expected.contains_key(*name)) {
        let Some(base) = copied(name) else {
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

/// Returns the base model's tensor that one of an adapter repeats: PEFT saves embedding and head beside
/// adapters on them, and wherever it finds that the vocabulary was resized.
///
/// # Source
/// `get_peft_model_state_dict` of `peft/utils/save_and_load.py`, 0.21.2, `save_embedding_layers`.
fn copied(name: &str) -> Option<String> {
    let path = name.strip_prefix(PREFIX)?.strip_suffix(".weight")?;
    let path = path.strip_suffix(".base_layer").unwrap_or(path);
    [names::EMBED_TOKENS, names::LM_HEAD].contains(&path).then(|| format!("{path}.weight"))
}

fn some(names: &[String]) -> String {
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

    /// Puts an adapter of `settings` together whose file is as it should be, but for `change`.
    fn check(
        settings: &str,
        change: impl FnOnce(&mut BTreeMap<String, TensorEntry>),
    ) -> Result<Published, Error> {
        let text = format!(r#"{{"peft_type": "LORA", "r": 4, "lora_alpha": 8, {settings}}}"#);
        let settings = config::parse(&text).unwrap();
        let attachment = Attachment::lora(&model(true), &settings.lora).unwrap();
        let mut tensors: BTreeMap<String, TensorEntry> = attachment
            .trained(&model(true))
            .into_iter()
            .map(|spec| (format!("{PREFIX}{}", spec.name), entry(&spec.shape, "F32")))
            .collect();
        change(&mut tensors);
        Published::new(&model(true), &settings, &tensors)
    }

    #[test]
    fn every_tensor_is_used_or_named() {
        let settings = r#""target_modules": ["q_proj"]"#;
        assert!(check(settings, |_| {}).is_ok());
        let layer = "base_model.model.model.layers.0.self_attn.q_proj";
        let with = |name: String, found: TensorEntry| {
            check(settings, |tensors| drop(tensors.insert(name, found))).unwrap_err().to_string()
        };
        let said = [
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
        insta::assert_snapshot!(said.join("\n"), @r"
its weights have base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias, which its settings do not ask for: what they change is unknown, so the adapter is refused
its weights have base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector, which its settings do not ask for: what they change is unknown, so the adapter is refused
its weights have base_model.model.score.weight, which its settings do not ask for: what they change is unknown, so the adapter is refused
its weights have model.layers.1.mlp.up_proj.weight, which its settings do not ask for: what they change is unknown, so the adapter is refused
base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight is [8, 64], not [4, 64]: the adapter is of another model
base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight has dtype I8, but only F32, F16 and BF16 can be used
base_model.model.lm_head.weight is [101, 64], not [100, 64]: the base model's vocabulary was changed for this adapter
its weights lack base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight: the adapter is of another model, or damaged
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
    fn the_file_tells_which_norms_are_meant() {
        let settings = r#""target_modules": ["q_proj"], "modules_to_save": ["norm"]"#;
        assert_eq!(check(settings, |_| {}).unwrap().attachment.saved, ["model.norm"]);
        let name = "model.layers.1.input_layernorm";
        let published = check(settings, |tensors| {
            tensors.insert(format!("{PREFIX}{name}.weight"), entry(&[64], "F32"));
        });
        assert_eq!(published.unwrap().attachment.saved, ["model.norm", name]);
    }

    #[test]
    fn names_that_mean_nothing_have_no_effect() {
        let settings = r#""target_modules": ["q_proj", "W_pack"], "exclude_modules": ["vision"]"#;
        let text = format!(r#"{{"peft_type": "LORA", "r": 4, "lora_alpha": 8, {settings}}}"#);
        let settings = config::parse(&text).unwrap();
        let unmatched = targets::resolve(&model(true), &settings.lora).unwrap().unmatched;
        assert_eq!(unmatched.len(), 2);
        let error = Published::new(&model(true), &settings, &BTreeMap::new()).unwrap_err();
        assert!(matches!(error, Error::Missing { .. }), "{error}");
    }
}
