//! What a run leaves in the bucket: object names and the manifest that makes them count.

use serde::{Deserialize, Serialize};

use crate::{
    document::Document,
    inputs::{DecisiveSettings, InputDigests, settings_differences},
    settings::{ModelSource, RunId},
};

/// The commit marker of a published result; an output without it does not exist.
pub const MANIFEST_NAME: &str = "finetune-manifest.json";

/// The commit marker of a checkpoint.
pub const CHECKPOINT_MANIFEST_NAME: &str = "checkpoint-manifest.json";

/// Returns the name of a checkpoint's prefix below the run's checkpoints.
pub fn checkpoint_name(step: u64) -> String {
    format!("step-{step:08}")
}

/// Returns the step of a checkpoint by its prefix's name.
pub fn checkpoint_step(name: &str) -> Option<u64> {
    name.strip_prefix("step-")?.parse().ok()
}

/// What a result is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ArtifactKind {
    /// A PEFT LoRA directory.
    Adapter,
    /// A Hugging Face model directory, trained in full.
    FullModel,
    /// A Hugging Face model directory with the adapter merged in, and the adapter under `adapter/`.
    MergedModel,
}

impl ArtifactKind {
    /// Returns the kind as a job's status has it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Adapter => "Adapter",
            Self::FullModel => "FullModel",
            Self::MergedModel => "MergedModel",
        }
    }
}

/// The files of a published result, written last and create-only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Manifest {
    /// [`crate::CONTRACT_VERSION`].
    pub version: u32,
    /// The run that wrote it.
    pub run_id: RunId,
    /// What it is.
    pub kind: ArtifactKind,
    /// The program and version that wrote it.
    pub generator: String,
    /// The base model, with its revision pinned where there is one.
    pub base_model: ModelSource,
    /// SHA-256 of the training rows.
    pub train_sha256: String,
    /// Digests of everything that was read; absent in what earlier releases published.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inputs: Option<InputDigests>,
    /// The settings that decided the result; absent in what earlier releases published.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settings: Option<DecisiveSettings>,
    /// Optimizer steps of the weights.
    pub step: u64,
    /// Every file, sorted by path; the manifest itself is not among them.
    pub files: Vec<ManifestFile>,
}

/// What two manifests say about each other's inputs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Comparison {
    /// The inputs are equal.
    Equal,
    /// These differ, for people.
    Different(Vec<String>),
    /// One of them was written by a release that did not record its inputs; what it recorded is equal.
    Unknown,
}

impl Manifest {
    /// Compares what `self`, which is published, and `here` were made from.
    pub fn compare(&self, here: &Self) -> Comparison {
        let recorded = |manifest: &Self| manifest.inputs.clone().zip(manifest.settings.clone());
        let differences = match (recorded(self), recorded(here)) {
            (Some((digests, settings)), Some((digests_here, settings_here))) => {
                let mut differences = digests.differences(&digests_here);
                differences.extend(settings_differences(&settings, &settings_here));
                differences
            }
            _ if self.train_sha256 != here.train_sha256 => {
                vec!["the rows of dataset.train".to_owned()]
            }
            _ => return Comparison::Unknown,
        };
        if differences.is_empty() { Comparison::Equal } else { Comparison::Different(differences) }
    }
}

/// A complete result that was found at an output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PublishedResult {
    /// The run that published it.
    pub run_id: RunId,
    /// What it is.
    pub kind: ArtifactKind,
    /// SHA-256 of its manifest's bytes.
    pub manifest_sha256: String,
    /// SHA-256 of [`crate::settings_text`] of its settings.
    pub settings_sha256: String,
    /// Optimizer steps of the weights.
    pub step: u64,
}

impl Document for Manifest {
    const NAME: &'static str = "manifest";
}

/// One file of a result.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ManifestFile {
    /// The path below the output, with `/`.
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// Lower-case hexadecimal SHA-256 of the bytes.
    pub sha256: String,
}
