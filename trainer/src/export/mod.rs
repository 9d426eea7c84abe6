//! Exports a trained model: as a PEFT directory, a Hugging Face directory, or both.

mod adapter;
mod card;
mod files;
mod merge;
mod model;

use std::path::{Path, PathBuf};

use finetune_contract::{ArtifactKind, FailureReason, RunConfig};

use crate::{distributed, failure::Failure, hf::weights, model::Model, train::TrainLoop};

pub use adapter::adapter_config;
pub use merge::merged;

/// Why an export failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be written or copied.
    #[error("cannot write {path:?}")]
    Write {
        /// The file.
        path: PathBuf,
        /// The error of the system.
        #[source]
        source: std::io::Error,
    },
    /// The weights of the base model can no longer be read.
    #[error("the base model's weights cannot be read")]
    Base(#[source] weights::Error),
    /// Another rank, which has a shard of the weights, was lost.
    #[error(transparent)]
    Ranks(#[from] distributed::Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match &error {
            Error::Write { path, source } => {
                Self::from_io(source, &format!("cannot write {path:?}"))
            }
            Error::Base(_) => Self::from_chain(FailureReason::InvalidModel, &error),
            Error::Ranks(lost) => lost.clone().into(),
        }
    }
}

/// The inputs of an export.
pub struct Export<'a> {
    /// The run.
    pub config: &'a RunConfig,
    /// The directory of the base model.
    pub base: &'a Path,
    /// The trained model and the state of its training.
    pub training: &'a TrainLoop<'a>,
    /// The step of the exported weights.
    pub step: u64,
    /// The chat template that replaces that of the base model, if the dataset sets one.
    pub chat_template: Option<&'a str>,
    /// The token that ends the trained turns, if generation with the base model does not stop at it.
    pub end_of_turn: Option<u32>,
}

/// Contributes the shards of this rank while rank 0 runs [`write()`]. Does nothing if rank 0 has all
/// weights.
///
/// # Errors
/// A [`Failure`] if another rank is lost.
pub fn contribute(model: &Model) -> Result<(), Failure> {
    if model.sharded_training().is_some() { Ok(model::contribute(model)?) } else { Ok(()) }
}

/// Writes the files of a result into an empty directory and returns the kind of the result.
///
/// # Errors
/// A [`Failure`] if the disk cannot be written or the base model cannot be read.
pub fn write(export: &Export<'_>, directory: &Path) -> Result<ArtifactKind, Failure> {
    match (&export.config.lora, export.config.output.merge) {
        (None, _) => {
            model::write(export, directory)?;
            card::write(export, ArtifactKind::FullModel, directory)?;
            Ok(ArtifactKind::FullModel)
        }
        (Some(lora), false) => {
            adapter::write(export, lora, directory)?;
            card::write(export, ArtifactKind::Adapter, directory)?;
            Ok(ArtifactKind::Adapter)
        }
        (Some(lora), true) => {
            model::write(export, directory)?;
            card::write(export, ArtifactKind::MergedModel, directory)?;
            let subdirectory = directory.join("adapter");
            std::fs::create_dir(&subdirectory)
                .map_err(|source| Error::Write { path: subdirectory.clone(), source })?;
            adapter::write(export, lora, &subdirectory)?;
            card::write(export, ArtifactKind::Adapter, &subdirectory)?;
            Ok(ArtifactKind::MergedModel)
        }
    }
}
