//! The checkpoints of a run in object storage: written, listed, fetched and removed.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use finetune_contract::{
    CONTRACT_VERSION, Document, FailureReason, InputDigests, LoraSettings, ModelSource, ObjectUri,
    RunConfig, RunId,
    artifact::{CHECKPOINT_MANIFEST_NAME, checkpoint_name, checkpoint_step},
    parse, render,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tracing::warn;

use crate::{
    checkpoint::{TrainState, snapshot::Snapshot},
    failure::Failure,
    hex,
    store::{self, Store, hash_file},
};

/// The commit marker of a checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct CheckpointManifest {
    version: u32,
    run_id: RunId,
    settings_sha256: String,
    /// The base model; absent, like `lora` and `trained`, in the manifests of earlier releases.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) model: Option<ModelSource>,
    /// The digests of the inputs; absent in the manifests of earlier releases.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    inputs: Option<InputDigests>,
    /// The adapter's settings; absent for full-parameter training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) lora: Option<LoraSettings>,
    /// The number of trained parameters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) trained: Option<u64>,
    state: TrainState,
    /// Whether the state is sharded into one file per rank, in the order of ranks.
    #[serde(default, rename = "isDivided")]
    is_sharded: bool,
    #[serde(default)]
    files: Vec<StateFile>,
    /// Earlier releases described their only file by these two fields.
    #[serde(default, skip_serializing)]
    size: Option<u64>,
    #[serde(default, skip_serializing)]
    sha256: Option<String>,
}

impl CheckpointManifest {
    /// Lists the files; an error message if the manifest is inconsistent.
    pub(super) fn files(&self) -> Result<Vec<(Shard, StateFile)>, String> {
        let ranks = self.files.len() as u32;
        match (&self.files[..], self.is_sharded, self.size, &self.sha256) {
            ([], false, Some(size), Some(sha256)) => {
                Ok(vec![(Shard::Full, StateFile { size, sha256: sha256.clone() })])
            }
            ([file], false, None, None) => Ok(vec![(Shard::Full, file.clone())]),
            ([_, ..], true, None, None) => {
                let files = self.files.iter().enumerate();
                Ok(files
                    .map(|(rank, f)| (Shard::OfRank([rank as u32, ranks]), f.clone()))
                    .collect())
            }
            _ => Err(format!("it lists {ranks} files, which do not form a checkpoint")),
        }
    }
}

/// A file of a checkpoint; its name follows from its [`Shard`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct StateFile {
    size: u64,
    sha256: String,
}

impl StateFile {
    /// Formats the file as one line, as ranks send it to rank 0.
    pub(super) fn to_text(&self) -> String {
        format!("{} {}", self.size, self.sha256)
    }

    /// Parses the output of [`Self::to_text`].
    pub(super) fn from_text(text: &str) -> Option<Self> {
        let (size, sha256) = text.split_once(' ')?;
        Some(Self { size: size.parse().ok()?, sha256: sha256.to_owned() })
    }
}

/// The part of the state that a file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shard {
    /// All of the state.
    Full,
    /// The shard of one rank, as `[rank, world_size]`.
    OfRank([u32; 2]),
}

impl Shard {
    fn file_name(self) -> String {
        match self {
            Self::Full => "state.safetensors".to_owned(),
            Self::OfRank([rank, ranks]) => {
                format!("state-{:05}-of-{ranks:05}.safetensors", rank + 1)
            }
        }
    }
}

/// The fetched and verified files of a checkpoint.
pub(super) struct Fetched {
    pub(super) state: TrainState,
    pub(super) files: Vec<(Shard, PathBuf)>,
}

impl Document for CheckpointManifest {
    const NAME: &'static str = "checkpoint manifest";
}

/// The stored checkpoints of a run, and what identifies the run.
#[derive(Debug, Clone)]
pub(super) struct CheckpointStore {
    store: Store,
    run_id: RunId,
    settings_sha256: String,
    model: ModelSource,
    /// Known only to rank 0, which compares them for all ranks.
    inputs: Option<InputDigests>,
    lora: Option<LoraSettings>,
    trained: u64,
    keep: usize,
}

impl CheckpointStore {
    /// Opens the checkpoints of a run with `trained` trained parameters.
    pub(super) fn new(
        store: Store,
        config: &RunConfig,
        inputs: Option<InputDigests>,
        trained: u64,
    ) -> Self {
        Self {
            store,
            run_id: config.run_id.clone(),
            settings_sha256: settings_sha256(config),
            model: config.model.clone(),
            inputs,
            lora: config.lora.clone(),
            trained,
            keep: config.training.num_checkpoints_to_keep.max(1) as usize,
        }
    }

    /// Returns the URI of a checkpoint.
    pub(super) fn uri(&self, name: &str) -> ObjectUri {
        self.store.uri().join(name)
    }

    /// Writes one file of a checkpoint, which exists only after [`Self::complete`].
    ///
    /// # Errors
    /// [`store::Error`].
    pub(super) fn write(
        &self,
        step: u64,
        shard: Shard,
        snapshot: &Snapshot,
    ) -> Result<StateFile, store::Error> {
        let name = format!("{}/{}", checkpoint_name(step), shard.file_name());
        let (size, parts) = snapshot.parts()?;
        let mut hash = Sha256::new();
        let parts = parts.inspect(|part| part.iter().for_each(|part| hash.update(part)));
        self.store.put_parts(&name, size, parts)?;
        Ok(StateFile { size, sha256: hex(&hash.finalize()) })
    }

    /// Completes a checkpoint whose files are written by writing its manifest, then removes older
    /// checkpoints beyond the newest ones to keep and the one of the best evaluation. Checkpoints
    /// of later steps are damaged ones that were skipped at resume; they do not count.
    ///
    /// # Errors
    /// [`store::Error`]; earlier checkpoints stay.
    pub(super) fn complete(
        &self,
        state: &TrainState,
        is_sharded: bool,
        files: Vec<StateFile>,
    ) -> Result<(), store::Error> {
        let manifest = CheckpointManifest {
            version: CONTRACT_VERSION,
            run_id: self.run_id.clone(),
            settings_sha256: self.settings_sha256.clone(),
            model: Some(self.model.clone()),
            inputs: self.inputs.clone(),
            lora: self.lora.clone(),
            trained: Some(self.trained),
            state: state.clone(),
            is_sharded,
            files,
            size: None,
            sha256: None,
        };
        let name = checkpoint_name(state.step);
        self.store
            .put(&format!("{name}/{CHECKPOINT_MANIFEST_NAME}"), Bytes::from(render(&manifest)))?;
        self.remove_older(&name, state.best.map(|best| checkpoint_name(best.step)))
    }

    /// Removes the files of steps before `newest`, except those of checkpoints to keep and of the
    /// best. An attempt that was killed may also have left files without a manifest.
    fn remove_older(&self, newest: &str, best: Option<String>) -> Result<(), store::Error> {
        let paths = self.paths()?;
        let mut kept = complete_names(&paths);
        kept.retain(|name| **name <= *newest);
        kept.drain(..kept.len().saturating_sub(self.keep));
        kept.extend(best);
        let is_obsolete = |path: &String| {
            path.split_once('/').is_some_and(|(name, _)| {
                checkpoint_step(name).is_some()
                    && name < newest
                    && kept.iter().all(|kept| kept != name)
            })
        };
        self.remove(paths.into_iter().filter(is_obsolete))
    }

    /// Lists the names of complete checkpoints, oldest first.
    pub(super) fn names(&self) -> Result<Vec<String>, store::Error> {
        Ok(complete_names(&self.paths()?))
    }

    fn paths(&self) -> Result<Vec<String>, store::Error> {
        Ok(self.store.list()?.into_iter().map(|entry| entry.path).collect())
    }

    /// Fetches the files of a checkpoint that a rank needs: its own shard if the checkpoint has the
    /// same sharding, else all. `None`, with a warning, if a file is damaged.
    ///
    /// # Errors
    /// A [`Failure`] if the checkpoint has other data or settings, or if the store fails.
    pub(super) fn fetch(
        &self,
        name: &str,
        shard: Shard,
        directory: &Path,
    ) -> Result<Option<Fetched>, Failure> {
        let damaged = |why: &str| warn!(checkpoint = name, why, "skipped a damaged checkpoint");
        let manifest = match read_manifest(&self.store, &format!("{name}/"))? {
            Ok(manifest) => manifest,
            Err(why) => {
                damaged(&why);
                return Ok(None);
            }
        };
        if manifest.run_id != self.run_id || manifest.settings_sha256 != self.settings_sha256 {
            let message = format!(
                "the checkpoint {} was written with data or settings that differ from this run's: delete {} to start over, \
                 or restore the original data and settings",
                self.uri(name),
                self.store.uri(),
            );
            return Err(Failure::new(FailureReason::CheckpointMismatch, message));
        }
        if let (Some(stored), Some(current)) = (&manifest.inputs, &self.inputs)
            && stored != current
        {
            let message = format!(
                "the checkpoint {} was written from other inputs ({} changed): delete {} to start over, or restore the original inputs",
                self.uri(name),
                stored.differences(current).join(", "),
                self.store.uri(),
            );
            return Err(Failure::new(FailureReason::CheckpointMismatch, message));
        }
        match fetch_files(&self.store, &format!("{name}/"), &manifest, shard, directory)? {
            Ok(files) => Ok(Some(Fetched { state: manifest.state, files })),
            Err(why) => {
                damaged(&why);
                Ok(None)
            }
        }
    }

    /// Removes every checkpoint of the run.
    pub(super) fn clear(&self) -> Result<(), store::Error> {
        self.remove(self.paths()?.into_iter())
    }

    /// Removes files, manifests first: a half-removed checkpoint must not look complete.
    fn remove(&self, paths: impl Iterator<Item = String>) -> Result<(), store::Error> {
        let is_manifest = |path: &String| path.ends_with(CHECKPOINT_MANIFEST_NAME);
        let (manifests, files): (Vec<_>, Vec<_>) = paths.partition(is_manifest);
        manifests.iter().chain(&files).try_for_each(|path| self.store.delete(path))
    }
}

/// Returns the names of the checkpoints that have a manifest among `paths`, oldest first.
fn complete_names(paths: &[String]) -> Vec<String> {
    let names = paths.iter().filter_map(|path| {
        let name = path.strip_suffix(CHECKPOINT_MANIFEST_NAME)?.strip_suffix('/')?;
        checkpoint_step(name).map(|_| name.to_owned())
    });
    let mut names: Vec<_> = names.collect();
    names.sort();
    names
}

/// Reads the manifest below a prefix; the inner error says how it is damaged.
///
/// # Errors
/// [`store::Error`].
pub(super) fn read_manifest(
    store: &Store,
    prefix: &str,
) -> Result<Result<CheckpointManifest, String>, store::Error> {
    let text = store.read(&format!("{prefix}{CHECKPOINT_MANIFEST_NAME}"))?;
    Ok(parse(&String::from_utf8_lossy(&text)).map_err(|error| error.to_string()))
}

/// Checks that the files of a checkpoint exist with their sizes; the inner error names one that
/// does not.
///
/// # Errors
/// [`store::Error`].
pub(super) fn check_sizes(
    store: &Store,
    prefix: &str,
    files: &[(Shard, StateFile)],
) -> Result<Result<(), String>, store::Error> {
    for (shard, file) in files {
        let name = shard.file_name();
        if store.size(&format!("{prefix}{name}"))? != Some(file.size) {
            return Ok(Err(format!("{name} is missing or truncated")));
        }
    }
    Ok(Ok(()))
}

/// Fetches the files of a checkpoint that a rank needs; the inner error says how they are damaged.
///
/// # Errors
/// A [`Failure`] of the store or the disk.
pub(super) fn fetch_files(
    store: &Store,
    prefix: &str,
    manifest: &CheckpointManifest,
    shard: Shard,
    directory: &Path,
) -> Result<Result<Vec<(Shard, PathBuf)>, String>, Failure> {
    let mut needed = match manifest.files() {
        Ok(files) => files,
        Err(why) => return Ok(Err(why)),
    };
    if needed.iter().any(|(stored, _)| *stored == shard) {
        needed.retain(|(stored, _)| *stored == shard);
    }
    if let Err(why) = check_sizes(store, prefix, &needed)? {
        return Ok(Err(why));
    }
    let mut files = Vec::new();
    for (stored, file) in needed {
        let name = stored.file_name();
        let from = format!("{prefix}{name}");
        let path = directory.join(format!("restore-{}.tmp", files.len()));
        store.fetch(&from, &path)?;
        if hash_file(&path)?.1 != file.sha256 {
            return Ok(Err(format!("the digest of {name} does not match the manifest")));
        }
        files.push((stored, path));
    }
    Ok(Ok(files))
}

/// Returns a digest of everything that decides the result: model, data, adapter and training
/// settings.
///
/// It excludes how the result is computed: the attempt, activation checkpointing, how a global
/// batch is divided and over how many ranks, and how often to evaluate or save may change between
/// attempts.
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
    // Checkpoints that were saved before these fields existed keep their digest.
    if !training.optimizer.is_default() {
        decisive["optimizer"] = serde_json::json!(training.optimizer);
    }
    if let Some(ratio) = training.min_learning_rate_ratio {
        decisive["minLearningRateRatio"] = serde_json::json!(ratio);
    }
    if let Some(adapter) = &config.initial_adapter {
        decisive["initialAdapter"] = serde_json::json!(adapter);
    }
    if let Some(checkpoint) = &config.initial_checkpoint {
        decisive["initialCheckpoint"] = serde_json::json!(checkpoint);
    }
    hex(&Sha256::digest(decisive.to_string()))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use finetune_contract::{FailureReason, InputDigests, ModelSource, ObjectUri, RunId};
    use sha2::{Digest, Sha256};

    use super::{CheckpointStore, Shard, Snapshot, StateFile, TrainState};
    use crate::{checkpoint::Evaluation, hex, store::Store};

    fn checkpoint_store(keep: usize) -> CheckpointStore {
        let uri = ObjectUri::parse("s3://bucket/run").unwrap();
        CheckpointStore {
            store: Store::from_object_store(&uri, Arc::new(object_store::memory::InMemory::new())),
            run_id: RunId("a-1".to_owned()),
            settings_sha256: String::new(),
            model: ModelSource::of("file:///base".parse().unwrap()),
            inputs: None,
            lora: None,
            trained: 1,
            keep,
        }
    }

    const SHARDS: [Shard; 2] = [Shard::OfRank([0, 2]), Shard::OfRank([1, 2])];

    fn write(checkpoints: &CheckpointStore, step: u64) -> Vec<StateFile> {
        let snapshot = Snapshot::Memory(vec![step as u8; 9].into());
        SHARDS.iter().map(|&shard| checkpoints.write(step, shard, &snapshot).unwrap()).collect()
    }

    fn complete(checkpoints: &CheckpointStore, step: u64) {
        let files = write(checkpoints, step);
        let state = TrainState { step, ..TrainState::default() };
        checkpoints.complete(&state, true, files).unwrap();
    }

    #[test]
    fn damaged_and_incomplete_checkpoints_do_not_count_as_kept() {
        let checkpoints = checkpoint_store(1);
        let directory = tempfile::tempdir().unwrap();
        let is_valid =
            |name: &str| checkpoints.fetch(name, SHARDS[1], directory.path()).unwrap().is_some();
        complete(&checkpoints, 4);
        // One is never completed, and of one a shard is replaced by other bytes of the same length.
        write(&checkpoints, 6);
        complete(&checkpoints, 8);
        assert_eq!(checkpoints.names().unwrap(), ["step-00000008"]);
        assert!(is_valid("step-00000008"));
        let shard = "step-00000008/state-00002-of-00002.safetensors";
        checkpoints.store.put(shard, vec![7; 9].into()).unwrap();
        assert!(!is_valid("step-00000008"));
        // The run resumed from the step before.
        write(&checkpoints, 4);
        complete(&checkpoints, 5);
        assert_eq!(checkpoints.names().unwrap(), ["step-00000005", "step-00000008"]);
        assert!(is_valid("step-00000005"));
        write(&checkpoints, 6);
        complete(&checkpoints, 9);
        assert_eq!(checkpoints.names().unwrap(), ["step-00000009"]);
        assert_eq!(checkpoints.store.list().unwrap().len(), 3, "two shards and a manifest");
    }

    #[test]
    fn manifests_of_earlier_releases_are_read_and_inconsistent_ones_are_not() {
        let checkpoints = checkpoint_store(1);
        let directory = tempfile::tempdir().unwrap();
        let manifest = |files: &str| {
            format!(
                r#"{{"version": 1, "runId": "a-1", "settingsSha256": "", "state": {{"step": 6,
                "tokensSeen": 9, "firstLoss": 2.0, "lastLoss": 1.0, "baseEvalLoss": null, "lastEval": null,
                "best": null, "evaluationsSinceBest": 0}}, {files}}}"#
            )
        };
        checkpoints.store.put("step-00000006/state.safetensors", vec![1; 9].into()).unwrap();
        let sha256 = hex(&Sha256::digest([1; 9]));
        let fetched = |files: &str| {
            let name = "step-00000006/checkpoint-manifest.json";
            checkpoints.store.put(name, manifest(files).into()).unwrap();
            checkpoints.fetch("step-00000006", SHARDS[0], directory.path()).unwrap()
        };
        let before = fetched(&format!(r#""size": 9, "sha256": "{sha256}""#)).unwrap();
        assert_eq!((before.state.step, before.files[0].0), (6, Shard::Full));
        let file = format!(r#"{{"size": 9, "sha256": "{sha256}"}}"#);
        assert!(fetched(&format!(r#""files": [{file}]"#)).is_some());
        assert!(fetched(r#""files": []"#).is_none());
        assert!(fetched(r#""files": [], "isDivided": true"#).is_none());
        assert!(fetched(&format!(r#""files": [{file}, {file}]"#)).is_none());
    }

    #[test]
    fn a_run_does_not_resume_from_a_checkpoint_of_other_inputs() {
        let of_model = |checkpoints: &CheckpointStore, sha256: &str| CheckpointStore {
            inputs: Some(InputDigests {
                train_sha256: "1".to_owned(),
                validation_sha256: None,
                model_sha256: sha256.to_owned(),
                initial_sha256: None,
                chat_template_sha256: None,
            }),
            ..checkpoints.clone()
        };
        let unknown = checkpoint_store(1);
        let first = of_model(&unknown, "2");
        let directory = tempfile::tempdir().unwrap();
        let fetched = |checkpoints: &CheckpointStore| {
            checkpoints.fetch("step-00000004", SHARDS[1], directory.path())
        };
        complete(&first, 4);
        assert!(fetched(&first).unwrap().is_some());
        assert!(fetched(&unknown).unwrap().is_some(), "another rank does not compare");
        let Err(refused) = fetched(&of_model(&unknown, "3")) else { panic!("it was accepted") };
        assert_eq!(refused.reason, FailureReason::CheckpointMismatch);
        assert!(refused.message.contains("the files of model.uri"), "{}", refused.message);
        // A manifest of an earlier release has no digests.
        complete(&unknown, 4);
        assert!(fetched(&first).unwrap().is_some());
    }

    #[test]
    fn keeps_the_newest_and_the_best_and_reads_what_it_wrote() {
        let checkpoints = checkpoint_store(2);
        let directory = tempfile::tempdir().unwrap();
        let mut state = TrainState::default();
        for step in [2, 4, 6, 8, 10] {
            state.step = step;
            if step == 4 {
                state.best = Some(Evaluation { step, loss: 0.5 });
            }
            // Some are in memory and some on disk; one is large enough for a multipart upload.
            let bytes = vec![step as u8; if step == 8 { 33 << 20 } else { 9 }];
            let path = directory.path().join("checkpoint.tmp");
            let snapshot = if step % 4 == 0 {
                std::fs::write(&path, &bytes).unwrap();
                Snapshot::File(path.clone())
            } else {
                Snapshot::Memory(bytes.clone().into())
            };
            // Two files of shards, or one of the full state.
            let shards = if step == 6 { &SHARDS[..] } else { &[Shard::Full] };
            let files =
                shards.iter().map(|&shard| checkpoints.write(step, shard, &snapshot).unwrap());
            let files = files.collect();
            let name = format!("step-{step:08}");
            assert!(!checkpoints.names().unwrap().contains(&name), "it has no manifest");
            checkpoints.complete(&state, step == 6, files).unwrap();
            drop(snapshot);
            assert!(!path.exists(), "the file is removed with the snapshot");
            for asked in [Shard::Full, Shard::OfRank([1, 2]), Shard::OfRank([0, 4])] {
                let fetched = checkpoints.fetch(&name, asked, directory.path()).unwrap().unwrap();
                assert_eq!(fetched.state, state);
                let found: Vec<Shard> = fetched.files.iter().map(|(shard, _)| *shard).collect();
                let expected = if shards.contains(&asked) { &[asked][..] } else { shards };
                assert_eq!(found, expected);
                for (_, path) in fetched.files {
                    assert!(std::fs::read(path).unwrap() == bytes);
                }
            }
        }
        let kept = ["step-00000004", "step-00000008", "step-00000010"];
        assert_eq!(checkpoints.names().unwrap(), kept);
        checkpoints.clear().unwrap();
        assert!(checkpoints.store.list().unwrap().is_empty());
    }
}
