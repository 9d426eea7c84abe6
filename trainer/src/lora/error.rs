//! Errors of `loraConfig` for a model.

/// Why LoRA settings do not fit a model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A name matches no module.
    #[error("{field} has {name:?}, which matches no module of this model: use {}", known.join(", "))]
    UnknownModule {
        /// The field of the manifest.
        field: &'static str,
        /// The name that matches nothing.
        name: String,
        /// The leaf names of the model's modules.
        known: Vec<String>,
    },
    /// An exclusion excludes nothing.
    #[error(
        "{field} has {name:?}, which excludes none of the modules of targetModules: remove it or correct the name"
    )]
    UnusedExclusion {
        /// The field of the manifest.
        field: &'static str,
        /// The name or pattern that excludes nothing.
        name: String,
    },
    /// A pattern cannot be parsed, or takes too long to match.
    #[error(
        "{field} is the pattern {pattern:?}, which cannot be used as a regular expression: {reason}"
    )]
    Pattern {
        /// The field of the manifest.
        field: &'static str,
        /// The regular expression.
        pattern: String,
        /// The error of the regex engine.
        reason: String,
    },
    /// A pattern matches no module.
    #[error(
        "loraConfig.targetModules is the pattern {pattern:?}, which matches no module: it must match full paths such as \"model.layers.0.self_attn.q_proj\" and \"lm_head\""
    )]
    NoMatch {
        /// The regular expression.
        pattern: String,
    },
    /// A selected module cannot have an adapter.
    #[error(
        "loraConfig.targetModules selects {path:?}, but only linear layers, embed_tokens and lm_head can have an adapter: name those, or exclude it with excludeModules"
    )]
    NotAdaptable {
        /// The path of the module.
        path: String,
    },
    /// A layer that the model does not have.
    #[error("loraConfig.layersToTransform has {layer}, but the model has the layers 0 to {}", count - 1)]
    UnknownLayer {
        /// The requested layer.
        layer: u32,
        /// The number of layers.
        count: usize,
    },
    /// `layersToTransform` together with a pattern.
    #[error(
        "loraConfig.layersToTransform cannot be combined with a targetModules pattern: put the layers into the pattern"
    )]
    LayersOfPattern,
    /// The rank is larger than a layer.
    #[error("loraConfig.r is {r}, larger than {path:?} ({out} x {width}): use at most {}", out.min(width))]
    RankTooLarge {
        /// The requested rank.
        r: u32,
        /// The path of the module.
        path: String,
        /// The output width of the module.
        out: usize,
        /// The input width of the module.
        width: usize,
    },
    /// No module is selected.
    #[error("loraConfig selects no module: nothing would be trained")]
    Nothing,
}

impl Error {
    /// Returns the field of `spec` that must change.
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
