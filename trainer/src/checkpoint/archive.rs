//! The checkpoints of a run in its store: written, counted, fetched and removed.

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
    /// The base model; it and the next two are absent in what was written before they were there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) model: Option<ModelSource>,
    /// What identified the bytes of the base model and of what training started from; absent in what
    /// earlier releases wrote.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    inputs: Option<InputDigests>,
    /// The adapter's shape; absent if all of the model is trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) lora: Option<LoraSettings>,
    /// Parameters trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) trained: Option<u64>,
    state: TrainState,
    /// Whether each file has the part of one of as many ranks; else the only one has everything.
    #[serde(default)]
    is_divided: bool,
    #[serde(default)]
    files: Vec<StateFile>,
    /// What an earlier release wrote of its one file.
    #[serde(default, skip_serializing)]
    size: Option<u64>,
    #[serde(default, skip_serializing)]
    sha256: Option<String>,
}

impl CheckpointManifest {
    /// Lists its files; the reason if there cannot be a checkpoint of these.
    pub(super) fn files(&self) -> Result<Vec<(Share, StateFile)>, String> {
        let ranks = self.files.len() as u32;
        match (&self.files[..], self.is_divided, self.size, &self.sha256) {
            ([], false, Some(size), Some(sha256)) => {
                Ok(vec![(Share::Whole, StateFile { size, sha256: sha256.clone() })])
            }
            ([file], false, None, None) => Ok(vec![(Share::Whole, file.clone())]),
            ([_, ..], true, None, None) => {
                let parts = self.files.iter().enumerate();
                Ok(parts.map(|(rank, f)| (Share::Part([rank as u32, ranks]), f.clone())).collect())
            }
            _ => Err(format!("it has {ranks} files, which are no checkpoint")),
        }
    }
}

/// A file of a checkpoint; its name follows from its place among all.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct StateFile {
    size: u64,
    sha256: String,
}

impl StateFile {
    /// Writes it in one line, as ranks tell it each other.
    pub(super) fn to_text(&self) -> String {
        format!("{} {}", self.size, self.sha256)
    }

    /// Reads what [`Self::to_text`] wrote.
    pub(super) fn from_text(text: &str) -> Option<Self> {
        let (size, sha256) = text.split_once(' ')?;
        Some(Self { size: size.parse().ok()?, sha256: sha256.to_owned() })
    }
}

/// Whose state a file has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Share {
    /// All of it.
    Whole,
    /// The part of a rank, of so many.
    Part([u32; 2]),
}

impl Share {
    fn file_name(self) -> String {
        match self {
            Self::Whole => "state.safetensors".to_owned(),
            Self::Part([rank, ranks]) => format!("state-{:05}-of-{ranks:05}.safetensors", rank + 1),
        }
    }
}

/// Files of a checkpoint, fetched and found undamaged.
pub(super) struct Fetched {
    pub(super) state: TrainState,
    pub(super) files: Vec<(Share, PathBuf)>,
}

impl Document for CheckpointManifest {
    const NAME: &'static str = "checkpoint manifest";
}

/// The store of a run's checkpoints, and what tells them from another run's.
#[derive(Debug, Clone)]
pub(super) struct Archive {
    store: Store,
    run_id: RunId,
    settings_sha256: String,
    model: ModelSource,
    /// Known to rank 0, which compares them for all.
    inputs: Option<InputDigests>,
    lora: Option<LoraSettings>,
    trained: u64,
    keep: usize,
}

impl Archive {
    /// Opens the checkpoints of a run of so many trained parameters.
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

    /// Returns where a checkpoint is.
    pub(super) fn uri(&self, name: &str) -> ObjectUri {
        self.store.uri().join(name)
    }

    /// Writes one file of a checkpoint, which is complete when [`Self::complete`] says so.
    ///
    /// # Errors
    /// [`store::Error`].
    pub(super) fn write(
        &self,
        step: u64,
        share: Share,
        snapshot: &Snapshot,
    ) -> Result<StateFile, store::Error> {
        let name = format!("{}/{}", checkpoint_name(step), share.file_name());
        let (size, parts) = snapshot.parts()?;
        let mut hash = Sha256::new();
        let parts = parts.inspect(|part| part.iter().for_each(|part| hash.update(part)));
        self.store.put_parts(&name, size, parts)?;
        Ok(StateFile { size, sha256: hex(&hash.finalize()) })
    }

    /// Completes a checkpoint whose files are there, then removes what is older and not kept: kept are
    /// the newest up to this one, and the one of the best evaluation. What is of later steps was passed
    /// over, damaged, and counts for nothing.
    ///
    /// # Errors
    /// [`store::Error`]; the checkpoints before stay.
    pub(super) fn complete(
        &self,
        state: &TrainState,
        is_divided: bool,
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
            is_divided,
            files,
            size: None,
            sha256: None,
        };
        let name = checkpoint_name(state.step);
        self.store
            .put(&format!("{name}/{CHECKPOINT_MANIFEST_NAME}"), Bytes::from(render(&manifest)))?;
        self.remove_older(&name, state.best.map(|best| checkpoint_name(best.step)))
    }

    /// Removes what is of steps before `newest` and neither among those to keep nor the best: of a try
    /// that was killed there may be files without a manifest, too.
    fn remove_older(&self, newest: &str, best: Option<String>) -> Result<(), store::Error> {
        let paths = self.paths()?;
        let mut kept = complete_names(&paths);
        kept.retain(|name| **name <= *newest);
        kept.drain(..kept.len().saturating_sub(self.keep));
        kept.extend(best);
        let is_over = |path: &String| {
            path.split_once('/').is_some_and(|(name, _)| {
                checkpoint_step(name).is_some()
                    && name < newest
                    && kept.iter().all(|kept| kept != name)
            })
        };
        self.remove(paths.into_iter().filter(is_over))
    }

    /// Lists the names of complete checkpoints, oldest first.
    pub(super) fn names(&self) -> Result<Vec<String>, store::Error> {
        Ok(complete_names(&self.paths()?))
    }

    fn paths(&self) -> Result<Vec<String>, store::Error> {
        Ok(self.store.list()?.into_iter().map(|entry| entry.path).collect())
    }

    /// Fetches the files of a checkpoint that a rank needs: its own part, if the state was divided as
    /// `share` says, else all. `None`, with a warning, if one is damaged.
    ///
    /// # Errors
    /// A [`Failure`] if it belongs to other data or settings, or one of the store.
    pub(super) fn fetch(
        &self,
        name: &str,
        share: Share,
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
                "the checkpoint {} was written with other data or settings than this run's: delete {} to start over, \
                 or restore what was changed",
                self.uri(name),
                self.store.uri(),
            );
            return Err(Failure::new(FailureReason::CheckpointMismatch, message));
        }
        if let (Some(there), Some(here)) = (&manifest.inputs, &self.inputs)
            && there != here
        {
            let message = format!(
                "the checkpoint {} was written from other inputs (different are {}): delete {} to start over, or restore what was changed",
                self.uri(name),
                there.differences(here).join(", "),
                self.store.uri(),
            );
            return Err(Failure::new(FailureReason::CheckpointMismatch, message));
        }
        match fetch_files(&self.store, &format!("{name}/"), &manifest, share, directory)? {
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

/// Reads the manifest below a prefix, or says how it is damaged.
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

/// Checks that files of a checkpoint are there and as long as they should be, or says which is not.
///
/// # Errors
/// [`store::Error`].
pub(super) fn check_sizes(
    store: &Store,
    prefix: &str,
    files: &[(Share, StateFile)],
) -> Result<Result<(), String>, store::Error> {
    for (share, file) in files {
        let name = share.file_name();
        if store.size(&format!("{prefix}{name}"))? != Some(file.size) {
            return Ok(Err(format!("{name} is missing or truncated")));
        }
    }
    Ok(Ok(()))
}

/// Fetches the files of a checkpoint that a rank needs, or says how they are damaged.
///
/// # Errors
/// A [`Failure`] of the store or the disk.
pub(super) fn fetch_files(
    store: &Store,
    prefix: &str,
    manifest: &CheckpointManifest,
    share: Share,
    directory: &Path,
) -> Result<Result<Vec<(Share, PathBuf)>, String>, Failure> {
    let mut there = match manifest.files() {
        Ok(files) => files,
        Err(why) => return Ok(Err(why)),
    };
    if there.iter().any(|(kept, _)| *kept == share) {
        there.retain(|(kept, _)| *kept == share);
    }
    if let Err(why) = check_sizes(store, prefix, &there)? {
        return Ok(Err(why));
    }
    let mut files = Vec::new();
    for (kept, file) in there {
        let name = kept.file_name();
        let from = format!("{prefix}{name}");
        let path = directory.join(format!("restore-{}.tmp", files.len()));
        store.fetch(&from, &path)?;
        if hash_file(&path)?.1 != file.sha256 {
            return Ok(Err(format!("{name} does not have the digest of its manifest")));
        }
        files.push((kept, path));
    }
    Ok(Ok(files))
}

/// Returns a digest of all that decides the result: model, data, adapter and training settings.
///
/// Not how it is computed: attempt, recomputation, how a global batch is divided and over how many
/// ranks, and how often to evaluate or save may change between attempts.
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
    // What was saved before there were these fields keeps its digest.
    if !training.optimizer.is_default() {
        decisive["optimizer"] = serde_json::json!(training.optimizer);
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

    use super::{Archive, Share, Snapshot, StateFile, TrainState};
    use crate::{checkpoint::Evaluated, hex, store::Store};

    fn archive(keep: usize) -> Archive {
        let uri = ObjectUri::parse("s3://bucket/run").unwrap();
        Archive {
            store: Store::from_object_store(&uri, Arc::new(object_store::memory::InMemory::new())),
            run_id: RunId("a-1".to_owned()),
            settings_sha256: String::new(),
            model: ModelSource::of("file:///base"),
            inputs: None,
            lora: None,
            trained: 1,
            keep,
        }
    }

    const PARTS: [Share; 2] = [Share::Part([0, 2]), Share::Part([1, 2])];

    fn write(archive: &Archive, step: u64) -> Vec<StateFile> {
        let snapshot = Snapshot::Memory(vec![step as u8; 9].into());
        PARTS.iter().map(|&share| archive.write(step, share, &snapshot).unwrap()).collect()
    }

    fn complete(archive: &Archive, step: u64) {
        let files = write(archive, step);
        let state = TrainState { step, ..TrainState::default() };
        archive.complete(&state, true, files).unwrap();
    }

    #[test]
    fn what_is_damaged_or_was_never_complete_takes_no_place() {
        let archive = archive(1);
        let directory = tempfile::tempdir().unwrap();
        let is_sound =
            |name: &str| archive.fetch(name, PARTS[1], directory.path()).unwrap().is_some();
        complete(&archive, 4);
        // One that is never complete, and one whose part is another of the same length.
        write(&archive, 6);
        complete(&archive, 8);
        assert_eq!(archive.names().unwrap(), ["step-00000008"]);
        assert!(is_sound("step-00000008"));
        let part = "step-00000008/state-00002-of-00002.safetensors";
        archive.store.put(part, vec![7; 9].into()).unwrap();
        assert!(!is_sound("step-00000008"));
        // The run went on from before it.
        write(&archive, 4);
        complete(&archive, 5);
        assert_eq!(archive.names().unwrap(), ["step-00000005", "step-00000008"]);
        assert!(is_sound("step-00000005"));
        write(&archive, 6);
        complete(&archive, 9);
        assert_eq!(archive.names().unwrap(), ["step-00000009"]);
        assert_eq!(archive.store.list().unwrap().len(), 3, "two parts and a manifest");
    }

    #[test]
    fn a_manifest_of_an_earlier_release_is_read_and_one_without_files_is_not() {
        let archive = archive(1);
        let directory = tempfile::tempdir().unwrap();
        let manifest = |files: &str| {
            format!(
                r#"{{"version": 1, "runId": "a-1", "settingsSha256": "", "state": {{"step": 6,
                "tokensSeen": 9, "firstLoss": 2.0, "lastLoss": 1.0, "baseEvalLoss": null, "lastEval": null,
                "best": null, "evaluationsSinceBest": 0}}, {files}}}"#
            )
        };
        archive.store.put("step-00000006/state.safetensors", vec![1; 9].into()).unwrap();
        let sha256 = hex(&Sha256::digest([1; 9]));
        let fetched = |files: &str| {
            let name = "step-00000006/checkpoint-manifest.json";
            archive.store.put(name, manifest(files).into()).unwrap();
            archive.fetch("step-00000006", PARTS[0], directory.path()).unwrap()
        };
        let before = fetched(&format!(r#""size": 9, "sha256": "{sha256}""#)).unwrap();
        assert_eq!((before.state.step, before.files[0].0), (6, Share::Whole));
        let file = format!(r#"{{"size": 9, "sha256": "{sha256}"}}"#);
        assert!(fetched(&format!(r#""files": [{file}]"#)).is_some());
        assert!(fetched(r#""files": []"#).is_none());
        assert!(fetched(r#""files": [], "isDivided": true"#).is_none());
        assert!(fetched(&format!(r#""files": [{file}, {file}]"#)).is_none());
    }

    #[test]
    fn a_checkpoint_of_a_model_that_was_replaced_since_is_not_gone_on_from() {
        let of_model = |archive: &Archive, sha256: &str| Archive {
            inputs: Some(InputDigests {
                train_sha256: "1".to_owned(),
                validation_sha256: None,
                model_sha256: sha256.to_owned(),
                initial_sha256: None,
                chat_template_sha256: None,
            }),
            ..archive.clone()
        };
        let unknown = archive(1);
        let first = of_model(&unknown, "2");
        let directory = tempfile::tempdir().unwrap();
        let fetched =
            |archive: &Archive| archive.fetch("step-00000004", PARTS[1], directory.path());
        complete(&first, 4);
        assert!(fetched(&first).unwrap().is_some());
        assert!(fetched(&unknown).unwrap().is_some(), "another rank, which rank 0 compares for");
        let Err(refused) = fetched(&of_model(&unknown, "3")) else { panic!("it was taken") };
        assert_eq!(refused.reason, FailureReason::CheckpointMismatch);
        assert!(refused.message.contains("the files of model.uri"), "{}", refused.message);
        // One of an earlier release says nothing.
        complete(&unknown, 4);
        assert!(fetched(&first).unwrap().is_some());
    }

    #[test]
    fn keeps_the_newest_and_the_best_and_reads_what_it_wrote() {
        let archive = archive(2);
        let directory = tempfile::tempdir().unwrap();
        let mut state = TrainState::default();
        for step in [2, 4, 6, 8, 10] {
            state.step = step;
            if step == 4 {
                state.best = Some(Evaluated { step, loss: 0.5 });
            }
            // One is in memory and the next on disk; one is large enough to go up in parts.
            let bytes = vec![step as u8; if step == 8 { 33 << 20 } else { 9 }];
            let path = directory.path().join("checkpoint.tmp");
            let snapshot = if step % 4 == 0 {
                std::fs::write(&path, &bytes).unwrap();
                Snapshot::File(path.clone())
            } else {
                Snapshot::Memory(bytes.clone().into())
            };
            // Two files of parts, or one of all.
            let shares = if step == 6 { &PARTS[..] } else { &[Share::Whole] };
            let files = shares.iter().map(|&share| archive.write(step, share, &snapshot).unwrap());
            let files = files.collect();
            let name = format!("step-{step:08}");
            assert!(!archive.names().unwrap().contains(&name), "it has no manifest");
            archive.complete(&state, step == 6, files).unwrap();
            drop(snapshot);
            assert!(!path.exists(), "the file goes with the snapshot");
            for asked in [Share::Whole, Share::Part([1, 2]), Share::Part([0, 4])] {
                let fetched = archive.fetch(&name, asked, directory.path()).unwrap().unwrap();
                assert_eq!(fetched.state, state);
                let found: Vec<Share> = fetched.files.iter().map(|(share, _)| *share).collect();
                let expected = if shares.contains(&asked) { &[asked][..] } else { shares };
                assert_eq!(found, expected);
                for (_, path) in fetched.files {
                    assert!(std::fs::read(path).unwrap() == bytes);
                }
            }
        }
        let kept = ["step-00000004", "step-00000008", "step-00000010"];
        assert_eq!(archive.names().unwrap(), kept);
        archive.clear().unwrap();
        assert!(archive.store.list().unwrap().is_empty());
    }
}
