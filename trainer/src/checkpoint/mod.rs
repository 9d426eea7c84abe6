//! Checkpoints: everything a run needs to go on as if it had never stopped.
//!
//! A checkpoint is safetensors files of flat fp32 tensors and, written after them, a manifest with
//! their digests: without the manifest it does not exist. What every rank has whole, rank 0 writes to
//! one file; what is divided, each rank writes its part of, and rank 0 the manifest when all parts
//! are there. Any number of ranks reads either, for where elements stand is arithmetic
//! (`model/layout.rs`). There is no random state and no data cursor in it: both are pure functions of
//! the seed and the step.
//!
//! Training stands still only for the snapshot: a copy in memory of what LoRA trains, a local file
//! of what is too large for that. A thread of its own writes it to the store, one at a time.
//! [`pace`] decides when, `snapshot` takes the state out of training's way, `writer` is the thread,
//! `archive` what is in the store.

mod archive;
pub mod cadence;
pub mod initial;
mod snapshot;
mod writer;

use std::{
    path::{Path, PathBuf},
    time::Instant,
};

use finetune_contract::{
    FailureReason, InputDigests, RunConfig, StoppedEarly,
    artifact::{checkpoint_name, checkpoint_step},
};
use serde::{Deserialize, Serialize};
use tracing::{debug, warn};

use crate::{
    checkpoint::{
        archive::{Archive, Fetched, Share, StateFile},
        cadence::Pace,
        snapshot::{Room, Snapshot},
        writer::Writer,
    },
    distributed::Ranks,
    failure::Failure,
    hf::weights::{self, WeightFiles},
    model::Model,
    optim::AdamW,
    params::{
        flat::Flat,
        layout::{Move, Span, moves},
    },
    runtime::clock,
    store::{self, Store},
};
pub use writer::Saved;

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
    /// The kernel that multiplied bf16: with another, a continued run is not equal bit for bit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bf16_kernel: Option<String>,
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
    ranks: Ranks,
    /// Writes this rank's part of what is divided.
    part: Writer<StateFile>,
    /// The checkpoint whose parts are being written.
    begun: Option<Begun>,
    /// Writes what makes a checkpoint complete, on rank 0.
    writer: Writer<Saved>,
    saved: Option<Saved>,
    pace: Pace,
    started: Instant,
}

impl Drop for Checkpoints {
    /// Without the other ranks a part is worth nothing, and they may be waiting for this one.
    fn drop(&mut self) {
        self.part.abandon();
    }
}

/// A checkpoint on its way.
#[derive(Debug)]
struct Begun {
    state: TrainState,
    stall_seconds: f64,
    since: Instant,
}

impl Checkpoints {
    /// Opens the checkpoints of a run; files pass through `scratch`.
    pub fn new(
        store: Store,
        scratch: &Path,
        config: &RunConfig,
        inputs: Option<InputDigests>,
        model: &Model,
    ) -> Self {
        Self {
            archive: Archive::new(store, config, inputs, model.trained_parameters() as u64),
            scratch: scratch.to_owned(),
            is_copied: config.lora.is_some(),
            room: Room::default(),
            ranks: model.ranks().clone(),
            part: Writer::default(),
            begun: None,
            writer: Writer::default(),
            saved: None,
            pace: Pace::new(config.training.checkpoint_steps),
            started: clock::now(),
        }
    }

    /// Tells, on rank 0, whether to save after `step`, the last of which took `step_seconds`, unless
    /// parts of the one before are being written ([`Self::is_waiting_for_parts`]).
    pub fn is_due(&self, step: u64, step_seconds: f64) -> bool {
        !self.writer.is_busy() && self.pace.is_due(step, self.now(), step_seconds)
    }

    /// Tells whether a checkpoint is begun that waits for parts of some rank, as all ranks know.
    pub fn is_waiting_for_parts(&self) -> bool {
        self.begun.is_some()
    }

    /// Begins a checkpoint to go on from, and to publish from if it is the best; training may go on
    /// when this returns. The one before is waited for. When it is complete, those beyond the ones
    /// to keep are removed. All ranks must ask for it after the same step.
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
        let share = share(model);
        if share == Share::Whole && !self.ranks.is_first() {
            return Ok(());
        }
        let started = clock::now();
        self.settle()?;
        let settled = clock::now();
        let tensors = tensors(model, optimizer);
        let snapshot = if self.is_copied {
            self.room.copy(&tensors)?
        } else {
            Snapshot::to_file(&self.scratch.join("checkpoint.tmp"), &tensors)?
        };
        let stall_seconds = started.elapsed().as_secs_f64();
        self.pace.safe(state.step, self.now());
        // What the writer before was waited for is no price of this one.
        self.pace.stalled(settled.elapsed().as_secs_f64());
        let begun = Begun { state: state.clone(), stall_seconds, since: clock::now() };
        let step = state.step;
        if let Share::Part(_) = share {
            let archive = self.archive.clone();
            self.begun = Some(begun);
            return self.part.start(move || Ok(archive.write(step, share, &snapshot)?));
        }
        self.complete(begun, false, move |archive| Ok(vec![archive.write(step, share, &snapshot)?]))
    }

    /// Lets the writer complete a checkpoint as soon as it has its files.
    fn complete(
        &mut self,
        begun: Begun,
        is_divided: bool,
        files: impl FnOnce(&Archive) -> Result<Vec<StateFile>, store::Error> + Send + 'static,
    ) -> Result<(), Failure> {
        let Begun { state, stall_seconds, since } = begun;
        let archive = self.archive.clone();
        self.writer.start(move || {
            archive.complete(&state, is_divided, files(&archive)?)?;
            let write_seconds = since.elapsed().as_secs_f64();
            Ok(Saved { step: state.step, stall_seconds, write_seconds })
        })
    }

    /// Tells whether this rank has written its part of a checkpoint that is not complete.
    pub fn has_written_its_part(&self) -> bool {
        self.begun.is_some() && !self.part.is_busy()
    }

    /// Waits for this rank's part of a checkpoint and, on rank 0, begins to complete it with those of
    /// all; nothing if there is none. All ranks must call it after the same step.
    ///
    /// # Errors
    /// A [`Failure`] if a part could not be written or another rank is lost.
    pub fn join_parts(&mut self) -> Result<(), Failure> {
        let (Some(begun), Some(part)) = (self.begun.take(), self.part.wait()?) else {
            return Ok(());
        };
        let place = format!("checkpoint/{}", begun.state.step);
        let Some(parts) = self.ranks.tell_first(&place, &part.to_text())? else { return Ok(()) };
        let parts: Option<Vec<_>> = parts.iter().map(|text| StateFile::from_text(text)).collect();
        let parts = parts.ok_or_else(|| {
            let message = format!("the parts of {place} were not understood");
            Failure::new(FailureReason::Internal, message)
        })?;
        // The one before is complete: it was waited for before this one began.
        self.complete(begun, true, move |_| Ok(parts))
    }

    /// Takes note of a checkpoint that became complete meanwhile.
    ///
    /// # Errors
    /// A [`Failure`] if it could not be written.
    pub fn look(&mut self) -> Result<(), Failure> {
        if self.writer.is_busy() { Ok(()) } else { self.take_saved() }
    }

    /// Waits until the last checkpoint begun is complete; of one that is divided all ranks must.
    ///
    /// # Errors
    /// A [`Failure`] if it could not be written or another rank is lost.
    pub fn settle(&mut self) -> Result<(), Failure> {
        self.join_parts()?;
        self.take_saved()
    }

    fn take_saved(&mut self) -> Result<(), Failure> {
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

    /// Restores the newest complete checkpoint that all ranks find undamaged; `None` if there is none.
    ///
    /// # Errors
    /// A [`Failure`] of reason `CheckpointMismatch` if it belongs to other data or settings, or one
    /// of the store, or if another rank is lost.
    pub fn restore_newest(
        &mut self,
        model: &mut Model,
        optimizer: &AdamW,
    ) -> Result<Option<TrainState>, Failure> {
        let names = if self.ranks.is_first() { self.archive.names()? } else { Vec::new() };
        let mut steps = names.iter().rev().filter_map(|name| checkpoint_step(name));
        let restored = loop {
            // Rank 0 chooses, for all must go on from the same.
            let chosen = self.ranks.from_first(steps.next().map_or(0, |step| step + 1))?;
            if chosen == 0 {
                break None;
            }
            let name = checkpoint_name(chosen - 1);
            let stored = self.read(&name, model)?;
            // No tensor has changed yet, so the one before can still be taken.
            let number = f64::from(self.ranks.rank());
            let said = if stored.is_some() { [0.0, 0.0] } else { [1.0, number] };
            let [damaged, numbers] = self.ranks.sum(said)?;
            let Some(stored) = stored else { continue };
            if damaged > 0.0 {
                let who =
                    if damaged > 1.0 { "several ranks".into() } else { format!("rank {numbers}") };
                let why = format!("{who} cannot use its part: see its log");
                warn!(checkpoint = name, why, "skipped a damaged checkpoint");
            } else {
                fill(&stored.files, model, &tensors(model, optimizer))?;
                model.trained_mut().refresh_compute();
                break Some(stored.state);
            }
        };
        self.pace.safe(restored.as_ref().map_or(0, |state| state.step), self.now());
        Ok(restored)
    }

    /// Restores the weights of the best evaluation, which are those of its checkpoint.
    ///
    /// # Errors
    /// A [`Failure`] if they are gone or damaged.
    pub fn restore_best(&self, step: u64, model: &mut Model) -> Result<(), Failure> {
        let name = checkpoint_name(step);
        let Some(stored) = self.read(&name, model)? else {
            let message =
                format!("the best weights at {} are gone or damaged", self.archive.uri(&name));
            return Err(Failure::new(FailureReason::NotProven, message));
        };
        fill(&stored.files, model, &[(MASTER, Flat::Floats(model.trained().master()))])?;
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

    /// Fetches what this rank needs of a checkpoint; `None`, with a warning, if it is damaged.
    fn read(&self, name: &str, model: &Model) -> Result<Option<Stored>, Failure> {
        let fetched = self.archive.fetch(name, share(model), &self.scratch)?;
        let open = |Fetched { state, files }| Ok(Stored { state, files: open(&files, model)? });
        fetched.map(open).transpose()
    }

    fn now(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }
}

/// A checkpoint, open.
struct Stored {
    state: TrainState,
    files: Vec<StoredFile>,
}

/// Opens fetched files, and leaves no name of them behind.
fn open(files: &[(Share, PathBuf)], model: &Model) -> Result<Vec<StoredFile>, Failure> {
    let open = |(share, path): &(Share, PathBuf)| {
        let tensors = WeightFiles::open_file(path).map_err(unlike)?;
        // The map keeps the bytes.
        let _ = std::fs::remove_file(path);
        let (spans, length) = match *share {
            Share::Part(place) => {
                let layout = model.layout_of(place);
                (layout.spans(), layout.part_length())
            }
            Share::Whole => {
                let length = model.trained_parameters();
                (vec![Span::all(length)], length)
            }
        };
        Ok(StoredFile { tensors, spans, length })
    };
    files.iter().map(open).collect()
}

struct StoredFile {
    tensors: WeightFiles,
    /// Which elements of all that is trained the file's tensors have.
    spans: Vec<Span>,
    /// Elements of each tensor, filling included.
    length: usize,
}

/// Copies what a rank has of each named tensor into it.
fn fill(files: &[StoredFile], model: &Model, into: &[(&str, Flat<'_>)]) -> Result<(), Failure> {
    let own = model.trained_spans();
    let moves: Vec<Vec<Move>> = files.iter().map(|file| moves(&file.spans, &own)).collect();
    let moved = moves.iter().flatten().map(|moved| moved.length);
    if moved.sum::<usize>() != own.iter().map(|span| span.length).sum::<usize>() {
        let message = "the files of a checkpoint do not have all that is trained";
        return Err(Failure::new(FailureReason::CheckpointMismatch, message));
    }
    for (name, target) in into {
        let values = files.iter().zip(&moves).map(|(file, moves)| {
            Ok((file.tensors.tensor_of(name, &[file.length])?, moves.as_slice()))
        });
        target.fill(&values.collect::<Result<Vec<_>, _>>().map_err(unlike)?);
    }
    Ok(())
}

fn unlike(error: weights::Error) -> Failure {
    Failure::from_chain(FailureReason::CheckpointMismatch, &error)
}

/// Returns what a rank writes of a model's state.
fn share(model: &Model) -> Share {
    let ranks = model.ranks();
    match model.sharded_training() {
        Some(_) => Share::Part([ranks.rank(), ranks.world_size()]),
        None => Share::Whole,
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
