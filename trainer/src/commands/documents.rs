//! The documents that the operator exchanges with a trainer process, as files.

use std::path::{Path, PathBuf};

use clap::Args;
use finetune_contract::{Document, FailureReason, parse, render};

use crate::failure::Failure;

/// The files of a preflight or a training process.
#[derive(Debug, Args)]
pub(super) struct Documents {
    /// The configuration to read.
    #[arg(long)]
    pub(super) config: PathBuf,
    /// Where to write the report.
    #[arg(long)]
    pub(super) report: PathBuf,
    /// Scratch space; kept between attempts where possible.
    #[arg(long)]
    pub(super) work_dir: PathBuf,
}

impl Documents {
    /// Creates the work directory and returns its absolute path.
    ///
    /// # Errors
    /// A [`Failure`] if the directory cannot be created.
    pub(super) fn create_work_dir(&self) -> Result<PathBuf, Failure> {
        let path = &self.work_dir;
        std::fs::create_dir_all(path)
            .and_then(|()| std::path::absolute(path))
            .map_err(|error| Failure::from_io(&error, &format!("cannot create {path:?}")))
    }
}

/// Reads and parses a document.
///
/// # Errors
/// A [`Failure`] of reason `InvalidConfiguration`.
pub(super) fn read<D: Document>(path: &Path) -> Result<D, Failure> {
    let text = std::fs::read_to_string(path).map_err(|error| {
        Failure::new(FailureReason::InvalidConfiguration, format!("cannot read {path:?}: {error}"))
    })?;
    parse(&text).map_err(|error| Failure::from_chain(FailureReason::InvalidConfiguration, &error))
}

/// Writes a document.
///
/// # Errors
/// A [`Failure`] if the file cannot be written.
pub(super) fn write<D: Document>(path: &Path, document: &D) -> Result<(), Failure> {
    std::fs::write(path, render(document))
        .map_err(|error| Failure::from_io(&error, &format!("cannot write {path:?}")))
}
