//! Where a run is carried out: its environment, scratch space, device and ranks.

use std::{
    path::{Path, PathBuf},
    sync::atomic::AtomicBool,
};

use tch::Device;

use crate::{distributed::Ranks, failure::Failure, store::Environment};

/// What a run is given beside its configuration.
pub struct RunContext<'a> {
    /// Credentials and endpoints.
    pub environment: &'a Environment,
    /// Scratch space: tokenised rows, files before they are uploaded.
    pub work_dir: &'a Path,
    /// Where downloaded models are kept.
    pub model_cache: &'a Path,
    /// Whether another rank of this machine downloads the models into the same cache.
    pub shares_model_cache: bool,
    /// Set when the run is asked to stop.
    pub stop: &'a AtomicBool,
    /// The device of this rank.
    pub device: Device,
    /// The ranks of the run.
    pub ranks: Ranks,
}

impl RunContext<'_> {
    /// Creates a directory of the scratch space, without what an earlier attempt left in it.
    ///
    /// # Errors
    /// A [`Failure`] if the disk cannot be written.
    pub fn empty_directory(&self, name: &str) -> Result<PathBuf, Failure> {
        let path = self.work_dir.join(name);
        let make = || {
            if path.exists() {
                std::fs::remove_dir_all(&path)?;
            }
            std::fs::create_dir_all(&path)
        };
        make().map_err(|error| Failure::from_io(&error, &format!("cannot create {path:?}")))?;
        Ok(path)
    }
}
