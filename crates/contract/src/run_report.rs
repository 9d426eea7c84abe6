//! The trainer's last word.

use serde::{Deserialize, Serialize};

use crate::{
    artifact::ArtifactKind,
    document::{Document, TERMINATION_MESSAGE_LIMIT, render},
    exit_code::ExitCode,
    settings::RunId,
};

/// How a run ended; written to the report file, which in a pod is the termination message.
///
/// Fields that are not known are ignored: while the operator is rolled back, trainers of the newer release
/// run on and report to the older one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RunReport {
    /// [`crate::CONTRACT_VERSION`].
    pub version: u32,
    /// The run.
    pub run_id: RunId,
    /// Which attempt of it.
    pub attempt: u32,
    /// How it ended.
    pub outcome: Outcome,
    /// Optimizer steps done, over all attempts.
    pub steps: u64,
    /// Positions trained on, over all attempts.
    pub tokens_seen: u64,
    /// Training rows that could not be used and were left out, as `onInvalidRow: drop` asks; absent if
    /// there were none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows_left_out: Option<u64>,
    /// The step of the checkpoint this attempt resumed from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resumed_from_step: Option<u64>,
    /// Loss of the first and the last step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub train_loss: Option<[f64; 2]>,
    /// Validation loss before training and of what was published.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval_loss: Option<[f64; 2]>,
    /// The step whose weights were published, if an earlier one was better than the last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub best_step: Option<u64>,
    /// Why training ended before its last step; absent if it did not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped_early: Option<StoppedEarly>,
    /// The kernel that multiplied in bf16 on this CPU; absent if none did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bf16_kernel: Option<String>,
    /// Median positions per second of this attempt's steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_per_second: Option<f64>,
    /// Seconds this attempt took.
    pub duration_seconds: f64,
    /// The plan's prediction, in bytes.
    pub predicted_peak_bytes: u64,
    /// The largest anonymous memory of the process, or of its device, in bytes.
    pub measured_peak_bytes: u64,
    /// The plan's prediction of what this rank sends in one step, in bytes; absent for one rank.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predicted_sent_bytes: Option<u64>,
    /// The most it sent in one step, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measured_sent_bytes: Option<u64>,
}

impl Document for RunReport {
    const NAME: &'static str = "run report";
}

impl RunReport {
    /// Cuts a failure's message until the JSON fits the termination message.
    #[must_use]
    pub fn fit(mut self) -> Self {
        while render(&self).len() > TERMINATION_MESSAGE_LIMIT {
            let Outcome::Failed { message, .. } = &mut self.outcome else { break };
            let end = message.floor_char_boundary(message.len() * 3 / 4);
            message.truncate(end);
            message.push('…');
        }
        self
    }
}

/// Why training ended before its last step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum StoppedEarly {
    /// The validation loss no longer fell.
    Patience,
    /// It trained for `maxTimeSeconds`.
    Time,
}

impl StoppedEarly {
    /// Returns the manifest's word for the cause.
    pub const fn field(self) -> &'static str {
        match self {
            Self::Patience => "training.earlyStoppingPatience",
            Self::Time => "training.maxTimeSeconds",
        }
    }
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "result", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Outcome {
    /// The result is published, read back and verified.
    Succeeded {
        /// What was published.
        kind: ArtifactKind,
        /// Where.
        uri: String,
        /// SHA-256 of the manifest's bytes.
        manifest_sha256: String,
        /// What was verified of it.
        proof: Proof,
    },
    /// The same inputs were published before: nothing was trained.
    AlreadyPublished {
        /// What is there.
        kind: ArtifactKind,
        /// Where.
        uri: String,
        /// SHA-256 of the manifest's bytes.
        manifest_sha256: String,
        /// The run that published it.
        by: RunId,
    },
    /// The run was told to stop and resumes from its checkpoint when started again.
    Interrupted {
        /// The step of the checkpoint saved.
        checkpoint_step: u64,
    },
    /// The run failed.
    Failed {
        /// The kind.
        reason: FailureReason,
        /// What happened, to which object, and what to do.
        message: String,
    },
}

/// What was shown of a published result by reading it back.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Proof {
    /// Files whose size and SHA-256 were read back and equal the manifest's.
    pub files: u32,
    /// Bytes of them.
    pub bytes: u64,
    /// The largest change of a logit between base and result, on a row of the training data.
    pub max_logit_change: f64,
    /// Loss on that data as trained, before export, and with the result as read back; absent when
    /// an earlier attempt published and this one only read back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_trained_and_reloaded: Option<[f64; 2]>,
}

/// The kinds of failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum FailureReason {
    /// The configuration cannot be carried out.
    InvalidConfiguration,
    /// The base model cannot be used.
    InvalidModel,
    /// The dataset cannot be used, or changed since the preflight.
    InvalidDataset,
    /// A store or hub does not answer.
    StoreUnavailable,
    /// A store or hub refuses the credentials.
    PermissionDenied,
    /// A result of different inputs is at the output.
    OutputExists,
    /// The device has too little memory.
    OutOfMemory,
    /// The device of the plan is not there or does not work.
    DeviceUnavailable,
    /// The local disk is full.
    DiskFull,
    /// The loss is no longer finite.
    Diverged,
    /// The published bytes are not what was written, or do not behave as trained.
    NotProven,
    /// A checkpoint belongs to other data or settings.
    CheckpointMismatch,
    /// Another rank is gone, failed, or never came.
    PeerLost,
    /// A defect of the trainer.
    Internal,
}

impl FailureReason {
    /// Returns the process exit status that goes with the reason.
    pub const fn exit_code(self) -> ExitCode {
        match self {
            Self::InvalidConfiguration | Self::OutputExists | Self::CheckpointMismatch => {
                ExitCode::BadConfiguration
            }
            Self::InvalidModel | Self::InvalidDataset | Self::Diverged => ExitCode::BadData,
            Self::StoreUnavailable => ExitCode::StoreUnavailable,
            Self::PermissionDenied => ExitCode::PermissionDenied,
            Self::OutOfMemory => ExitCode::OutOfMemory,
            Self::DeviceUnavailable => ExitCode::DeviceUnavailable,
            Self::PeerLost => ExitCode::PeerLost,
            Self::DiskFull | Self::NotProven | Self::Internal => ExitCode::Internal,
        }
    }
}
