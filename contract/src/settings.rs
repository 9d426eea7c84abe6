//! The words shared by the documents of the contract.

use serde::{Deserialize, Serialize};

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
    pub uri: String,
    /// The hub revision: a branch, tag or commit. Only for `hf://`; the hub's default branch if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
}

/// Where the rows come from and how to read them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DatasetSource {
    /// A JSONL file (`.jsonl`, `.jsonl.gz`, `.jsonl.zst`) or a prefix that ends in `/`.
    pub train: String,
    /// The held-out rows, in the same forms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation: Option<String>,
    /// The rows' shape.
    pub format: DatasetFormat,
    /// What happens to a row longer than the context.
    pub on_overflow: OnOverflow,
}

/// The shape of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum DatasetFormat {
    /// Decided by the keys of the first row; every row must then have that shape.
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
}

/// What happens to a row with more tokens than the context length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum OnOverflow {
    /// Keep the first `contextLength` tokens.
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
    /// The named leaves, such as `q_proj`; matched as PEFT matches a list.
    List(Vec<String>),
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
    pub uri: String,
    /// Whether a LoRA run also publishes the merged model (at `uri`, the adapter under `adapter/`).
    pub merge: bool,
    /// Whether a result of another run at `uri` may be replaced.
    pub overwrite: bool,
    /// The `base_model_name_or_path` written into the adapter; the model's URI without scheme if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_model_name: Option<String>,
}

/// The element type of the computation. Trained state is always fp32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
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
    /// The processor.
    #[default]
    Cpu,
    /// A GPU of NVIDIA's, one for each rank.
    Cuda,
}

impl Device {
    /// Tells whether it is the processor.
    #[must_use]
    pub fn is_cpu(&self) -> bool {
        *self == Self::Cpu
    }
}

/// What a block keeps for its backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Recompute {
    /// Everything that is not cheap to compute again.
    None,
    /// Only its input.
    Block,
}

/// How the learning rate falls after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum LrScheduler {
    /// Half a cosine, to zero.
    Cosine,
    /// A straight line, to zero.
    Linear,
    /// It does not.
    Constant,
}

/// What takes the steps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Optimizer {
    /// AdamW with moments in fp32.
    #[default]
    Adamw,
    /// AdamW with moments of a byte each.
    Adamw8bit,
}

impl Optimizer {
    /// Tells whether it is the default, which needs no word in a document.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}
