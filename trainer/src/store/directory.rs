//! Creates local directories atomically.

use std::{fs, fs::File, path::Path};

use crate::failure::Failure;

/// Creates a directory that appears complete or not at all: `fill` writes it under another name, then it
/// is renamed.
///
/// # Errors
/// A [`Failure`] of the disk, or that of `fill`.
pub(crate) fn create(
    to: &Path,
    fill: impl FnOnce(&Path) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut name = to.file_name().unwrap_or_default().to_owned();
    name.push(".partial");
    let partial = to.with_file_name(name);
    let disk =
        |error: std::io::Error| Failure::from_io(&error, &format!("cannot write {partial:?}"));
    if partial.exists() {
        fs::remove_dir_all(&partial).map_err(disk)?;
    }
    fs::create_dir_all(&partial).map_err(disk)?;
    fill(&partial)?;
    fs::rename(&partial, to).map_err(disk)
}

/// Calls `create` unless the directory exists. Processes that need the same directory wait for each other.
///
/// # Errors
/// A [`Failure`] of the disk, or that of `create`.
pub(crate) fn once(
    directory: &Path,
    create: impl FnOnce() -> Result<(), Failure>,
) -> Result<(), Failure> {
    let disk =
        |error: std::io::Error| Failure::from_io(&error, &format!("cannot create {directory:?}"));
    if let Some(parent) = directory.parent() {
        fs::create_dir_all(parent).map_err(disk)?;
    }
    let lock = File::create(directory.with_extension("lock")).map_err(disk)?;
    lock.lock().map_err(disk)?;
    if directory.exists() { Ok(()) } else { create() }
}
