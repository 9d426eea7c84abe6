//! The part of libtorch that training on processors needs, taken from PyTorch's wheel.
//!
//! The wheel is a CUDA build; its CPU library needs only the small CUDA runtime and profiling
//! libraries beside it, so two gigabytes of others are never fetched.

use std::{
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::{cache, python, shell};

/// The version tch 0.26 is made for.
const VERSION: &str = "2.13.0";

/// Returns the libtorch to build against: `$LIBTORCH` if it is set, else one from the cache.
pub(crate) fn directory() -> Result<PathBuf> {
    if let Some(own) = std::env::var_os("LIBTORCH").filter(|value| !value.is_empty()) {
        let own = PathBuf::from(own);
        let version = std::fs::read_to_string(own.join("build-version")).unwrap_or_default();
        if !version.starts_with(VERSION) {
            bail!(
                "LIBTORCH is {}, whose build-version is {:?}; {VERSION} is needed. Unset LIBTORCH to have it fetched",
                own.display(),
                version.trim()
            );
        }
        return Ok(own);
    }
    if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
        bail!(
            "only for Linux on x86-64 is libtorch fetched; set LIBTORCH to a libtorch {VERSION} for this machine"
        );
    }
    cache::entry(&format!("libtorch-{VERSION}"), make)
}

fn make(to: &Path) -> Result<()> {
    let unpacked = to.join(".unpacked");
    for package in
        [&format!("torch=={VERSION}"), "nvidia-cuda-runtime==13.0.96", "nvidia-cuda-cupti==13.0.85"]
    {
        python::unpack(package, &unpacked)?;
    }
    let lib = to.join("lib");
    std::fs::create_dir_all(&lib)?;
    for name in [
        "libtorch_cpu.so",
        "libc10.so",
        "libshm.so",
        "libgomp.so.1",
        "libcudart.so.13",
        "libcupti.so.13",
    ] {
        let found = python::find(&unpacked, |file| {
            file == name || (name == "libgomp.so.1" && file.starts_with("libgomp"))
        })?;
        std::fs::rename(found, lib.join(name))?;
    }
    std::fs::rename(unpacked.join("torch/include"), to.join("include"))?;
    std::fs::remove_dir_all(&unpacked)?;
    symlink("libgomp.so.1", lib.join("libgomp.so"))?;
    // torch-sys links libtorch.so, which in the wheel only pulls in CUDA.
    let mut compiler = Command::new("cc");
    compiler.args(["-shared", "-x", "c", "/dev/null", "-o"]).arg(lib.join("libtorch.so"));
    shell::run(&mut compiler).context("a C and C++ compiler is needed (Debian: g++)")?;
    std::fs::write(to.join("build-version"), VERSION)?;
    Ok(())
}
