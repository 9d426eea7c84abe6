//! What the trainer tells while it runs.

use serde::{Deserialize, Serialize};

use crate::{document::Document, settings::RunId};

/// One snapshot of a running trainer: a line on its standard output, and the body of `GET /progress`.
///
/// Fields that are not known are ignored, as in a [`RunReport`](crate::RunReport).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Progress {
    /// [`crate::CONTRACT_VERSION`].
    pub version: u32,
    /// The run.
    pub run_id: RunId,
    /// What the trainer is doing.
    pub stage: Stage,
    /// Optimizer steps done.
    pub step: u64,
    /// Optimizer steps of the whole run.
    pub total_steps: u64,
    /// Passes over the data done, as a fraction.
    pub epoch: f64,
    /// Mean loss per target token of the last step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    /// Mean loss per target token of the validation set, last evaluated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval_loss: Option<f64>,
    /// Learning rate of the last step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub learning_rate: Option<f64>,
    /// The gradient's 2-norm before clipping, of the last step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grad_norm: Option<f64>,
    /// Positions per second over the last steps (no position is padding).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_per_second: Option<f64>,
    /// Positions trained on so far.
    pub tokens_seen: u64,
    /// Seconds until the last step, estimated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eta_seconds: Option<u64>,
    /// The largest anonymous memory of the process so far, in bytes.
    pub peak_memory_bytes: u64,
    /// The step of the newest checkpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint_step: Option<u64>,
    /// Seconds training stood still for it, if this process saved it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint_stall_seconds: Option<f64>,
    /// Seconds it was being written beside training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint_write_seconds: Option<f64>,
    /// The step of the checkpoint this process went on from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resumed_from_step: Option<u64>,
}

impl Document for Progress {
    const NAME: &'static str = "progress";
}

/// What the trainer is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Stage {
    /// Bringing model and data to local disk.
    Fetching,
    /// Tokenising, mapping weights, restoring a checkpoint.
    Loading,
    /// Optimizer steps.
    Training,
    /// Losses on the validation set.
    Evaluating,
    /// Writing the result's files.
    Exporting,
    /// Uploading them.
    Publishing,
    /// Reading them back.
    Verifying,
}

impl Stage {
    /// Returns the stage as a job's status has it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Fetching => "Fetching",
            Self::Loading => "Loading",
            Self::Training => "Training",
            Self::Evaluating => "Evaluating",
            Self::Exporting => "Exporting",
            Self::Publishing => "Publishing",
            Self::Verifying => "Verifying",
        }
    }
}
