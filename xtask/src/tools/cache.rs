//! Downloads and slow results outside the checkout, keyed by name and version.
//!
//! An entry is made under another name and renamed, so that it is there complete or not at all.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// How names of unfinished entries begin; the number of the process that makes them follows.
const PARTIAL: &str = ".partial.";

/// Returns the cache's directory: `$FINETUNE_CACHE`, or `finetune` in the user's cache.
pub(crate) fn directory() -> PathBuf {
    let set =
        |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("FINETUNE_CACHE").unwrap_or_else(|| {
        let user = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")));
        user.unwrap_or_else(std::env::temp_dir).join("finetune")
    })
}

/// Returns an entry, making it first if it is not there.
pub(crate) fn entry(name: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let path = directory().join(name);
    if path.exists() {
        return Ok(path);
    }
    remove_abandoned();
    let partial = directory().join(format!("{PARTIAL}{}.{name}", std::process::id()));
    // Left by a process of the same number, perhaps before a restart of the machine.
    let _ = std::fs::remove_dir_all(&partial);
    std::fs::create_dir_all(&partial)
        .with_context(|| format!("cannot make {}", partial.display()))?;
    let made = make(&partial).with_context(|| format!("cannot make {name}"));
    if let Err(error) = made {
        let _ = std::fs::remove_dir_all(&partial);
        return Err(error);
    }
    match std::fs::rename(&partial, &path) {
        Ok(()) => Ok(path),
        // Another process was faster.
        Err(_) if path.exists() => {
            let _ = std::fs::remove_dir_all(&partial);
            Ok(path)
        }
        Err(error) => Err(error).with_context(|| format!("cannot rename to {}", path.display())),
    }
}

/// Removes what interrupted processes left unfinished; they can be gigabytes.
fn remove_abandoned() {
    let entries = std::fs::read_dir(directory()).into_iter().flatten().filter_map(Result::ok);
    for entry in entries {
        let name = entry.file_name().to_string_lossy().into_owned();
        let maker = name.strip_prefix(PARTIAL).and_then(|rest| rest.split('.').next());
        if maker.is_some_and(|process| !Path::new("/proc").join(process).exists()) {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}
