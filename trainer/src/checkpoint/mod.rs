//! Checkpoints: everything a run needs to go on as if it had never stopped.
//!
//! A checkpoint is one safetensors file of flat fp32 tensors and, written after it, a manifest with
//! its digest: without the manifest it does not exist. Rank 0 writes it, undivided, whatever the
//! number of ranks; parts are gathered a unit at a time. So any number of ranks reads it. There is
//! no random state and no data cursor in it, for both are pure functions of the seed and the step.
//!
//! Training stands still only for the snapshot: a copy in memory of what LoRA trains, a local file
//! of what is too large for that. A thread of its own writes it to the store, one at a time.
//! [`pace`] decides when, `snapshot` takes the state out of training's way, `writer` is the thread,
//! `archive` what is in the store.

mod archive;
pub mod pace;
mod snapshot;
mod writer;

use std::{
    path::{Path, PathBuf},
    time::Instant,
};

use finetune_contract::{FailureReason, RunConfig, StoppedEarly, artifact::checkpoint_name};
use serde::{Deserialize, Serialize};
use tracing::debug;

use crate::{
    clock,
    failure::Failure,
    model::{Model, params::Flat, weights::Checkpoint as Tensors},
    optimizer::AdamW,
    store::Store,
};
use archive::Archive;
use pace::Pace;
use snapshot::{Room, Snapshot};
pub use writer::Saved;
use writer::Writer;

const MASTER: &str = "master";
const MOMENTS: [&str; 2] = ["exp_avg", "exp_avg_sq"];

/// What a run has come to, beside its tensors.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TrainState {
    /// Optimizer steps done.
    pub step: u64,
    /// Positions trained on.
    pub tokens_seen: u64,
    /// Mean loss of the first step.
    pub first_loss: Option<f64>,
    /// Mean loss of the last step.
    pub last_loss: Option<f64>,
    /// Validation loss before the first step.
    pub base_eval_loss: Option<f64>,
    /// Validation loss last evaluated, and when.
    pub last_eval: Option<Evaluated>,
    /// The best validation loss so far, and when.
    pub best: Option<Evaluated>,
    /// Evaluations since the best.
    pub evaluations_since_best: u32,
    /// Seconds trained.
    #[serde(default)]
    pub training_seconds: f64,
    /// Why training is over before its last step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped_early: Option<StoppedEarly>,
}

/// A validation loss and the step it belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Evaluated {
    /// Optimizer steps done by then.
    pub step: u64,
    /// Mean loss per target token.
    pub loss: f64,
}

/// The checkpoints of one run.
#[derive(Debug)]
pub struct Checkpoints {
    archive: Archive,
    scratch: PathBuf,
    /// Whether a snapshot is small enough to be in memory.
    is_copied: bool,
    room: Room,
    writer: Writer,
    saved: Option<Saved>,
    pace: Pace,
    started: Instant,
}

impl Checkpoints {
    /// Opens the checkpoints of a run; files pass through `scratch`.
    pub fn new(store: Store, scratch: &Path, config: &RunConfig) -> Self {
        Self {
            archive: Archive::new(store, config),
            scratch: scratch.to_owned(),
            is_copied: config.lora.is_some(),
            room: Room::default(),
            writer: Writer::default(),
            saved: None,
            pace: Pace::new(config.training.checkpoint_steps),
            started: clock::now(),
        }
    }

    /// Tells, on rank 0, whether to save after `step`, the last of which took `step_seconds`. While
    /// another checkpoint is being written there is none to begin.
    pub fn is_due(&self, step: u64, step_seconds: f64) -> bool {
        !self.writer.is_busy() && self.pace.is_due(step, self.now(), step_seconds)
    }

    /// Begins a checkpoint to go on from, and to publish from if it is the best; training may go on
    /// when this returns. The one before is waited for. When it is complete, those beyond the ones
    /// to keep are removed.
    ///
    /// # Errors
    /// A [`Failure`] if the disk fails or another rank is lost, or of the checkpoint before; those
    /// that are complete stay.
    pub fn save(
        &mut self,
        state: &TrainState,
        model: &Model,
        optimizer: &AdamW,
    ) -> Result<(), Failure> {
        let started = clock::now();
        let tensors = tensors(model, optimizer);
        if !model.ranks().is_first() {
            return snapshot::follow(model, &tensors).map_err(Failure::from);
        }
        self.settle()?;
        let settled = clock::now();
        let snapshot = if self.is_copied {
            self.room.copy(model, &tensors)?
        } else {
            Snapshot::to_file(&self.scratch.join("checkpoint.tmp"), model, &tensors)?
        };
        let (archive, state) = (self.archive.clone(), state.clone());
        let stall_seconds = started.elapsed().as_secs_f64();
        self.pace.safe(state.step, self.now());
        // What the writer before was waited for is no price of this one.
        self.pace.stalled(settled.elapsed().as_secs_f64());
        self.writer.start(move || {
            let started = clock::now();
            archive.write(&state, &snapshot)?;
            let write_seconds = started.elapsed().as_secs_f64();
            Ok(Saved { step: state.step, stall_seconds, write_seconds })
        })
    }

    /// Takes note of a checkpoint that became complete meanwhile.
    ///
    /// # Errors
    /// A [`Failure`] if it could not be written.
    pub fn look(&mut self) -> Result<(), Failure> {
        if self.writer.is_busy() { Ok(()) } else { self.settle() }
    }

    /// Waits until the last checkpoint begun is complete.
    ///
    /// # Errors
    /// A [`Failure`] if it could not be written.
    pub fn settle(&mut self) -> Result<(), Failure> {
        if let Some(saved) = self.writer.wait()? {
            let Saved { step, stall_seconds, write_seconds } = saved;
            debug!(step, stall_seconds, write_seconds, "saved a checkpoint");
            self.pace.written(saved.write_seconds);
            self.saved = Some(saved);
        }
        Ok(())
    }

    /// Returns the last complete checkpoint of this process.
    pub fn saved(&self) -> Option<Saved> {
        self.saved
    }

    /// Restores the newest complete and undamaged checkpoint; `None` if there is none. Rank 0
    /// chooses, for all must go on from the same.
    ///
    /// # Errors
    /// A [`Failure`] of reason `CheckpointMismatch` if it belongs to other data or settings, or one
    /// of the store.
    pub fn restore_newest(
        &mut self,
        model: &mut Model,
        optimizer: &AdamW,
    ) -> Result<Option<TrainState>, Failure> {
        let ranks = model.ranks().clone();
        let mut restored = None;
        if ranks.is_first() {
            for name in self.archive.complete()?.iter().rev() {
                restored = self.read_all(name, model, optimizer)?;
                if restored.is_some() {
                    break;
                }
            }
        }
        let chosen = restored.as_ref().map_or(0, |state: &TrainState| state.step + 1);
        let chosen = ranks.from_first(chosen)?;
        if chosen > 0 && !ranks.is_first() {
            let name = checkpoint_name(chosen - 1);
            restored = self.read_all(&name, model, optimizer)?;
            if restored.is_none() {
                let message = format!(
                    "rank 0 goes on from the checkpoint {}, but rank {} reads it damaged",
                    self.archive.uri(&name),
                    ranks.rank(),
                );
                return Err(Failure::new(FailureReason::StoreUnavailable, message));
            }
        }
        self.pace.safe(restored.as_ref().map_or(0, |state| state.step), self.now());
        Ok(restored)
    }

    fn read_all(
        &self,
        name: &str,
        model: &mut Model,
        optimizer: &AdamW,
    ) -> Result<Option<TrainState>, Failure> {
        let state = self.read(name, model, &tensors(model, optimizer))?;
        model.trained_mut().refresh_compute();
        Ok(state)
    }

    /// Restores the weights of the best evaluation, which are those of its checkpoint.
    ///
    /// # Errors
    /// A [`Failure`] if they are gone or damaged.
    pub fn restore_best(&self, step: u64, model: &mut Model) -> Result<(), Failure> {
        let name = checkpoint_name(step);
        if self.read(&name, model, &[(MASTER, Flat::Floats(model.trained().master()))])?.is_none() {
            let message =
                format!("the best weights at {} are gone or damaged", self.archive.uri(&name));
            return Err(Failure::new(FailureReason::NotProven, message));
        }
        model.trained_mut().refresh_compute();
        Ok(())
    }

    /// Removes every checkpoint of the run.
    ///
    /// # Errors
    /// A [`Failure`] of the store.
    pub fn clear(&self) -> Result<(), Failure> {
        Ok(self.archive.clear()?)
    }

    /// Reads a checkpoint into tensors; `None`, with a warning, if it is damaged.
    fn read(
        &self,
        name: &str,
        model: &Model,
        into: &[(&str, Flat<'_>)],
    ) -> Result<Option<TrainState>, Failure> {
        let path = self.scratch.join("restore.tmp");
        let Some(state) = self.archive.fetch(name, &path)? else { return Ok(None) };
        let tensors = Tensors::open_file(&path);
        // The map keeps the bytes; the name is not needed any more.
        let _ = std::fs::remove_file(&path);
        let fill = || -> Result<(), crate::model::weights::Error> {
            let tensors = tensors?;
            for (tensor, target) in into {
                if let Some(sharded) = model.sharded_training() {
                    let length = sharded.layout().undivided_length();
                    sharded.restore(&tensors.tensor_of(tensor, &[length])?, *target);
                } else {
                    target.replace(&tensors.tensor_of(tensor, &[target.length() as usize])?);
                }
            }
            Ok(())
        };
        fill().map_err(|error| Failure::from_chain(FailureReason::CheckpointMismatch, &error))?;
        Ok(Some(state))
    }

    fn now(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }
}

/// Names the tensors of a checkpoint: of a divided model, this rank's parts of them.
fn tensors<'a>(model: &'a Model, optimizer: &'a AdamW) -> [(&'static str, Flat<'a>); 3] {
    let [exp_avg, exp_avg_sq] = optimizer.moments();
    [
        (MASTER, Flat::Floats(model.trained().master())),
        (MOMENTS[0], exp_avg),
        (MOMENTS[1], exp_avg_sq),
    ]
}
