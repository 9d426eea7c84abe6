//! What is trained: the whole model, or LoRA adapters and the modules of `modulesToSave`.
//!
//! A pure function from a config and the user's settings to the list of trained tensors. Before
//! export this is the only place where LoRA and full-parameter fine-tuning differ.

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

/// The trainable part of a model.
#[derive(Debug, Clone, PartialEq)]
pub enum Trainable {
    /// Nothing: the model is only evaluated.
    Frozen,
    /// Every parameter.
    Full,
    /// LoRA adapters and the modules to save.
    Lora(LoraAdapters),
}

/// LoRA adapters on modules, resolved to checkpoint paths.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraAdapters {
    /// The rank, `R`.
    pub r: usize,
    /// The factor on each adapter's product: `alpha / r`, or `alpha / √r` with rsLoRA.
    pub scaling: f64,
    /// Module path → (out, in) of each adapted module.
    pub targets: BTreeMap<String, (usize, usize)>,
    /// Paths of the modules that are trained in full, PEFT's `modules_to_save`.
    pub modules_to_save: Vec<String>,
}

impl Trainable {
    /// Resolves the settings of a user: every name must match a module.
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
        LoraAdapters::new(settings, resolved).map(Self::Lora)
    }

    /// Lists the trained tensors, in the order of the flat parameters.
    pub fn trained_tensors(&self, config: &ModelConfig) -> Vec<TensorSpec> {
        match self {
            Self::Frozen => Vec::new(),
            Self::Full => config.tensors(),
            Self::Lora(lora) => {
                let spec =
                    |name: String, shape: [usize; 2]| TensorSpec { name, shape: shape.to_vec() };
                let mut tensors = Vec::new();
                let modules = modules::modules(config);
                for siblings in
                    modules.chunk_by(|one, other| names::share_input(&one.path, &other.path))
                {
                    let adapted = || {
                        siblings.iter().filter_map(|module| {
                            let sizes = lora.targets.get(&module.path)?;
                            Some((adapter_names(&module.path), *sizes))
                        })
                    };
                    // The `lora_A` of layers that share an input are neighbours, so that one
                    // product computes them all.
                    tensors.extend(adapted().map(|([a, _], (_, width))| spec(a, [lora.r, width])));
                    tensors.extend(adapted().map(|([_, b], (out, _))| spec(b, [out, lora.r])));
                    let saved = siblings
                        .iter()
                        .filter(|module| lora.modules_to_save.contains(&module.path));
                    tensors.extend(saved.flat_map(Module::tensors));
                }
                tensors
            }
        }
    }
}

impl LoraAdapters {
    /// Checks resolved settings.
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
        let modules_to_save: Vec<String> =
            resolved.modules_to_save.into_iter().map(|module| module.path).collect();
        for (path, &(out, width)) in &targets {
            if settings.r as usize > out.min(width) {
                return Err(Error::RankTooLarge { r: settings.r, path: path.clone(), out, width });
            }
        }
        if targets.is_empty() && modules_to_save.is_empty() {
            return Err(Error::Nothing);
        }
        Ok(Self { r: settings.r as usize, scaling: settings.scaling(), targets, modules_to_save })
    }

    /// Returns the shapes that the planner needs.
    pub fn facts(&self, config: &ModelConfig) -> LoraFacts {
        let all = modules::modules(config);
        let shapes = |is_chosen: &dyn Fn(&String) -> bool| {
            modules::shapes(all.iter().filter(|module| is_chosen(&module.path)))
        };
        LoraFacts {
            targets: shapes(&|path| self.targets.contains_key(path)),
            saved: shapes(&|path| self.modules_to_save.contains(path)),
            unties: config.tie_word_embeddings && self.unties_embeddings(),
        }
    }

    /// Reports whether tied embeddings must become two tensors because one changes without the
    /// other.
    pub fn unties_embeddings(&self) -> bool {
        [names::EMBED_TOKENS, names::LM_HEAD].iter().any(|&path| {
            self.targets.contains_key(path)
                || self.modules_to_save.iter().any(|saved| saved == path)
        })
    }
}

/// Returns the names of `lora_A` and `lora_B` of a module, as PEFT writes them below
/// `base_model.model.`.
pub fn adapter_names(path: &str) -> [String; 2] {
    if path == names::EMBED_TOKENS {
        ["A", "B"].map(|matrix| format!("{path}.lora_embedding_{matrix}"))
    } else {
        ["A", "B"].map(|matrix| format!("{path}.lora_{matrix}.weight"))
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
        match Trainable::lora(&config(), &settings(targets, saved)) {
            Ok(trainable) => {
                let in_one_block = |spec: &TensorSpec| !spec.name.contains("layers.1.");
                let lines = trainable.trained_tensors(&config()).into_iter().filter(in_one_block);
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
    fn adapters_of_the_embedding_are_transposed() {
        insta::assert_snapshot!(trained(&["embed_tokens", "lm_head"], &["model.norm"]), @r"
        model.embed_tokens.lora_embedding_A [4, 100]
        model.embed_tokens.lora_embedding_B [64, 4]
        model.norm.weight [64]
        lm_head.lora_A.weight [4, 64]
        lm_head.lora_B.weight [100, 4]
        ");
    }

    #[test]
    fn errors_name_the_setting_and_the_module() {
        let mut too_large = settings(&["k_proj"], &[]);
        too_large.r = 33;
        insta::assert_snapshot!(Trainable::lora(&config(), &too_large).unwrap_err(), @r#"loraConfig.r is 33, larger than "model.layers.0.self_attn.k_proj" (32 x 64): use at most 32"#);
        insta::assert_snapshot!(trained(&["q_porj"], &[]), @r#"loraConfig.targetModules has "q_porj", which matches no module of this model: use down_proj, embed_tokens, gate_proj, input_layernorm, k_proj, lm_head, norm, o_proj, post_attention_layernorm, q_proj, up_proj, v_proj"#);
        assert_eq!(
            trained(&["q_proj"], &["q_proj"]),
            trained(&[], &["q_proj"]),
            "as in PEFT, it is trained in full"
        );
        insta::assert_snapshot!(trained(&[], &[]), @"loraConfig selects no module: nothing would be trained");
    }
}
