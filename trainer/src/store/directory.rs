//! Directories that are there complete or not at all.

use std::{fs, fs::File, path::Path};

use crate::failure::Failure;

/// Fills a directory under another name and renames it.
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

/// Calls `make` unless the directory exists; processes that want the same one wait for each other.
///
/// # Errors
/// A [`Failure`] of the disk, or that of `make`.
pub(crate) fn once(
    directory: &Path,
    make: impl FnOnce() -> Result<(), Failure>,
) -> Result<(), Failure> {
    let disk =
        |error: std::io::Error| Failure::from_io(&error, &format!("cannot make {directory:?}"));
    if let Some(parent) = directory.parent() {
        fs::create_dir_all(parent).map_err(disk)?;
    }
    let lock = File::create(directory.with_extension("lock")).map_err(disk)?;
    lock.lock().map_err(disk)?;
    if directory.exists() { Ok(()) } else { make() }
}
