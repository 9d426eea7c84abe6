//! The context of a run: environment, scratch space, device and ranks.

use std::{
    path::{Path, PathBuf},
    sync::atomic::AtomicBool,
};

use tch::Device;

use crate::{distributed::Ranks, failure::Failure, store::Environment};

/// Everything a run needs beside its configuration.
pub struct RunContext<'a> {
    /// Credentials and endpoints.
    pub environment: &'a Environment,
    /// Scratch space for tokenized rows and for files before they are uploaded.
    pub work_dir: &'a Path,
    /// The directory of downloaded models.
    pub model_cache: &'a Path,
    /// Whether another rank of this machine downloads the models into the same cache.
    pub shares_model_cache: bool,
    /// Set when the run should stop.
    pub stop: &'a AtomicBool,
    /// The device of this rank.
    pub device: Device,
    /// The ranks of the run.
    pub ranks: Ranks,
}

impl RunContext<'_> {
    /// Creates an empty directory in the scratch space, deleting what an earlier attempt left in it.
    ///
    /// # Errors
    /// A [`Failure`] if the disk cannot be written.
    pub fn empty_directory(&self, name: &str) -> Result<PathBuf, Failure> {
        let path = self.work_dir.join(name);
        let create = || {
            if path.exists() {
                std::fs::remove_dir_all(&path)?;
            }
            std::fs::create_dir_all(&path)
        };
        create().map_err(|error| Failure::from_io(&error, &format!("cannot create {path:?}")))?;
        Ok(path)
    }
}
