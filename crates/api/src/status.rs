//! What the operator reports of a FineTuneJob.

use finetune_contract::{Parallelism, Recompute, Strategy};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::schema;

/// The largest whole number of a status: what a JSON reader keeps exactly, 2⁵³ − 1.
pub const MAX_NUMBER: i64 = (1 << 53) - 1;
/// The largest number of optimizer steps of a status.
pub const MAX_STEPS: i64 = 10_000_000;
/// The largest loss of a status.
pub const MAX_LOSS: f64 = 1e9;
/// The largest rate of a status, in tokens per second.
pub const MAX_RATE: f64 = 1e12;

/// What is known of the run.
#[derive(JsonSchema, Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FineTuneJobStatus {
    /// The `metadata.generation` this status describes.
    #[schemars(range(min = 0, max = MAX_NUMBER))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// The run's conditions; `Succeeded` is the summary.
    #[schemars(schema_with = "schema::conditions")]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
    /// When the first training pod was asked for.
    #[schemars(schema_with = "schema::time")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_time: Option<Time>,
    /// When the run succeeded or failed for good.
    #[schemars(schema_with = "schema::time")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completion_time: Option<Time>,
    /// The current attempt, and its stage.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attempt: Option<AttemptStatus>,
    /// What was decided, once the preflight is done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plan: Option<PlanStatus>,
    /// How far the run is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress: Option<ProgressStatus>,
    /// What was published.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub result: Option<ResultStatus>,
}

/// The current attempt, and its stage.
#[derive(JsonSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AttemptStatus {
    /// The stage: `Preflight` or `Training`.
    pub step: Step,
    /// The number of the attempt, from 0; the Job's name ends in it.
    #[schemars(range(min = 0, max = 1000))]
    pub number: i32,
    /// Failed attempts of this stage.
    #[schemars(range(min = 0, max = 1000))]
    pub failures: i32,
    /// Attempts of this stage that the cluster disrupted: evictions, preemptions, lost nodes, deleted
    /// Jobs.
    #[schemars(range(min = 0, max = 1000))]
    pub disruptions: i32,
    /// The step of the checkpoint from which failures and disruptions are counted: a newer one begins
    /// both counts again.
    #[schemars(range(min = 0, max = MAX_STEPS))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub counted_from_step: Option<i64>,
    /// The UID of this attempt's Job, once it was observed.
    #[schemars(length(max = 64))]
    #[serde(rename = "jobUID", skip_serializing_if = "Option::is_none")]
    pub job_uid: Option<String>,
    /// When this attempt may start.
    #[schemars(schema_with = "schema::time")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_time: Option<Time>,
}

/// A step of a run that is a Job.
#[derive(
    JsonSchema, Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[expect(missing_docs, reason = "the words are described at the field")]
pub enum Step {
    Preflight,
    Training,
}

/// What was decided. It stays as it is whatever becomes of the settings; only running out of memory
/// changes it, to the next of its `fallbacks`.
#[derive(JsonSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PlanStatus {
    /// Names the run in the bucket.
    #[schemars(length(max = 128))]
    pub run_id: String,
    /// `LoRA` or `Full`.
    #[schemars(length(max = 16))]
    pub method: String,
    /// The accelerator of the settings that the pod gets.
    #[schemars(length(max = 63))]
    pub accelerator: String,
    /// Every value with its reason, memory and time, for people.
    #[schemars(length(max = 16384))]
    pub summary: String,
    /// Predicted peak memory of the tensors, in bytes.
    #[schemars(range(min = 0, max = MAX_NUMBER))]
    pub predicted_peak_bytes: i64,
    /// Estimated seconds of training.
    #[schemars(range(min = 0, max = MAX_NUMBER))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub estimated_seconds: Option<i64>,
    /// What the training pod asks for.
    pub pod: PodStatus,
    /// The trainer's configuration, as JSON.
    #[schemars(length(max = 32768))]
    pub run_config: String,
    /// What follows an attempt that ran out of memory, in this order; nothing else changes a plan.
    #[schemars(length(max = 32), extend("x-kubernetes-list-type" = "atomic"))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fallbacks: Vec<Fallback>,
}

/// The same steps in smaller pieces: as many sequences each, the same result.
#[derive(JsonSchema, Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Fallback {
    /// Sequences computed at once.
    #[schemars(with = "i32", range(min = 1, max = 1024))]
    pub train_batch_size_per_device: u32,
    /// Micro-batches of a step on each rank.
    #[schemars(with = "i32", range(min = 1, max = 4_194_304))]
    pub gradient_accumulation_steps: u32,
    /// `none`, or `block` for activation checkpointing.
    #[schemars(with = "String", length(max = 16))]
    pub recompute: Recompute,
    /// Ranks.
    #[schemars(with = "i32", range(min = 1, max = Parallelism::MAX_RANKS))]
    pub ranks: u32,
    /// What is divided over them: `none`, `ddp`, `zero1`, `zero2` or `zero3`.
    #[schemars(with = "String", length(max = 16))]
    pub strategy: Strategy,
    /// Predicted peak memory of the tensors, in bytes.
    #[schemars(with = "i64", range(min = 0, max = MAX_NUMBER))]
    pub predicted_peak_bytes: u64,
    /// What a rank is predicted to send in one step, in bytes.
    #[schemars(with = "Option<i64>", range(min = 0, max = MAX_NUMBER))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predicted_sent_bytes: Option<u64>,
}

/// What the training pod asks for.
#[derive(JsonSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodStatus {
    /// CPU, in thousandths of a core.
    #[schemars(range(min = 0, max = 100_000_000))]
    pub cpu_millis: i64,
    /// Memory, in bytes.
    #[schemars(range(min = 0, max = MAX_NUMBER))]
    pub memory_bytes: i64,
    /// Shared memory, in bytes, part of the memory.
    #[schemars(range(min = 0, max = MAX_NUMBER))]
    pub shared_memory_bytes: i64,
    /// Ephemeral storage, in bytes.
    #[schemars(range(min = 0, max = MAX_NUMBER))]
    pub storage_bytes: i64,
}

/// How far the run is.
#[derive(JsonSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProgressStatus {
    /// What the trainer is doing.
    #[schemars(length(max = 32))]
    pub stage: String,
    /// Optimizer steps done.
    #[schemars(range(min = 0, max = MAX_STEPS))]
    pub step: i64,
    /// Optimizer steps of the whole run.
    #[schemars(range(min = 0, max = MAX_STEPS))]
    pub total_steps: i64,
    /// The step of the newest checkpoint.
    #[schemars(range(min = 0, max = MAX_STEPS))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint_step: Option<i64>,
    /// Mean loss per target token of the last step.
    #[schemars(range(min = 0.0, max = MAX_LOSS))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    /// Mean loss per target token of the validation set, last measured.
    #[schemars(range(min = 0.0, max = MAX_LOSS))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_loss: Option<f64>,
    /// Tokens per second over the last steps.
    #[schemars(range(min = 0.0, max = MAX_RATE))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens_per_second: Option<f64>,
    /// Seconds until the last step, estimated.
    #[schemars(range(min = 0, max = MAX_NUMBER))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eta_seconds: Option<i64>,
    /// The same for people, such as `12 min`.
    #[schemars(length(max = 16))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eta: Option<String>,
    /// When this was asked of the trainer.
    #[schemars(schema_with = "schema::time")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_updated_time: Option<Time>,
}

/// What was published.
#[derive(JsonSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ResultStatus {
    /// Where it is.
    #[schemars(length(max = 1024))]
    pub uri: String,
    /// `Adapter`, `FullModel` or `MergedModel`.
    #[schemars(length(max = 32))]
    pub kind: String,
    /// SHA-256 of the manifest's bytes, in hexadecimal.
    #[schemars(length(min = 64, max = 64))]
    pub manifest_sha256: String,
    /// Optimizer steps done, over all attempts.
    #[schemars(range(min = 0, max = MAX_STEPS))]
    pub steps: i64,
    /// The largest memory of the trainer, in bytes; beside `plan.predictedPeakBytes`.
    #[schemars(range(min = 0, max = MAX_NUMBER))]
    pub measured_peak_bytes: i64,
    /// Validation loss of what was published.
    #[schemars(range(min = 0.0, max = MAX_LOSS))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_loss: Option<f64>,
}
