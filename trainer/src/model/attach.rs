//! What is trained: all of the model, or adapters on some modules and some modules whole.
//!
//! Pure: from a config and the user's settings to the list of trained tensors. It is the one
//! place where LoRA and full-parameter fine-tuning differ before export.

use std::collections::BTreeMap;

use finetune_contract::{LoraSettings, TargetModules};

use super::{
    config::{ModelConfig, TensorSpec},
    names,
};

/// Why settings do not fit a model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A name matches no module.
    #[error("{field} names {name:?}, which no module of this model is called: use {}", known.join(", "))]
    UnknownModule {
        /// The field, in the manifest's words.
        field: &'static str,
        /// The name.
        name: String,
        /// The leaf names there are.
        known: Vec<String>,
    },
    /// A module is both adapted and trained whole.
    #[error("{path:?} is matched by targetModules and by modulesToSave: leave it in one of them")]
    Both {
        /// The module.
        path: String,
    },
    /// The rank is larger than a layer.
    #[error("loraConfig.r is {r}, larger than {path:?} ({out} x {width}): use at most {}", out.min(width))]
    RankTooLarge {
        /// The rank.
        r: u32,
        /// The module.
        path: String,
        /// Its output width.
        out: usize,
        /// Its input width.
        width: usize,
    },
    /// Nothing is trained.
    #[error("targetModules and modulesToSave are both empty: nothing would be trained")]
    Nothing,
}

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
    /// Resolves LoRA settings against a model.
    ///
    /// # Errors
    /// [`Error`] for names that match nothing, a rank that does not fit, or nothing to train.
    pub fn lora(config: &ModelConfig, settings: &LoraSettings) -> Result<Self, Error> {
        let modules = modules(config);
        let known = || {
            let mut leaves: Vec<String> =
                modules.iter().map(|module| names::leaf(&module.path).to_owned()).collect();
            leaves.sort();
            leaves.dedup();
            leaves
        };
        let unknown = |field, name: &String| Error::UnknownModule {
            field,
            name: name.clone(),
            known: known(),
        };
        let mut targets = BTreeMap::new();
        match &settings.target_modules {
            TargetModules::AllLinear => {
                targets.extend(
                    modules.iter().filter(|module| module.is_block_linear).map(Module::target),
                );
            }
            TargetModules::List(list) => {
                for name in list {
                    let adaptable = modules.iter().filter(|module| module.shape.len() == 2);
                    let matched: Vec<_> = adaptable
                        .filter(|module| names::matches(name, &module.path))
                        .map(Module::target)
                        .collect();
                    if matched.is_empty() {
                        return Err(unknown("loraConfig.targetModules", name));
                    }
                    targets.extend(matched);
                }
            }
        }
        let mut saved = Vec::new();
        for name in &settings.modules_to_save {
            let matched: Vec<_> =
                modules.iter().filter(|module| names::matches(name, &module.path)).collect();
            if matched.is_empty() {
                return Err(unknown("loraConfig.modulesToSave", name));
            }
            saved.extend(matched.into_iter().map(|module| module.path.clone()));
        }
        saved.sort();
        saved.dedup();
        if let Some(path) = saved.iter().find(|path| targets.contains_key(*path)) {
            return Err(Error::Both { path: path.clone() });
        }
        for (path, &(out, width)) in &targets {
            if settings.r as usize > out.min(width) {
                return Err(Error::RankTooLarge { r: settings.r, path: path.clone(), out, width });
            }
        }
        if targets.is_empty() && saved.is_empty() {
            return Err(Error::Nothing);
        }
        Ok(Self::Lora(LoraAttachment {
            r: settings.r as usize,
            scaling: settings.scaling(),
            targets,
            saved,
        }))
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
                let modules = modules(config);
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
                    for module in readers.iter().filter(|module| lora.saved.contains(&module.path))
                    {
                        tensors.push(TensorSpec {
                            name: format!("{}.weight", module.path),
                            shape: module.shape.clone(),
                        });
                        tensors.extend(module.bias.map(|width| TensorSpec {
                            name: format!("{}.bias", module.path),
                            shape: vec![width],
                        }));
                    }
                }
                tensors
            }
        }
    }
}

impl LoraAttachment {
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

/// A module that holds weights.
struct Module {
    path: String,
    shape: Vec<usize>,
    bias: Option<usize>,
    is_block_linear: bool,
}

impl Module {
    /// Returns the path with (out, in) of its adapter; an embedding maps `V` inputs to `D`.
    fn target(&self) -> (String, (usize, usize)) {
        let (rows, columns) = (self.shape[0], self.shape[1]);
        let sizes =
            if self.path == names::EMBED_TOKENS { (columns, rows) } else { (rows, columns) };
        (self.path.clone(), sizes)
    }
}

/// Lists every module, the head also when it is tied.
fn modules(config: &ModelConfig) -> Vec<Module> {
    let vocabulary = vec![config.vocab_size, config.hidden_size];
    let outer = |path: &str, shape: Vec<usize>| Module {
        path: path.to_owned(),
        shape,
        bias: None,
        is_block_linear: false,
    };
    let mut modules = vec![outer(names::EMBED_TOKENS, vocabulary.clone())];
    for layer in 0..config.num_hidden_layers {
        for (path, width) in config.block_norms() {
            modules.push(outer(&names::in_block(layer, path), vec![width]));
        }
        for (path, out, width, bias) in config.block_linears() {
            modules.push(Module {
                path: names::in_block(layer, path),
                shape: vec![out, width],
                bias: bias.then_some(out),
                is_block_linear: true,
            });
        }
    }
    modules.push(outer(names::NORM, vec![config.hidden_size]));
    modules.push(outer(names::LM_HEAD, vocabulary));
    modules
}

#[cfg(test)]
mod tests {
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
        insta::assert_snapshot!(trained(&["q_proj"], &["q_proj"]), @r#""model.layers.0.self_attn.q_proj" is matched by targetModules and by modulesToSave: leave it in one of them"#);
        insta::assert_snapshot!(trained(&[], &[]), @"targetModules and modulesToSave are both empty: nothing would be trained");
    }
}
