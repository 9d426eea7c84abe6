//! Prometheus and promtool, which test alerts and dashboards: the system's, or those of Debian's
//! package `prometheus`.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::{cache, shell};

/// The cache's entry; its version is the distribution's.
const ENTRY: &str = "prometheus-debian";

const PROGRAMS: [&str; 2] = ["prometheus", "promtool"];

/// Returns promtool, fetching it where installing was allowed.
pub(crate) fn promtool() -> Result<PathBuf> {
    find("promtool")
}

/// Returns the server, fetching it where installing was allowed.
pub(crate) fn server() -> Result<PathBuf> {
    find("prometheus")
}

/// The package is unpacked and not installed: its service would start.
fn find(name: &str) -> Result<PathBuf> {
    if let Some(program) = in_path(name) {
        return Ok(program);
    }
    if !cache::directory().join(ENTRY).exists() && !shell::may_install() {
        bail!("{name} is missing: install Debian's package prometheus, or set FINETUNE_INSTALL=1");
    }
    Ok(cache::entry(ENTRY, fetch)?.join(name))
}

fn in_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let mut candidates = std::env::split_paths(&path).map(|directory| directory.join(name));
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
    for name in PROGRAMS {
        let program = to.join(name);
        std::fs::rename(package.join("usr/bin").join(name), &program)?;
        if !shell::has(&program.to_string_lossy(), "--version") {
            bail!("{name} of the package prometheus does not run here");
        }
    }
    Ok(std::fs::remove_dir_all(&package)?)
}
