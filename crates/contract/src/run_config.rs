//! The whole of one run, decided: the trainer's configuration.

use serde::{Deserialize, Serialize};

use crate::{
    document::Document,
    parallelism::Parallelism,
    settings::{
        DatasetSource, Device, Dtype, LoraSettings, LrScheduler, ModelSource, Optimizer,
        OutputTarget, Recompute, RunId,
    },
    uri::ObjectUri,
};

/// The whole input of `finetune-trainer train`.
///
/// It says what to do, never whether to resume: the trainer looks for the newest complete
/// checkpoint of `runId` and resumes from there.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RunConfig {
    /// [`crate::CONTRACT_VERSION`].
    pub version: u32,
    /// The run.
    pub run_id: RunId,
    /// Which attempt of the run this is, from 0. It does not change the result.
    pub attempt: u32,
    /// The base model, with a hub revision pinned to a commit.
    pub model: ModelSource,
    /// The rows.
    pub dataset: DatasetSource,
    /// The adapter; absent for full-parameter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraSettings>,
    /// The directory of a published adapter of the same shape that training starts from; absent to
    /// start from nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initial_adapter: Option<ObjectUri>,
    /// A checkpoint of another run to take the weights of, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initial_checkpoint: Option<ObjectUri>,
    /// How to train.
    pub training: TrainingSettings,
    /// What it computes on; absent for the CPU.
    #[serde(default, skip_serializing_if = "Device::is_cpu")]
    pub device: Device,
    /// Over how many processes; absent for one.
    #[serde(default, skip_serializing_if = "Parallelism::is_single")]
    pub parallelism: Parallelism,
    /// Where the result goes.
    pub output: OutputTarget,
    /// The prefix of this run's checkpoints.
    pub checkpoints_uri: ObjectUri,
    /// What the preflight saw; training on anything else is refused.
    pub expected: ExpectedData,
    /// The plan's prediction of a rank's peak memory, in bytes; reported beside the measured peak.
    pub predicted_peak_bytes: u64,
    /// The plan's prediction of what a rank sends in one step, in bytes; absent for one rank.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predicted_sent_bytes: Option<u64>,
}

impl RunConfig {
    /// Returns the sequences of one optimizer step, over all ranks.
    pub fn global_batch_size(&self) -> u64 {
        let TrainingSettings { micro_batch_size, gradient_accumulation_steps, .. } = self.training;
        u64::from(self.parallelism.world_size)
            * u64::from(micro_batch_size)
            * u64::from(gradient_accumulation_steps)
    }
}

impl RunConfig {
    /// Returns the sequences of a step, over all ranks, counting steps from 0: fewer in a last step, but
    /// at least one for each rank.
    pub fn sequences_of_step(&self, step: u64) -> u64 {
        let whole = self.global_batch_size();
        match self.training.total_sequences {
            Some(total) if step + 1 >= self.training.total_steps => {
                let left = total.saturating_sub(step * whole);
                left.clamp(u64::from(self.parallelism.world_size).min(whole), whole)
            }
            _ => whole,
        }
    }
}

impl Document for RunConfig {
    const NAME: &'static str = "run config";
}

/// How to train, with nothing left open.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TrainingSettings {
    /// Positions of one sequence, at most.
    pub context_length: u32,
    /// Optimizer steps of the whole run.
    pub total_steps: u64,
    /// Sequences of the whole run: the last step has those that are left. Absent if every step is full.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_sequences: Option<u64>,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// How the learning rate falls.
    pub lr_scheduler_type: LrScheduler,
    /// The share of the peak at which the learning rate ends; absent for zero.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_learning_rate_ratio: Option<f64>,
    /// Steps of linear rise from zero.
    pub num_warmup_steps: u64,
    /// AdamW's decoupled weight decay.
    pub weight_decay: f64,
    /// The gradient's 2-norm is scaled down to this; 0 means never.
    pub max_grad_norm: f64,
    /// Sequences of one micro-batch of one rank.
    pub micro_batch_size: u32,
    /// Micro-batches of one optimizer step on each rank.
    pub gradient_accumulation_steps: u32,
    /// Whether rows share sequences.
    pub packing: bool,
    /// What takes the steps.
    #[serde(default, skip_serializing_if = "Optimizer::is_default")]
    pub optimizer: Optimizer,
    /// The element type of the computation.
    pub dtype: Dtype,
    /// What a block keeps for its backward pass.
    pub recompute: Recompute,
    /// The seed of all randomness.
    pub seed: u64,
    /// Steps between evaluations on the validation set; 0 means only at the end.
    pub evaluation_steps: u64,
    /// Evaluations without improvement before stopping; 0 means never.
    pub early_stopping_patience: u32,
    /// Steps between checkpoints; absent if the trainer decides by time and cost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint_steps: Option<u64>,
    /// Checkpoints kept beside the best.
    pub num_checkpoints_to_keep: u32,
    /// Seconds of training, over all attempts, after which the run ends with the best it has; absent
    /// for no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_time_seconds: Option<u64>,
}

/// What the preflight saw of the data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ExpectedData {
    /// [`crate::DatasetCensus::sha256`] of the training rows.
    pub train_sha256: String,
    /// The same of the validation rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation_sha256: Option<String>,
    /// Training sequences of one epoch, after overflow and packing.
    pub sequences: u64,
}
