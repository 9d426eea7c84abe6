//! What is trained: all of the model, or adapters on some modules and some modules whole.
//!
//! Pure: from a config and the user's settings to the list of trained tensors. It is the one
//! place where LoRA and full-parameter fine-tuning differ before export.

use std::collections::BTreeMap;

use finetune_contract::{LoraFacts, LoraSettings};

use crate::{
    architecture::{
        config::ModelConfig,
        modules::{self, Module, TensorSpec},
        names,
    },
    lora::{
        Error,
        targets::{self, Resolved},
    },
};

/// What is trained of a model.
#[derive(Debug, Clone, PartialEq)]
pub enum Attachment {
    /// Nothing: the model is only evaluated.
    Frozen,
    /// Everything.
    Full,
    /// Adapters, and some modules whole.
    Lora(LoraAttachment),
}

/// Adapters on modules, resolved to checkpoint paths.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraAttachment {
    /// The rank.
    pub r: usize,
    /// The factor on each product.
    pub scaling: f64,
    /// Module path → (out, in) of each adapted module.
    pub targets: BTreeMap<String, (usize, usize)>,
    /// Paths of modules trained whole.
    pub saved: Vec<String>,
}

impl Attachment {
    /// Resolves the settings that a user asks for: every name must mean something.
    ///
    /// # Errors
    /// [`Error`] for names that match nothing, a rank that does not fit, or nothing to train.
    pub fn lora(config: &ModelConfig, settings: &LoraSettings) -> Result<Self, Error> {
        let resolved = targets::resolve(config, settings)?;
        if let Some((field, name)) = resolved.unmatched.first() {
            let name = name.clone();
            return Err(if *field == targets::EXCLUDE_MODULES {
                Error::UnusedExclusion { field, name }
            } else {
                Error::UnknownModule { field, name, known: leaves(config) }
            });
        }
        LoraAttachment::new(settings, resolved).map(Self::Lora)
    }

    /// Lists the trained tensors, in the order of the flat parameters.
    pub fn trained(&self, config: &ModelConfig) -> Vec<TensorSpec> {
        match self {
            Self::Frozen => Vec::new(),
            Self::Full => config.tensors(),
            Self::Lora(lora) => {
                let spec =
                    |name: String, shape: [usize; 2]| TensorSpec { name, shape: shape.to_vec() };
                let mut tensors = Vec::new();
                let modules = modules::modules(config);
                for readers in
                    modules.chunk_by(|one, other| names::share_input(&one.path, &other.path))
                {
                    let adapted = || {
                        readers.iter().filter_map(|module| {
                            let sizes = lora.targets.get(&module.path)?;
                            Some((adapter_names(&module.path), *sizes))
                        })
                    };
                    // `A` of layers with one input lie together: one product serves them all.
                    tensors.extend(adapted().map(|([a, _], (_, width))| spec(a, [lora.r, width])));
                    tensors.extend(adapted().map(|([_, b], (out, _))| spec(b, [out, lora.r])));
                    let saved = readers.iter().filter(|module| lora.saved.contains(&module.path));
                    tensors.extend(saved.flat_map(Module::tensors));
                }
                tensors
            }
        }
    }
}

impl LoraAttachment {
    /// Takes what settings resolved to.
    ///
    /// # Errors
    /// [`Error::RankTooLarge`] or [`Error::Nothing`].
    pub(crate) fn new(settings: &LoraSettings, resolved: Resolved) -> Result<Self, Error> {
        let sizes = |module: Module| Some((module.adapter_sizes()?, module.path));
        let targets: BTreeMap<String, (usize, usize)> = resolved
            .targets
            .into_iter()
            .filter_map(sizes)
            .map(|(sizes, path)| (path, sizes))
            .collect();
        let saved: Vec<String> = resolved.saved.into_iter().map(|module| module.path).collect();
        for (path, &(out, width)) in &targets {
            if settings.r as usize > out.min(width) {
                return Err(Error::RankTooLarge { r: settings.r, path: path.clone(), out, width });
            }
        }
        if targets.is_empty() && saved.is_empty() {
            return Err(Error::Nothing);
        }
        Ok(Self { r: settings.r as usize, scaling: settings.scaling(), targets, saved })
    }

    /// Returns what the plan is told.
    pub fn facts(&self, config: &ModelConfig) -> LoraFacts {
        let all = modules::modules(config);
        let shapes = |is_chosen: &dyn Fn(&String) -> bool| {
            modules::shapes(all.iter().filter(|module| is_chosen(&module.path)))
        };
        LoraFacts {
            targets: shapes(&|path| self.targets.contains_key(path)),
            saved: shapes(&|path| self.saved.contains(path)),
            unties: config.tie_word_embeddings && self.unties(),
        }
    }

    /// Tells whether the head must stop being the embedding: one of them changes without the other.
    pub fn unties(&self) -> bool {
        [names::EMBED_TOKENS, names::LM_HEAD].iter().any(|&path| {
            self.targets.contains_key(path) || self.saved.iter().any(|saved| saved == path)
        })
    }
}

/// Returns the names of an adapter's two tensors, as PEFT has them below `base_model.model.`.
pub fn adapter_names(path: &str) -> [String; 2] {
    if path == names::EMBED_TOKENS {
        ["A", "B"].map(|side| format!("{path}.lora_embedding_{side}"))
    } else {
        ["A", "B"].map(|side| format!("{path}.lora_{side}.weight"))
    }
}

/// Lists the leaf names of a model's modules.
fn leaves(config: &ModelConfig) -> Vec<String> {
    let modules = modules::modules(config);
    let mut leaves: Vec<String> =
        modules.iter().map(|module| names::leaf(&module.path).to_owned()).collect();
    leaves.sort();
    leaves.dedup();
    leaves
}

#[cfg(test)]
mod tests {
    use finetune_contract::TargetModules;

    use super::*;

    fn config() -> ModelConfig {
        ModelConfig::parse(
            r#"{"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "tie_word_embeddings": true}"#,
        )
        .unwrap()
    }

    fn settings(targets: &[&str], saved: &[&str]) -> LoraSettings {
        let owned = |list: &[&str]| list.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        LoraSettings {
            r: 4,
            lora_alpha: 16.0,
            lora_dropout: 0.0,
            target_modules: if targets == ["all-linear"] {
                TargetModules::AllLinear
            } else {
                TargetModules::List(owned(targets))
            },
            modules_to_save: owned(saved),
            exclude_modules: None,
            layers_to_transform: Vec::new(),
            use_rslora: false,
        }
    }

    fn trained(targets: &[&str], saved: &[&str]) -> String {
        match Attachment::lora(&config(), &settings(targets, saved)) {
            Ok(attachment) => {
                let in_one_block = |spec: &TensorSpec| !spec.name.contains("layers.1.");
                let lines = attachment.trained(&config()).into_iter().filter(in_one_block);
                lines
                    .map(|spec| format!("{} {:?}", spec.name, spec.shape))
                    .collect::<Vec<_>>()
                    .join("\n")
            }
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn all_linear_means_the_linear_layers_of_every_block() {
        insta::assert_snapshot!(trained(&["all-linear"], &[]), @r"
        model.layers.0.self_attn.q_proj.lora_A.weight [4, 64]
        model.layers.0.self_attn.k_proj.lora_A.weight [4, 64]
        model.layers.0.self_attn.v_proj.lora_A.weight [4, 64]
        model.layers.0.self_attn.q_proj.lora_B.weight [64, 4]
        model.layers.0.self_attn.k_proj.lora_B.weight [32, 4]
        model.layers.0.self_attn.v_proj.lora_B.weight [32, 4]
        model.layers.0.self_attn.o_proj.lora_A.weight [4, 64]
        model.layers.0.self_attn.o_proj.lora_B.weight [64, 4]
        model.layers.0.mlp.gate_proj.lora_A.weight [4, 64]
        model.layers.0.mlp.up_proj.lora_A.weight [4, 64]
        model.layers.0.mlp.gate_proj.lora_B.weight [96, 4]
        model.layers.0.mlp.up_proj.lora_B.weight [96, 4]
        model.layers.0.mlp.down_proj.lora_A.weight [4, 96]
        model.layers.0.mlp.down_proj.lora_B.weight [64, 4]
        ");
    }

    #[test]
    fn embedding_adapters_are_the_other_way_round() {
        insta::assert_snapshot!(trained(&["embed_tokens", "lm_head"], &["model.norm"]), @r"
        model.embed_tokens.lora_embedding_A [4, 100]
        model.embed_tokens.lora_embedding_B [64, 4]
        model.norm.weight [64]
        lm_head.lora_A.weight [4, 64]
        lm_head.lora_B.weight [100, 4]
        ");
    }

    #[test]
    fn says_what_does_not_fit() {
        let mut too_large = settings(&["k_proj"], &[]);
        too_large.r = 33;
        insta::assert_snapshot!(Attachment::lora(&config(), &too_large).unwrap_err(), @r#"loraConfig.r is 33, larger than "model.layers.0.self_attn.k_proj" (32 x 64): use at most 32"#);
        insta::assert_snapshot!(trained(&["q_porj"], &[]), @r#"loraConfig.targetModules names "q_porj", which no module of this model is called: use down_proj, embed_tokens, gate_proj, input_layernorm, k_proj, lm_head, norm, o_proj, post_attention_layernorm, q_proj, up_proj, v_proj"#);
        assert_eq!(
            trained(&["q_proj"], &["q_proj"]),
            trained(&[], &["q_proj"]),
            "PEFT trains it whole"
        );
        insta::assert_snapshot!(trained(&[], &[]), @"loraConfig means no module: nothing would be trained");
    }
}
