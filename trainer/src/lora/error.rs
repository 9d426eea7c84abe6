//! What can be wrong with `loraConfig` for a model.

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
    /// An exclusion excludes nothing.
    #[error(
        "{field} has {name:?}, which excludes no module that targetModules means: remove it or correct the name"
    )]
    UnusedExclusion {
        /// The field, in the manifest's words.
        field: &'static str,
        /// The name or pattern.
        name: String,
    },
    /// A pattern cannot be read, or takes too long.
    #[error(
        "{field} is the pattern {pattern:?}, which is not a regular expression that can be used: {reason}"
    )]
    Pattern {
        /// The field, in the manifest's words.
        field: &'static str,
        /// The pattern.
        pattern: String,
        /// What the reader of patterns said.
        reason: String,
    },
    /// A pattern matches no module.
    #[error(
        "loraConfig.targetModules is the pattern {pattern:?}, which matches the whole path of no module; paths are such as \"model.layers.0.self_attn.q_proj\" and \"lm_head\""
    )]
    NoMatch {
        /// The pattern.
        pattern: String,
    },
    /// What is meant takes no adapter.
    #[error(
        "loraConfig.targetModules means {path:?}, but only linear layers, embed_tokens and lm_head take an adapter: name those, or leave it out with excludeModules"
    )]
    NotAdaptable {
        /// The module.
        path: String,
    },
    /// A block that the model does not have.
    #[error("loraConfig.layersToTransform has {layer}, but the model has the layers 0 to {}", count - 1)]
    UnknownLayer {
        /// The layer.
        layer: u32,
        /// How many there are.
        count: usize,
    },
    /// Layers beside a pattern.
    #[error(
        "loraConfig.layersToTransform cannot be used where targetModules is a pattern: write the layers into the pattern"
    )]
    LayersOfPattern,
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
    #[error("loraConfig means no module: nothing would be trained")]
    Nothing,
}

impl Error {
    /// Returns the field of the manifest's `spec` that must change.
    pub fn field(&self) -> &'static str {
        match self {
            Self::UnknownModule { field, .. }
            | Self::UnusedExclusion { field, .. }
            | Self::Pattern { field, .. } => field,
            Self::NoMatch { .. } | Self::NotAdaptable { .. } => "loraConfig.targetModules",
            Self::UnknownLayer { .. } | Self::LayersOfPattern => "loraConfig.layersToTransform",
            Self::RankTooLarge { .. } => "loraConfig.r",
            Self::Nothing => "loraConfig",
        }
    }
}
