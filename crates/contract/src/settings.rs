//! The words shared by the documents of the contract.

use serde::{Deserialize, Serialize};

use crate::{rendering::RenderingSettings, uri::ObjectUri};

/// Names one run: the same manifest gives the same run, on whichever attempt.
///
/// Lower-case letters, digits, `-` and `.`; it becomes part of object keys.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RunId(pub String);

impl std::fmt::Display for RunId {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// Where the base model comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ModelSource {
    /// A directory in Hugging Face layout, a hub repository, or one `.gguf` file.
    pub uri: ObjectUri,
    /// The hub revision: a branch, tag or commit. Only for `hf://`; the hub's default branch if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// Special tokens that the model gets beside its own, each with a row of the embedding.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub added_tokens: Vec<String>,
}

impl ModelSource {
    /// Creates a source of a model as it is, of no named revision.
    pub fn of(uri: ObjectUri) -> Self {
        Self { uri, revision: None, added_tokens: Vec::new() }
    }
}

/// Where the rows come from and how to read them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DatasetSource {
    /// The training rows: a file or a prefix; absent if `sources` has them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub train: Option<ObjectUri>,
    /// Several sources of training rows, instead of `train`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<RowSource>,
    /// The held-out rows, in the same forms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation: Option<ObjectUri>,
    /// The share of the training rows that is held out, instead of `validation`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation_fraction: Option<f64>,
    /// The rows' shape, unless a source has its own.
    pub format: DatasetFormat,
    /// Which turns of a conversation are trained on.
    #[serde(default, skip_serializing_if = "TrainOn::is_default")]
    pub train_on: TrainOn,
    /// Keys of rows that are left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ignored_keys: Vec<String>,
    /// What happens to a row that cannot be used.
    #[serde(default, skip_serializing_if = "OnInvalidRow::is_default")]
    pub on_invalid_row: OnInvalidRow,
    /// What happens to a row longer than the context.
    pub on_overflow: OnOverflow,
    /// How rows become text.
    #[serde(default, skip_serializing_if = "RenderingSettings::is_default")]
    pub rendering: RenderingSettings,
    /// Decides which rows are held out and which a source's weight takes; absent if neither is asked
    /// for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
}

impl DatasetSource {
    /// Creates a source of one file or prefix, with every default.
    pub fn of(train: ObjectUri) -> Self {
        Self {
            train: Some(train),
            sources: Vec::new(),
            validation: None,
            validation_fraction: None,
            format: DatasetFormat::Auto,
            train_on: TrainOn::AllTurns,
            ignored_keys: Vec::new(),
            on_invalid_row: OnInvalidRow::Error,
            on_overflow: OnOverflow::Truncate,
            rendering: RenderingSettings::default(),
            seed: None,
        }
    }

    /// Returns every source of training rows, in order.
    pub fn train_sources(&self) -> Vec<RowSource> {
        let one = self.train.iter().map(|uri| RowSource {
            uri: uri.clone(),
            format: self.format,
            weight: 1.0,
        });
        one.chain(self.sources.iter().cloned()).collect()
    }

    /// Returns where the held-out rows come from; empty if there are none. They are not weighted.
    pub fn validation_sources(&self) -> Vec<RowSource> {
        if self.validation_fraction.is_some() {
            let unweighted = |source| RowSource { weight: 1.0, ..source };
            return self.train_sources().into_iter().map(unweighted).collect();
        }
        let uris = self.validation.iter().cloned();
        uris.map(|uri| RowSource { uri, format: self.format, weight: 1.0 }).collect()
    }

    /// Returns whether rows are held out to measure the loss on.
    pub fn has_validation(&self) -> bool {
        self.validation.is_some() || self.validation_fraction.is_some()
    }
}

/// One of several sources of rows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RowSource {
    /// A file, or a prefix that ends in `/`.
    pub uri: ObjectUri,
    /// The rows' shape.
    pub format: DatasetFormat,
    /// How often each of its rows occurs in an epoch: 2 is twice, 0.5 is half of the rows.
    pub weight: f64,
}

impl DatasetSource {
    /// Lists every place that rows and their template are read from, each with its field of the
    /// manifest.
    pub fn uris(&self) -> Vec<(&'static str, ObjectUri)> {
        let train = self.train.iter().map(|uri| ("spec.dataset.train", uri.clone()));
        let sources =
            self.sources.iter().map(|source| ("spec.dataset.sources", source.uri.clone()));
        let validation = self.validation.iter().map(|uri| ("spec.dataset.validation", uri.clone()));
        // A template that is named by a URI may also be a text, which is read where it is used.
        let template = self.rendering.template_uri().and_then(|uri| uri.parse().ok());
        let template = template.map(|uri| ("spec.dataset.chatTemplate", uri));
        train.chain(sources).chain(validation).chain(template).collect()
    }
}

/// The shape of a row.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(transform = crate::schema::words))]
pub enum DatasetFormat {
    /// Decided by the keys of the first row; every row must then have that shape.
    #[default]
    Auto,
    /// `{"messages": [{"role": …, "content": …}, …]}`.
    Messages,
    /// `{"prompt": …, "completion": …}`.
    PromptCompletion,
    /// `{"text": …}`.
    Text,
    /// `{"conversations": [{"from": …, "value": …}, …]}`.
    Sharegpt,
    /// `{"instruction": …, "input": …, "output": …}`.
    Alpaca,
    /// As `promptCompletion` or `text`, with a chat template's special tokens already in the text.
    Prerendered,
}

/// Which turns of a conversation are trained on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(transform = crate::schema::words))]
pub enum TrainOn {
    /// Every turn of the assistant's, but those the row marks.
    #[default]
    AllTurns,
    /// The assistant's last turn only.
    LastTurn,
}

impl TrainOn {
    /// Returns whether it is the default, which needs no word in a document.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// What happens to a row that cannot be used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(transform = crate::schema::words))]
pub enum OnInvalidRow {
    /// The dataset is refused.
    #[default]
    Error,
    /// It is left out and counted, up to [`MAX_INVALID_SHARE`] of all rows.
    Drop,
}

impl OnInvalidRow {
    /// Returns whether it is the default, which needs no word in a document.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// The largest share of a dataset's rows that may be dropped as invalid: more is a wrong format, not
/// a few bad rows.
pub const MAX_INVALID_SHARE: f64 = 0.1;

/// What happens to a row with more tokens than the context length.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(transform = crate::schema::words))]
pub enum OnOverflow {
    /// Keep the first `contextLength` tokens.
    #[default]
    Truncate,
    /// Leave the row out.
    Drop,
    /// Refuse the dataset.
    Error,
}

/// Which modules get an adapter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum TargetModules {
    /// Every linear layer but the output head.
    AllLinear,
    /// Modules by name: a whole path or its end at a dot, such as `q_proj` or `self_attn.q_proj`.
    List(Vec<String>),
    /// Modules whose whole path matches a regular expression.
    Pattern(String),
}

/// Some modules of a model, by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ModuleNames {
    /// Each by its whole path or its end at a dot.
    List(Vec<String>),
    /// All whose whole path matches a regular expression.
    Pattern(String),
}

/// The adapter's shape, in PEFT's words.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LoraSettings {
    /// The rank.
    pub r: u32,
    /// The scale's numerator: updates are scaled by `loraAlpha / r` (`/ √r` with rsLoRA).
    pub lora_alpha: f64,
    /// The probability of zeroing an input of the adapter while training.
    pub lora_dropout: f64,
    /// Which modules get an adapter.
    pub target_modules: TargetModules,
    /// Modules trained in full and saved whole beside the adapter.
    pub modules_to_save: Vec<String>,
    /// Modules that get no adapter though `targetModules` means them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exclude_modules: Option<ModuleNames>,
    /// The blocks whose modules get an adapter; empty for all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layers_to_transform: Vec<u32>,
    /// Whether the scale is `loraAlpha / √r`.
    pub use_rslora: bool,
}

impl LoraSettings {
    /// Returns the factor on the adapter's product.
    ///
    /// # Source
    /// LoRA (arXiv 2106.09685) §4.1; rank-stabilised LoRA (arXiv 2312.03732).
    pub fn scaling(&self) -> f64 {
        if self.use_rslora {
            self.lora_alpha / f64::from(self.r).sqrt()
        } else {
            self.lora_alpha / f64::from(self.r)
        }
    }
}

/// Where the result goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct OutputTarget {
    /// The directory or prefix that becomes the published result.
    pub uri: ObjectUri,
    /// Whether a LoRA run also publishes the merged model (at `uri`, the adapter under `adapter/`).
    pub merge: bool,
    /// Whether a result of another run at `uri` may be replaced.
    pub overwrite: bool,
    /// The `base_model_name_or_path` written into the adapter; the model's URI without scheme if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_model_name: Option<String>,
}

impl OutputTarget {
    /// Creates a target that publishes the result alone, and replaces nothing.
    pub fn of(uri: ObjectUri) -> Self {
        Self { uri, merge: false, overwrite: false, base_model_name: None }
    }
}

/// The element type of the computation. Trained state is always fp32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(transform = crate::schema::words))]
pub enum Dtype {
    /// bfloat16 weights and activations; norms, softmax, loss and optimizer in fp32.
    Bf16,
    /// float32 throughout.
    Fp32,
}

impl Dtype {
    /// Returns the bytes of one element.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Bf16 => 2,
            Self::Fp32 => 4,
        }
    }
}

/// What a run computes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Device {
    /// The CPU.
    #[default]
    Cpu,
    /// A GPU of NVIDIA's, one for each rank.
    Cuda,
}

impl Device {
    /// Returns whether it is the CPU.
    #[must_use]
    pub fn is_cpu(&self) -> bool {
        *self == Self::Cpu
    }
}

/// What a block keeps for its backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(transform = crate::schema::words))]
pub enum Recompute {
    /// Everything that is not cheap to compute again.
    None,
    /// Only its input.
    Block,
}

/// How the learning rate falls after the warm-up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(transform = crate::schema::words))]
pub enum LrScheduler {
    /// Half a cosine, to zero.
    #[default]
    Cosine,
    /// A straight line, to zero.
    Linear,
    /// It does not.
    Constant,
}

/// What takes the steps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(transform = crate::schema::words))]
pub enum Optimizer {
    /// AdamW with moments in fp32.
    #[default]
    Adamw,
    /// AdamW with 8-bit optimizer state.
    Adamw8bit,
}

impl Optimizer {
    /// Returns whether it is the default, which needs no word in a document.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}
