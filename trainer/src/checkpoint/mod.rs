//! Asynchronous checkpoints: everything a run needs to resume as if it had never stopped.
//!
//! A checkpoint is a set of safetensors files with flat fp32 tensors and a manifest with their
//! digests, written last: without the manifest the checkpoint does not exist. Rank 0 writes
//! replicated state to one file. If state is sharded, each rank writes its shard, and rank 0 writes
//! the manifest after all of them. Any number of ranks can load either form, because the position
//! of each element is arithmetic (`params/layout.rs`). A checkpoint has no RNG state and no data
//! cursor: both are pure functions of the seed and the step.
//!
//! Training waits only for the snapshot: a copy in host memory for LoRA, a local file for
//! full-parameter training. A background thread uploads it, one checkpoint at a time. [`cadence`]
//! decides when to save, `snapshot` copies the state, `writer` is the thread, and
//! `checkpoint_store` manages the stored files.

pub mod cadence;
mod checkpoint_store;
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
        cadence::SaveCadence,
        checkpoint_store::{CheckpointStore, Fetched, Shard, StateFile},
        snapshot::{HostBuffer, Snapshot},
        writer::Writer,
    },
    distributed::Ranks,
    failure::Failure,
    hf::weights::{self, WeightFiles},
    model::Model,
    optim::AdamW,
    params::{
        flat::FlatState,
        layout::{CopyRange, Span, overlaps},
    },
    runtime::clock,
    store::{self, Store},
};
pub use writer::Saved;

const MASTER: &str = "master";
const MOMENTS: [&str; 2] = ["exp_avg", "exp_avg_sq"];

/// The training state of a run apart from its tensors.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TrainState {
    /// Completed optimizer steps.
    pub step: u64,
    /// Tokens trained on, including those that are not targets.
    pub tokens_seen: u64,
    /// Mean loss of the first step.
    pub first_loss: Option<f64>,
    /// Mean loss of the last step.
    pub last_loss: Option<f64>,
    /// Validation loss before the first step.
    pub base_eval_loss: Option<f64>,
    /// The last validation loss and its step.
    pub last_eval: Option<Evaluation>,
    /// The best validation loss so far and its step.
    pub best: Option<Evaluation>,
    /// Evaluations since the best one.
    pub evaluations_since_best: u32,
    /// Seconds of training, over all attempts.
    #[serde(default)]
    pub training_seconds: f64,
    /// Why training stopped before its last step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped_early: Option<StoppedEarly>,
    /// The kernel of bf16 matrix products: with another one, a resumed run is not equal bit for
    /// bit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bf16_kernel: Option<String>,
}

/// A validation loss and the step it belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Evaluation {
    /// The number of completed optimizer steps.
    pub step: u64,
    /// Mean loss per target token.
    pub loss: f64,
}

/// The checkpoints of one run.
#[derive(Debug)]
pub struct Checkpoints {
    store: CheckpointStore,
    scratch: PathBuf,
    /// Whether snapshots are small enough for host memory.
    snapshots_in_memory: bool,
    host_buffer: HostBuffer,
    ranks: Ranks,
    /// Writes this rank's shard.
    shard_writer: Writer<StateFile>,
    /// The checkpoint whose shards are being written.
    in_flight: Option<InFlight>,
    /// Completes checkpoints, on rank 0.
    writer: Writer<Saved>,
    saved: Option<Saved>,
    cadence: SaveCadence,
    started: Instant,
}

impl Drop for Checkpoints {
    /// Without the other ranks a shard is worthless, and they may be waiting for this one.
    fn drop(&mut self) {
        self.shard_writer.abandon();
    }
}

/// A checkpoint that is being written.
#[derive(Debug)]
struct InFlight {
    state: TrainState,
    stall_seconds: f64,
    since: Instant,
}

impl Checkpoints {
    /// Opens the checkpoints of a run, with temporary files in `scratch`.
    pub fn new(
        store: Store,
        scratch: &Path,
        config: &RunConfig,
        inputs: Option<InputDigests>,
        model: &Model,
    ) -> Self {
        Self {
            store: CheckpointStore::new(store, config, inputs, model.trained_parameters() as u64),
            scratch: scratch.to_owned(),
            snapshots_in_memory: config.lora.is_some(),
            host_buffer: HostBuffer::default(),
            ranks: model.ranks().clone(),
            shard_writer: Writer::default(),
            in_flight: None,
            writer: Writer::default(),
            saved: None,
            cadence: SaveCadence::new(config.training.checkpoint_steps),
            started: clock::now(),
        }
    }

    /// Reports, on rank 0, whether to save after `step`, which took `step_seconds`, unless shards
    /// of the checkpoint before are still being written ([`Self::is_waiting_for_shards`]).
    pub fn is_due(&self, step: u64, step_seconds: f64) -> bool {
        !self.writer.is_busy() && self.cadence.is_due(step, self.now(), step_seconds)
    }

    /// Reports whether shards of a checkpoint are being written, which is the same on all ranks.
    pub fn is_waiting_for_shards(&self) -> bool {
        self.in_flight.is_some()
    }

    /// Starts to save a checkpoint; training may continue when this returns. It waits for the
    /// checkpoint before. When the new one is complete, checkpoints beyond those to keep are
    /// removed. All ranks must call it after the same step.
    ///
    /// # Errors
    /// A [`Failure`] if the disk fails, another rank is lost, or the checkpoint before failed;
    /// complete checkpoints stay.
    pub fn save(
        &mut self,
        state: &TrainState,
        model: &Model,
        optimizer: &AdamW,
    ) -> Result<(), Failure> {
        let shard = shard_of(model);
        if shard == Shard::Full && !self.ranks.is_first() {
            return Ok(());
        }
        let started = clock::now();
        self.flush()?;
        let flushed = clock::now();
        let tensors = tensors(model, optimizer);
        let snapshot = if self.snapshots_in_memory {
            self.host_buffer.copy(&tensors)?
        } else {
            Snapshot::to_file(&self.scratch.join("checkpoint.tmp"), &tensors)?
        };
        let stall_seconds = started.elapsed().as_secs_f64();
        self.cadence.mark_saved(state.step, self.now());
        // Waiting for the checkpoint before is not a cost of this one.
        self.cadence.record_stall(flushed.elapsed().as_secs_f64());
        let in_flight = InFlight { state: state.clone(), stall_seconds, since: clock::now() };
        let step = state.step;
        if let Shard::OfRank(_) = shard {
            let store = self.store.clone();
            self.in_flight = Some(in_flight);
            return self.shard_writer.start(move || Ok(store.write(step, shard, &snapshot)?));
        }
        self.complete(in_flight, false, move |store| Ok(vec![store.write(step, shard, &snapshot)?]))
    }

    /// Starts to complete a checkpoint in the background, once `files` returns its files.
    fn complete(
        &mut self,
        in_flight: InFlight,
        is_sharded: bool,
        files: impl FnOnce(&CheckpointStore) -> Result<Vec<StateFile>, store::Error> + Send + 'static,
    ) -> Result<(), Failure> {
        let InFlight { state, stall_seconds, since } = in_flight;
        let store = self.store.clone();
        self.writer.start(move || {
            store.complete(&state, is_sharded, files(&store)?)?;
            let write_seconds = since.elapsed().as_secs_f64();
            Ok(Saved { step: state.step, stall_seconds, write_seconds })
        })
    }

    /// Reports whether this rank has written its shard of the checkpoint in flight.
    pub fn has_written_shard(&self) -> bool {
        self.in_flight.is_some() && !self.shard_writer.is_busy()
    }

    /// Waits for this rank's shard of the checkpoint in flight, if there is one; rank 0 then starts
    /// to complete it with the shards of all ranks. All ranks must call it after the same step.
    ///
    /// # Errors
    /// A [`Failure`] if a shard could not be written or another rank is lost.
    pub fn complete_shards(&mut self) -> Result<(), Failure> {
        let (Some(in_flight), Some(file)) = (self.in_flight.take(), self.shard_writer.wait()?)
        else {
            return Ok(());
        };
        let key = format!("checkpoint/{}", in_flight.state.step);
        let Some(texts) = self.ranks.gather_texts(&key, &file.to_text())? else { return Ok(()) };
        let files: Option<Vec<_>> = texts.iter().map(|text| StateFile::from_text(text)).collect();
        let files = files.ok_or_else(|| {
            let message = format!("the shards of {key} could not be parsed");
            Failure::new(FailureReason::Internal, message)
        })?;
        // The checkpoint before is complete: `save` waited for it.
        self.complete(in_flight, true, move |_| Ok(files))
    }

    /// Records a checkpoint that has become complete, without waiting for one.
    ///
    /// # Errors
    /// A [`Failure`] if it could not be written.
    pub fn poll(&mut self) -> Result<(), Failure> {
        if self.writer.is_busy() { Ok(()) } else { self.take_saved() }
    }

    /// Waits until the checkpoint in flight is complete. If it is sharded, all ranks must call it.
    ///
    /// # Errors
    /// A [`Failure`] if it could not be written or another rank is lost.
    pub fn flush(&mut self) -> Result<(), Failure> {
        self.complete_shards()?;
        self.take_saved()
    }

    fn take_saved(&mut self) -> Result<(), Failure> {
        if let Some(saved) = self.writer.wait()? {
            let Saved { step, stall_seconds, write_seconds } = saved;
            debug!(step, stall_seconds, write_seconds, "saved a checkpoint");
            self.cadence.record_write(saved.write_seconds);
            self.saved = Some(saved);
        }
        Ok(())
    }

    /// Returns the last checkpoint that this process has completed.
    pub fn saved(&self) -> Option<Saved> {
        self.saved
    }

    /// Restores the newest complete checkpoint that is undamaged on all ranks; `None` if there is
    /// none.
    ///
    /// # Errors
    /// A [`Failure`] of reason `CheckpointMismatch` if the checkpoint has other data or settings;
    /// also if the store fails or another rank is lost.
    pub fn restore_newest(
        &mut self,
        model: &mut Model,
        optimizer: &AdamW,
    ) -> Result<Option<TrainState>, Failure> {
        let names = if self.ranks.is_first() { self.store.names()? } else { Vec::new() };
        let mut steps = names.iter().rev().filter_map(|name| checkpoint_step(name));
        let restored = loop {
            // Rank 0 chooses, because all ranks must resume from the same checkpoint.
            let chosen = self.ranks.broadcast(steps.next().map_or(0, |step| step + 1))?;
            if chosen == 0 {
                break None;
            }
            let name = checkpoint_name(chosen - 1);
            let stored = self.read(&name, model)?;
            // No tensor has changed yet, so an earlier checkpoint can still be chosen.
            let number = f64::from(self.ranks.rank());
            let damage = if stored.is_some() { [0.0, 0.0] } else { [1.0, number] };
            let [damaged, numbers] = self.ranks.sum(damage)?;
            let Some(stored) = stored else { continue };
            if damaged > 0.0 {
                let who =
                    if damaged > 1.0 { "several ranks".into() } else { format!("rank {numbers}") };
                let why = format!("{who} cannot use its shard: see its log");
                warn!(checkpoint = name, why, "skipped a damaged checkpoint");
            } else {
                load_into(&stored.files, model, &tensors(model, optimizer))?;
                model.trained_mut().refresh_compute();
                break Some(stored.state);
            }
        };
        self.cadence.mark_saved(restored.as_ref().map_or(0, |state| state.step), self.now());
        Ok(restored)
    }

    /// Restores the weights of the best evaluation from its checkpoint.
    ///
    /// # Errors
    /// A [`Failure`] if they are missing or damaged.
    pub fn restore_best(&self, step: u64, model: &mut Model) -> Result<(), Failure> {
        let name = checkpoint_name(step);
        let Some(stored) = self.read(&name, model)? else {
            let message =
                format!("the best weights at {} are missing or damaged", self.store.uri(&name));
            return Err(Failure::new(FailureReason::NotProven, message));
        };
        load_into(&stored.files, model, &[(MASTER, FlatState::Fp32(model.trained().master()))])?;
        model.trained_mut().refresh_compute();
        Ok(())
    }

    /// Removes every checkpoint of the run.
    ///
    /// # Errors
    /// A [`Failure`] if the store fails.
    pub fn clear(&self) -> Result<(), Failure> {
        Ok(self.store.clear()?)
    }

    /// Fetches the files of a checkpoint that this rank needs; `None`, with a warning, if it is
    /// damaged.
    fn read(&self, name: &str, model: &Model) -> Result<Option<Stored>, Failure> {
        let fetched = self.store.fetch(name, shard_of(model), &self.scratch)?;
        let open = |Fetched { state, files }| Ok(Stored { state, files: open(&files, model)? });
        fetched.map(open).transpose()
    }

    fn now(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }
}

/// An opened checkpoint.
struct Stored {
    state: TrainState,
    files: Vec<StoredFile>,
}

/// Opens fetched files and unlinks them.
fn open(files: &[(Shard, PathBuf)], model: &Model) -> Result<Vec<StoredFile>, Failure> {
    let open = |(shard, path): &(Shard, PathBuf)| {
        let tensors = WeightFiles::open_file(path).map_err(mismatch)?;
        // The memory map keeps the bytes.
        let _ = std::fs::remove_file(path);
        let (spans, length) = match *shard {
            Shard::OfRank(rank) => {
                let layout = model.layout_of(rank);
                (layout.spans(), layout.shard_length())
            }
            Shard::Full => {
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
    /// The elements of the unsharded state that the tensors of the file hold.
    spans: Vec<Span>,
    /// Elements of each tensor, with padding.
    length: usize,
}

/// Loads each named tensor from files: the elements that this rank stores.
fn load_into(
    files: &[StoredFile],
    model: &Model,
    targets: &[(&str, FlatState<'_>)],
) -> Result<(), Failure> {
    let own = model.trained_spans();
    let ranges: Vec<Vec<CopyRange>> =
        files.iter().map(|file| overlaps(&file.spans, &own)).collect();
    let covered = ranges.iter().flatten().map(|range| range.length);
    if covered.sum::<usize>() != own.iter().map(|span| span.length).sum::<usize>() {
        let message = "the files of the checkpoint do not cover all trained parameters";
        return Err(Failure::new(FailureReason::CheckpointMismatch, message));
    }
    for (name, target) in targets {
        let sources = files.iter().zip(&ranges).map(|(file, ranges)| {
            Ok((file.tensors.tensor_of(name, &[file.length])?, ranges.as_slice()))
        });
        target.copy_from(&sources.collect::<Result<Vec<_>, _>>().map_err(mismatch)?);
    }
    Ok(())
}

fn mismatch(error: weights::Error) -> Failure {
    Failure::from_chain(FailureReason::CheckpointMismatch, &error)
}

/// Returns the shard of a model's state that this rank writes.
fn shard_of(model: &Model) -> Shard {
    let ranks = model.ranks();
    match model.sharded_training() {
        Some(_) => Shard::OfRank([ranks.rank(), ranks.world_size()]),
        None => Shard::Full,
    }
}

/// Returns the named tensors of a checkpoint; if they are sharded, this rank's shards.
fn tensors<'a>(model: &'a Model, optimizer: &'a AdamW) -> [(&'static str, FlatState<'a>); 3] {
    let [exp_avg, exp_avg_sq] = optimizer.moments();
    [
        (MASTER, FlatState::Fp32(model.trained().master())),
        (MOMENTS[0], exp_avg),
        (MOMENTS[1], exp_avg_sq),
    ]
}
