//! Writing what other software loads as it is: a PEFT directory, a Hugging Face directory, or both.

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

/// Why files cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be written or copied.
    #[error("cannot write {path:?}")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A base weight cannot be read any more.
    #[error("the base model's weights cannot be read")]
    Base(#[source] weights::Error),
    /// Another rank, which has a part of the weights, is lost.
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

/// What an export is made of.
pub struct Export<'a> {
    /// The run.
    pub config: &'a RunConfig,
    /// The base model's directory.
    pub base: &'a Path,
    /// The trained model and what the run has come to.
    pub training: &'a TrainLoop<'a>,
    /// The step of the weights.
    pub step: u64,
    /// The template that took the place of the base model's, if one did.
    pub chat_template: Option<&'a str>,
    /// The token that ends the turns trained on, if the base model's generation does not stop there.
    pub end_of_turn: Option<u32>,
}

/// Takes part in what [`write()`] does on rank 0, where that needs the parts of all ranks.
///
/// # Errors
/// A [`Failure`] if another rank is lost.
pub fn follow(model: &Model) -> Result<(), Failure> {
    if model.sharded_training().is_some() { Ok(model::follow(model)?) } else { Ok(()) }
}

/// Writes the files of a result into an empty directory and returns what it is.
///
/// # Errors
/// A [`Failure`] if disk or base model fail.
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
            let below = directory.join("adapter");
            std::fs::create_dir(&below)
                .map_err(|source| Error::Write { path: below.clone(), source })?;
            adapter::write(export, lora, &below)?;
            card::write(export, ArtifactKind::Adapter, &below)?;
            Ok(ArtifactKind::MergedModel)
        }
    }
}
