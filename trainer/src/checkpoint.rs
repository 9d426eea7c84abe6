//! Checkpoints: everything a run needs to go on as if it had never stopped.
//!
//! A checkpoint is one safetensors file of flat fp32 tensors and, written after it, a manifest with
//! its digest: without the manifest it does not exist. There is no random state and no data cursor
//! in it, for both are pure functions of the seed and the step.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use finetune_contract::{
    CONTRACT_VERSION, Document, FailureReason, RunConfig, RunId,
    artifact::{CHECKPOINT_MANIFEST_NAME, checkpoint_name},
    parse, render,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tch::{Kind, Tensor};
use tracing::warn;

use crate::{
    failure::Failure,
    hex,
    model::{params::FlatParams, weights::Checkpoint as Tensors},
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
        params: &FlatParams,
        optimizer: &AdamW,
    ) -> Result<(), Failure> {
        self.write(&checkpoint_name(state.step), state, params, &Content::Resumable(optimizer))?;
        for name in self.complete("step-")?.iter().rev().skip(self.keep) {
            self.remove(name)?;
        }
        Ok(())
    }

    /// Saves the weights of the best evaluation so far, then removes those of the one before.
    ///
    /// # Errors
    /// As [`Checkpoints::save`].
    pub fn save_best(&self, state: &TrainState, params: &FlatParams) -> Result<(), Failure> {
        let name = best_name(state.step);
        self.write(&name, state, params, &Content::WeightsOnly)?;
        for other in self.complete("best-")?.iter().filter(|other| **other != name) {
            self.remove(other)?;
        }
        Ok(())
    }

    /// Restores the newest complete and undamaged checkpoint; `None` if there is none.
    ///
    /// # Errors
    /// A [`Failure`] of reason `CheckpointMismatch` if it belongs to other data or settings, or one
    /// of the store.
    pub fn restore_newest(
        &self,
        params: &mut FlatParams,
        optimizer: &AdamW,
    ) -> Result<Option<TrainState>, Failure> {
        for name in self.complete("step-")?.iter().rev() {
            let [exp_avg, exp_avg_sq] = optimizer.moments();
            let into = [(MASTER, params.master()), (MOMENTS[0], exp_avg), (MOMENTS[1], exp_avg_sq)];
            if let Some(state) = self.read(name, &into)? {
                params.refresh_compute();
                return Ok(Some(state));
            }
        }
        Ok(None)
    }

    /// Restores the weights of the best evaluation.
    ///
    /// # Errors
    /// A [`Failure`] if they are gone or damaged.
    pub fn restore_best(&self, step: u64, params: &mut FlatParams) -> Result<(), Failure> {
        let name = best_name(step);
        if self.read(&name, &[(MASTER, params.master())])?.is_none() {
            let message =
                format!("the best weights at {} are gone or damaged", self.store.uri().join(&name));
            return Err(Failure::new(FailureReason::NotProven, message));
        }
        params.refresh_compute();
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
        params: &FlatParams,
        content: &Content<'_>,
    ) -> Result<(), Failure> {
        let mut tensors = vec![(MASTER, params.master())];
        if let Content::Resumable(optimizer) = content {
            tensors.extend(MOMENTS.into_iter().zip(optimizer.moments()));
        }
        let path = self.scratch.join("checkpoint.tmp");
        let (size, sha256) = write_flat(&path, &tensors)
            .map_err(|error| Failure::from_io(&error, &format!("cannot write {path:?}")))?;
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
    fn read(&self, name: &str, into: &[(&str, &Tensor)]) -> Result<Option<TrainState>, Failure> {
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
                let stored = tensors.tensor_of(tensor, &[target.numel()])?;
                target.shallow_clone().copy_(&stored);
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
/// Not how it is computed: attempt, recomputation, how a global batch is divided, and how often to
/// evaluate or save may change between attempts.
fn settings_sha256(config: &RunConfig) -> String {
    let training = &config.training;
    let decisive = serde_json::json!({
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
        "globalBatchSize": training.micro_batch_size * training.gradient_accumulation_steps,
        "packing": training.packing,
        "dtype": training.dtype,
        "seed": training.seed,
    });
    hex(&Sha256::digest(decisive.to_string()))
}

/// Writes flat fp32 tensors; returns the file's size and digest.
fn write_flat(path: &Path, tensors: &[(&str, &Tensor)]) -> std::io::Result<(u64, String)> {
    let declare = |(name, tensor): &(&str, &Tensor)| Declared {
        name: (*name).to_owned(),
        kind: Kind::Float,
        shape: tensor.size(),
    };
    let declared: Vec<Declared> = tensors.iter().map(declare).collect();
    let mut next = tensors.iter();
    tensor_file::write(path, &declared, |_| {
        let (_, tensor) = next.next().expect("each declared tensor is asked for once, in order");
        Ok(tensor.shallow_clone())
    })
}
