//! The modules of a model, by checkpoint path.

use finetune_contract::ModuleShape;

use crate::architecture::{config::ModelConfig, names};

/// The name and shape of one tensor of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// The checkpoint name, such as `model.layers.3.self_attn.q_proj.weight`.
    pub name: String,
    /// The shape.
    pub shape: Vec<usize>,
}

/// A module that holds weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// Its checkpoint path.
    pub path: String,
    /// The shape of its `weight`.
    pub shape: Vec<usize>,
    /// The elements of its `bias`, if it has one.
    pub bias: Option<usize>,
    /// What it is.
    pub kind: Kind,
}

/// What a module is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The token embedding.
    Embedding,
    /// A linear layer of a block.
    Linear,
    /// The output head.
    Head,
    /// A norm.
    Norm,
}

impl Module {
    /// Returns whether a LoRA adapter can be put on it.
    pub fn is_adaptable(&self) -> bool {
        self.kind != Kind::Norm
    }

    /// Returns (out, in) of its adapter; an embedding maps `V` inputs to `D`.
    pub fn adapter_sizes(&self) -> Option<(usize, usize)> {
        let &[rows, columns] = self.shape.as_slice() else { return None };
        Some(if self.kind == Kind::Embedding { (columns, rows) } else { (rows, columns) })
    }

    /// Lists its tensors.
    pub fn tensors(&self) -> impl Iterator<Item = TensorSpec> {
        let weight =
            TensorSpec { name: format!("{}.weight", self.path), shape: self.shape.clone() };
        let bias = self
            .bias
            .map(|width| TensorSpec { name: format!("{}.bias", self.path), shape: vec![width] });
        std::iter::once(weight).chain(bias)
    }
}

impl ModelConfig {
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
        let modules = modules(self);
        let has_weights = |module: &&Module| module.kind != Kind::Head || !self.tie_word_embeddings;
        shapes(modules.iter().filter(has_weights))
    }

    /// Counts the elements of all tensors, a tied head once.
    pub fn parameters(&self) -> u64 {
        self.modules().iter().map(ModuleShape::parameters).sum()
    }
}

/// Lists every module, the output head also where it is the embedding.
pub fn modules(config: &ModelConfig) -> Vec<Module> {
    let vocabulary = vec![config.vocab_size, config.hidden_size];
    let plain = |path: String, shape: Vec<usize>, kind| Module { path, shape, bias: None, kind };
    let mut modules =
        vec![plain(names::EMBED_TOKENS.to_owned(), vocabulary.clone(), Kind::Embedding)];
    for layer in 0..config.num_hidden_layers {
        for (path, width) in config.block_norms() {
            modules.push(plain(names::in_block(layer, path), vec![width], Kind::Norm));
        }
        for (path, out, width, bias) in config.block_linears() {
            modules.push(Module {
                path: names::in_block(layer, path),
                shape: vec![out, width],
                bias: bias.then_some(out),
                kind: Kind::Linear,
            });
        }
    }
    modules.push(plain(names::NORM.to_owned(), vec![config.hidden_size], Kind::Norm));
    modules.push(plain(names::LM_HEAD.to_owned(), vocabulary, Kind::Head));
    modules
}

/// Lists the paths that hold no weights of their own: what PEFT finds there it cannot adapt.
pub fn containers(config: &ModelConfig) -> Vec<String> {
    let mut paths = vec!["model".to_owned(), "model.layers".to_owned()];
    paths.push("model.rotary_emb".to_owned());
    for layer in 0..config.num_hidden_layers {
        paths.push(format!("model.layers.{layer}"));
        for path in ["self_attn", "mlp", "mlp.act_fn"] {
            paths.push(names::in_block(layer, path));
        }
    }
    paths
}

/// Returns the shapes of some modules, one entry for all of a leaf name.
pub fn shapes<'a>(modules: impl Iterator<Item = &'a Module>) -> Vec<ModuleShape> {
    let mut shapes: Vec<ModuleShape> = Vec::new();
    for module in modules {
        let name = names::leaf(&module.path);
        if let Some(shape) = shapes.iter_mut().find(|shape| shape.name == name) {
            shape.count += 1;
            continue;
        }
        shapes.push(ModuleShape {
            name: name.to_owned(),
            out_features: module.shape[0] as u32,
            in_features: module.shape.get(1).map_or(0, |&width| width as u32),
            bias: module.bias.is_some(),
            count: 1,
        });
    }
    shapes
}
