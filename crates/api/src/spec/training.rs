//! How to train.

use finetune_contract::{Dtype, LrScheduler, Optimizer, Recompute};
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::rules::above_zero;

use super::super::quantity;

/// How to train.
#[derive(KubeSchema, Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[x_kube(validation = Rule::new("!(has(self.numEpochs) && has(self.maxSteps))").message("numEpochs and maxSteps both set the length of the run: keep one"))]
#[x_kube(validation = Rule::new("!(has(self.minLearningRateRatio) && has(self.lrSchedulerType) && self.lrSchedulerType == 'constant')").message("minLearningRateRatio is where a falling learning rate ends, but lrSchedulerType is constant: keep one"))]
#[serde(rename_all = "camelCase")]
pub struct Training {
    /// Tokens of one sequence, from 16 to 1048576, at most what the model was made for. Default:
    /// enough for 95 % of the rows. Example: 2048.
    #[schemars(range(min = 16, max = 1_048_576))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context_length: Option<i32>,
    /// Passes over the training rows, from 0.001 to 1000; 0.5 is half of them. The last step has the
    /// rows that are left. Default: what gives about 100 steps, from 1 to 10. Not together with
    /// `maxSteps`. Example: 3.
    #[schemars(with = "Option<f64>", range(min = 0.001, max = 1000.0))]
    #[x_kube(validation = above_zero())]
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "quantity::as_written")]
    pub num_epochs: Option<f64>,
    /// Optimizer steps of the whole run, from 1 to 10000000. Default: from `numEpochs`. Not together
    /// with `numEpochs`.
    #[schemars(range(min = 1, max = 10_000_000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_steps: Option<i64>,
    /// The peak learning rate of AdamW, from 1e-9 to 1. Default: 1e-4 with LoRA, 1e-5 without.
    #[schemars(range(min = 1e-9, max = 1.0))]
    #[x_kube(validation = above_zero())]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub learning_rate: Option<f64>,
    /// How the learning rate falls after the warm-up. Default: `cosine`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr_scheduler_type: Option<LrScheduler>,
    /// The final learning rate as a fraction of `learningRate`, from 0 to 1; not with the constant
    /// schedule. Default: 0. Example: 0.1.
    #[schemars(range(min = 0.0, max = 1.0))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_learning_rate_ratio: Option<f64>,
    /// Steps in which the learning rate rises from zero, from 0 to 1000000. Default: 10 % of all
    /// steps, at most 10.
    #[schemars(range(min = 0, max = 1_000_000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_warmup_steps: Option<i64>,
    /// AdamW's decoupled weight decay, from 0 to 1. Default: 0.
    #[schemars(range(min = 0.0, max = 1.0))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight_decay: Option<f64>,
    /// Gradient clipping: the largest 2-norm of the gradient, from 0 to 1000; 0 disables it. Default: 1.
    #[schemars(range(min = 0.0, max = 1000.0))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_grad_norm: Option<f64>,
    /// Sequences computed at once on a device, from 1 to 1024. Default: up to 8, as many as fit
    /// the memory.
    #[schemars(range(min = 1, max = 1024))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub train_batch_size_per_device: Option<i32>,
    /// Micro-batches summed up in one optimizer step, from 1 to 4096. Default: what makes 16
    /// sequences per step, fewer for small data.
    #[schemars(range(min = 1, max = 4096))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gradient_accumulation_steps: Option<i32>,
    /// Whether several rows share a sequence, without seeing each other. Default: true.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub packing: Option<bool>,
    /// The element type of the computation; trained state is always fp32. Default: `auto`: bf16
    /// where the CPU or GPU multiplies it natively, else fp32.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dtype: Option<Precision>,
    /// The optimizer: `adamw`, or `adamw8bit` with 8-bit optimizer state, which needs 10 instead of 16
    /// bytes per trained parameter (12 instead of 18 in bf16) and makes slightly noisier updates.
    /// Default: `adamw`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub optimizer: Option<Optimizer>,
    /// Activation checkpointing: `none` saves all activations of a block for its backward pass, `block`
    /// saves only its input, and takes about a third longer. Default: `auto`: `none` if it fits the memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recompute: Option<Recomputation>,
    /// The seed of all randomness, from 0 to 9007199254740991. Default: 42.
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<i64>,
    /// Steps between measurements of the validation loss, from 1 to 1000000. Default: a tenth of
    /// all steps.
    #[schemars(range(min = 1, max = 1_000_000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub evaluation_steps: Option<i64>,
    /// Stop after this many measurements without a better validation loss, from 0 to 1000; 0 means
    /// never. Needs `dataset.validation`. Default: 0.
    #[schemars(range(min = 0, max = 1000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub early_stopping_patience: Option<i32>,
    /// Steps between checkpoints, from 1 to 1000000. Default: about every 30 seconds, less often if that
    /// would take more than 1 % of the time.
    #[schemars(range(min = 1, max = 1_000_000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checkpoint_steps: Option<i64>,
    /// Checkpoints kept beside the best one, from 1 to 100. Default: 2.
    #[schemars(range(min = 1, max = 100))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_checkpoints_to_keep: Option<i32>,
    /// Seconds of training, over all attempts, after which the run ends before its last step and
    /// publishes the best it has, from 1 to 31536000. The learning rate falls as if there were no
    /// limit. Default: none. Example: 28800.
    #[schemars(range(min = 1, max = 31_536_000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_time_seconds: Option<i64>,
}

/// The element type of the computation, or `auto`.
#[derive(JsonSchema, Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(missing_docs, reason = "the words are described at the field")]
pub enum Precision {
    Auto,
    Bf16,
    Fp32,
}

impl Precision {
    /// Returns the type that is set; `None` if the plan chooses.
    pub const fn fixed(self) -> Option<Dtype> {
        match self {
            Self::Auto => None,
            Self::Bf16 => Some(Dtype::Bf16),
            Self::Fp32 => Some(Dtype::Fp32),
        }
    }
}

/// What a block saves for its backward pass, or `auto`.
#[derive(JsonSchema, Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(missing_docs, reason = "the words are described at the field")]
pub enum Recomputation {
    Auto,
    None,
    Block,
}

impl Recomputation {
    /// Returns what is set; `None` if the plan chooses.
    pub const fn fixed(self) -> Option<Recompute> {
        match self {
            Self::Auto => None,
            Self::None => Some(Recompute::None),
            Self::Block => Some(Recompute::Block),
        }
    }
}
