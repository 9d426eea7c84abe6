//! Checkpoints: everything a run needs to go on as if it had never stopped.
//!
//! A checkpoint is one safetensors file of flat fp32 tensors and, written after it, a manifest with
//! its digest: without the manifest it does not exist. Rank 0 writes it, undivided, whatever the
//! number of ranks; parts are gathered a unit at a time. So any number of ranks reads it. There is no random state and no data cursor
//! in it, for both are pure functions of the seed and the step.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use finetune_contract::{
    CONTRACT_VERSION, Document, FailureReason, RunConfig, RunId, StoppedEarly,
    artifact::{CHECKPOINT_MANIFEST_NAME, checkpoint_name},
    parse, render,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tch::{Kind, Tensor};
use tracing::warn;

use crate::{
    dist,
    failure::Failure,
    hex,
    model::{Model, weights::Checkpoint as Tensors},
    optimizer::AdamW,
    store::{self, Store, hash_file},
    tensor_file::{self, Declared},
};

const STATE_FILE: &str = "state.safetensors";
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

/// The commit marker of a checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct CheckpointManifest {
    version: u32,
    run_id: RunId,
    settings_sha256: String,
    state: TrainState,
    size: u64,
    sha256: String,
}

impl Document for CheckpointManifest {
    const NAME: &'static str = "checkpoint manifest";
}

/// The checkpoints of one run.
pub struct Checkpoints {
    store: Store,
    scratch: PathBuf,
    run_id: RunId,
    settings_sha256: String,
    keep: usize,
}

/// What is written beside the masters.
enum Content<'a> {
    Resumable(&'a AdamW),
    WeightsOnly,
}

impl Checkpoints {
    /// Opens the checkpoints of a run; files pass through `scratch`.
    pub fn new(store: Store, scratch: &Path, config: &RunConfig) -> Self {
        Self {
            store,
            scratch: scratch.to_owned(),
            run_id: config.run_id.clone(),
            settings_sha256: settings_sha256(config),
            keep: config.training.num_checkpoints_to_keep.max(1) as usize,
        }
    }

    /// Saves a checkpoint to go on from, then removes those beyond the ones to keep.
    ///
    /// # Errors
    /// A [`Failure`] if local disk or store fails; the checkpoints before stay.
    pub fn save(
        &self,
        state: &TrainState,
        model: &Model,
        optimizer: &AdamW,
    ) -> Result<(), Failure> {
        self.write(&checkpoint_name(state.step), state, model, &Content::Resumable(optimizer))?;
        if !model.ranks().is_first() {
            return Ok(());
        }
        for name in self.complete("step-")?.iter().rev().skip(self.keep) {
            self.remove(name)?;
        }
        Ok(())
    }

    /// Saves the weights of the best evaluation so far, then removes those of the one before.
    ///
    /// # Errors
    /// As [`Checkpoints::save`].
    pub fn save_best(&self, state: &TrainState, model: &Model) -> Result<(), Failure> {
        let name = best_name(state.step);
        self.write(&name, state, model, &Content::WeightsOnly)?;
        if !model.ranks().is_first() {
            return Ok(());
        }
        for other in self.complete("best-")?.iter().filter(|other| **other != name) {
            self.remove(other)?;
        }
        Ok(())
    }

    /// Restores the newest complete and undamaged checkpoint; `None` if there is none. Rank 0
    /// chooses, for all must go on from the same.
    ///
    /// # Errors
    /// A [`Failure`] of reason `CheckpointMismatch` if it belongs to other data or settings, or one
    /// of the store.
    pub fn restore_newest(
        &self,
        model: &mut Model,
        optimizer: &AdamW,
    ) -> Result<Option<TrainState>, Failure> {
        let ranks = model.ranks().clone();
        let mut restored = None;
        if ranks.is_first() {
            for name in self.complete("step-")?.iter().rev() {
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
                    self.store.uri().join(&name),
                    ranks.rank(),
                );
                return Err(Failure::new(FailureReason::StoreUnavailable, message));
            }
        }
        Ok(restored)
    }

    fn read_all(
        &self,
        name: &str,
        model: &mut Model,
        optimizer: &AdamW,
    ) -> Result<Option<TrainState>, Failure> {
        let [exp_avg, exp_avg_sq] = optimizer.moments();
        let master = model.trained().master();
        let into = [(MASTER, master), (MOMENTS[0], exp_avg), (MOMENTS[1], exp_avg_sq)];
        let state = self.read(name, model, &into)?;
        model.trained_mut().refresh_compute();
        Ok(state)
    }

    /// Restores the weights of the best evaluation.
    ///
    /// # Errors
    /// A [`Failure`] if they are gone or damaged.
    pub fn restore_best(&self, step: u64, model: &mut Model) -> Result<(), Failure> {
        let name = best_name(step);
        if self.read(&name, model, &[(MASTER, model.trained().master())])?.is_none() {
            let message =
                format!("the best weights at {} are gone or damaged", self.store.uri().join(&name));
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
        for name in self.complete("")? {
            self.remove(&name)?;
        }
        for entry in self.store.list()? {
            self.store.delete(&entry.path)?;
        }
        Ok(())
    }

    /// Lists the names of complete checkpoints, oldest first.
    fn complete(&self, prefix: &str) -> Result<Vec<String>, store::Error> {
        let names = self.store.list()?.into_iter().filter_map(|entry| {
            let name = entry.path.strip_suffix(CHECKPOINT_MANIFEST_NAME)?.strip_suffix('/')?;
            name.starts_with(prefix).then(|| name.to_owned())
        });
        let mut names: Vec<_> = names.collect();
        names.sort();
        Ok(names)
    }

    fn remove(&self, name: &str) -> Result<(), store::Error> {
        // The manifest first: a half-removed checkpoint must not look complete.
        self.store.delete(&format!("{name}/{CHECKPOINT_MANIFEST_NAME}"))?;
        self.store.delete(&format!("{name}/{STATE_FILE}"))
    }

    fn write(
        &self,
        name: &str,
        state: &TrainState,
        model: &Model,
        content: &Content<'_>,
    ) -> Result<(), Failure> {
        let mut tensors = vec![(MASTER, model.trained().master())];
        if let Content::Resumable(optimizer) = content {
            tensors.extend(MOMENTS.into_iter().zip(optimizer.moments()));
        }
        let path = self.scratch.join("checkpoint.tmp");
        if !model.ranks().is_first() {
            return follow_flat(model, &tensors).map_err(Failure::from);
        }
        let (size, sha256) = write_flat(&path, model, &tensors).map_err(|failed| match failed {
            Failed::Write(error) => Failure::from_io(&error, &format!("cannot write {path:?}")),
            Failed::Ranks(error) => error.into(),
        })?;
        self.store.put_file(&format!("{name}/{STATE_FILE}"), &path)?;
        let _ = std::fs::remove_file(&path);
        let manifest = CheckpointManifest {
            version: CONTRACT_VERSION,
            run_id: self.run_id.clone(),
            settings_sha256: self.settings_sha256.clone(),
            state: state.clone(),
            size,
            sha256,
        };
        self.store
            .put(&format!("{name}/{CHECKPOINT_MANIFEST_NAME}"), Bytes::from(render(&manifest)))?;
        Ok(())
    }

    /// Reads a checkpoint into tensors; `None`, with a warning, if it is damaged.
    fn read(
        &self,
        name: &str,
        model: &Model,
        into: &[(&str, &Tensor)],
    ) -> Result<Option<TrainState>, Failure> {
        let damaged = |why: &str| warn!(checkpoint = name, why, "skipped a damaged checkpoint");
        let text = self.store.read(&format!("{name}/{CHECKPOINT_MANIFEST_NAME}"))?;
        let manifest: CheckpointManifest = match parse(&String::from_utf8_lossy(&text)) {
            Ok(manifest) => manifest,
            Err(error) => {
                damaged(&error.to_string());
                return Ok(None);
            }
        };
        if manifest.run_id != self.run_id || manifest.settings_sha256 != self.settings_sha256 {
            let message = format!(
                "the checkpoint {} was written with other data or settings than this run's: delete {} to start over, \
                 or restore what was changed",
                self.store.uri().join(name),
                self.store.uri(),
            );
            return Err(Failure::new(FailureReason::CheckpointMismatch, message));
        }
        let state_file = format!("{name}/{STATE_FILE}");
        if self.store.size(&state_file)? != Some(manifest.size) {
            damaged("its file is missing or truncated");
            return Ok(None);
        }
        let path = self.scratch.join("restore.tmp");
        self.store.fetch(&state_file, &path)?;
        if hash_file(&path)?.1 != manifest.sha256 {
            damaged("its file does not have the digest of its manifest");
            return Ok(None);
        }
        let tensors = Tensors::open_file(&path);
        // The map keeps the bytes; the name is not needed any more.
        let _ = std::fs::remove_file(&path);
        let fill = || -> Result<(), crate::model::weights::Error> {
            let tensors = tensors?;
            for (tensor, target) in into {
                if let Some(sharded) = model.sharded_training() {
                    let length = sharded.layout().undivided_length();
                    sharded.keep_all(&tensors.tensor_of(tensor, &[length])?, target);
                } else {
                    let stored = tensors.tensor_of(tensor, &[target.numel()])?;
                    target.shallow_clone().copy_(&stored);
                }
            }
            Ok(())
        };
        fill().map_err(|error| Failure::from_chain(FailureReason::CheckpointMismatch, &error))?;
        Ok(Some(manifest.state))
    }
}

fn best_name(step: u64) -> String {
    format!("best-{step:08}")
}

/// Returns a digest of all that decides the result: model, data, adapter and training settings.
///
/// Not how it is computed: attempt, recomputation, how a global batch is divided and over how many
/// ranks, and how often to
/// evaluate or save may change between attempts.
fn settings_sha256(config: &RunConfig) -> String {
    let training = &config.training;
    let mut decisive = serde_json::json!({
        "model": config.model,
        "lora": config.lora,
        "expected": config.expected,
        "contextLength": training.context_length,
        "totalSteps": training.total_steps,
        "learningRate": training.learning_rate,
        "lrSchedulerType": training.lr_scheduler_type,
        "numWarmupSteps": training.num_warmup_steps,
        "weightDecay": training.weight_decay,
        "maxGradNorm": training.max_grad_norm,
        "globalBatchSize": config.global_batch_size(),
        "packing": training.packing,
        "dtype": training.dtype,
        "seed": training.seed,
    });
    // What was saved before there was this field keeps its digest.
    if let Some(adapter) = &config.initial_adapter {
        decisive["initialAdapter"] = serde_json::json!(adapter);
    }
    hex(&Sha256::digest(decisive.to_string()))
}

/// Why flat tensors could not be written.
enum Failed {
    Write(std::io::Error),
    Ranks(dist::Error),
}

impl From<std::io::Error> for Failed {
    fn from(error: std::io::Error) -> Self {
        Self::Write(error)
    }
}

impl From<dist::Error> for Failed {
    fn from(error: dist::Error) -> Self {
        Self::Ranks(error)
    }
}

/// Writes flat fp32 tensors, undivided; returns the file's size and digest.
fn write_flat(
    path: &Path,
    model: &Model,
    tensors: &[(&str, &Tensor)],
) -> Result<(u64, String), Failed> {
    let sharded = model.sharded_training();
    let declare = |(name, tensor): &(&str, &Tensor)| Declared {
        name: (*name).to_owned(),
        kind: Kind::Float,
        shape: sharded.map_or_else(
            || tensor.size(),
            |sharded| vec![sharded.layout().undivided_length() as i64],
        ),
    };
    let declared: Vec<Declared> = tensors.iter().map(declare).collect();
    let mut next = tensors.iter();
    tensor_file::write_pieces(path, &declared, |_, put| {
        let (_, tensor) = next.next().expect("each declared tensor is asked for once, in order");
        match sharded {
            Some(sharded) => sharded.for_each_piece(tensor, |piece| put(piece)),
            None => put(tensor),
        }
    })
}

/// Takes part in what [`write_flat`] does on rank 0.
fn follow_flat(model: &Model, tensors: &[(&str, &Tensor)]) -> Result<(), dist::Error> {
    let Some(sharded) = model.sharded_training() else { return Ok(()) };
    tensors.iter().try_for_each(|(_, tensor)| sharded.for_each_piece(tensor, |_| Ok(())))
}
