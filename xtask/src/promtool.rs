//! promtool, which tests alerts: the system's, or the one of Debian's package `prometheus`.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::{cache, shell};

/// Returns promtool, fetching it where installing was allowed.
///
/// The package is unpacked into the cache and not installed: its service would start.
pub(crate) fn find() -> Result<PathBuf> {
    if let Some(program) = in_path() {
        return Ok(program);
    }
    let package = cache::directory().join("prometheus-debian");
    if !package.exists() && !shell::may_install() {
        bail!(
            "promtool is missing: install the Debian package prometheus, or set FINETUNE_INSTALL=1"
        );
    }
    let package = cache::entry("prometheus-debian", fetch)?;
    Ok(package.join("usr/bin/promtool"))
}

fn in_path() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join("promtool")).find(|p| p.is_file())
}

fn fetch(to: &Path) -> Result<()> {
    shell::run(Command::new("apt-get").args(["update", "--quiet"]))?;
    let download = to.join(".download");
    std::fs::create_dir(&download)?;
    let mut command = Command::new("apt-get");
    shell::run(command.current_dir(&download).args(["download", "--quiet", "prometheus"]))?;
    let archive = std::fs::read_dir(&download)?.next().context("apt-get downloaded nothing")??;
    let mut unpack = Command::new("dpkg-deb");
    shell::run(unpack.arg("--extract").arg(archive.path()).arg(to))?;
    std::fs::remove_dir_all(&download)?;
    if !shell::has(&to.join("usr/bin/promtool").to_string_lossy(), "--version") {
        bail!("the package prometheus has no promtool that runs here");
    }
    Ok(())
}
