//! promtool, which tests alerts: the system's, or the one of Debian's package `prometheus`.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::tools::{cache, shell};

/// The cache's entry; its version is the distribution's.
const ENTRY: &str = "promtool-debian";

/// Returns promtool, fetching it where installing was allowed.
///
/// The package is unpacked and not installed: its service would start.
pub(crate) fn find() -> Result<PathBuf> {
    if let Some(program) = in_path() {
        return Ok(program);
    }
    if !cache::directory().join(ENTRY).exists() && !shell::may_install() {
        bail!(
            "promtool is missing: install Debian's package prometheus, or set FINETUNE_INSTALL=1"
        );
    }
    Ok(cache::entry(ENTRY, fetch)?.join("promtool"))
}

fn in_path() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let mut candidates = std::env::split_paths(&path).map(|directory| directory.join("promtool"));
    candidates.find(|program| program.is_file())
}

fn fetch(to: &Path) -> Result<()> {
    let package = to.join(".package");
    std::fs::create_dir(&package)?;
    shell::run(Command::new("apt-get").args(["update", "--quiet"]))?;
    let mut download = Command::new("apt-get");
    shell::run(download.current_dir(&package).args(["download", "--quiet", "prometheus"]))?;
    let archive = std::fs::read_dir(&package)?.next().context("apt-get downloaded nothing")??;
    let mut unpack = Command::new("dpkg-deb");
    shell::run(unpack.arg("--extract").arg(archive.path()).arg(&package))?;
    let program = to.join("promtool");
    std::fs::rename(package.join("usr/bin/promtool"), &program)?;
    std::fs::remove_dir_all(&package)?;
    if !shell::has(&program.to_string_lossy(), "--version") {
        bail!("promtool of the package prometheus does not run here");
    }
    Ok(())
}
