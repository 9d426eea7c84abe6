//! The part of libtorch that training on CPUs needs, taken from PyTorch's wheel.
//!
//! The wheel is a CUDA build; its CPU library needs only the small CUDA runtime and profiling
//! libraries beside it, so two gigabytes of others are fetched only for a trainer with CUDA.

use std::{
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::tools::{cache, python, shell};

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

/// What the CUDA part of libtorch loads, and the headers it is compiled against, as PyTorch's wheel
/// asks for them.
const CUDA_PACKAGES: [&str; 17] = [
    "nvidia-cublas==13.1.1.3",
    "nvidia-cuda-cccl==13.0.85",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-cupti==13.0.85",
    "nvidia-cuda-nvrtc==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cudnn-cu13==9.20.0.48",
    "nvidia-cufft==12.0.0.61",
    "nvidia-cufile==1.15.1.6",
    "nvidia-curand==10.4.0.35",
    "nvidia-cusolver==12.0.4.66",
    "nvidia-cusparse==12.6.3.3",
    "nvidia-cusparselt-cu13==0.8.1",
    "nvidia-nccl-cu13==2.29.7",
    "nvidia-nvjitlink==13.0.88",
    "nvidia-nvshmem-cu13==3.4.5",
    "nvidia-nvtx==13.0.85",
];

/// Returns a libtorch with its CUDA part; below its `cuda` are the headers of CUDA and NCCL.
pub(crate) fn with_cuda() -> Result<PathBuf> {
    cache::entry(&format!("libtorch-cuda-{VERSION}"), make_with_cuda)
}

fn make_with_cuda(to: &Path) -> Result<()> {
    let unpacked = to.join(".unpacked");
    let torch = format!("torch=={VERSION}");
    for package in CUDA_PACKAGES.into_iter().chain([torch.as_str()]) {
        python::unpack(package, &unpacked)?;
    }
    std::fs::rename(unpacked.join("torch/include"), to.join("include"))?;
    gather(&unpacked, &to.join("lib"), &|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let is_library = path.parent().is_some_and(|parent| parent.ends_with("lib"));
        is_library && name.contains(".so") && !name.contains("python")
    })?;
    gather_headers(&unpacked.join("nvidia"), &to.join("cuda/include"))?;
    std::fs::remove_dir_all(&unpacked)?;
    std::fs::write(to.join("build-version"), VERSION)?;
    Ok(())
}

/// Moves the files below a directory that a test accepts into one.
fn gather(from: &Path, to: &Path, accepts: &dyn Fn(&Path) -> bool) -> Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let path = entry?.path();
        if path.is_dir() {
            gather(&path, to, accepts)?;
        } else if accepts(&path) {
            std::fs::rename(&path, to.join(path.file_name().unwrap_or_default()))?;
        }
    }
    Ok(())
}

/// Lays the `include` directories of several packages over each other.
fn gather_headers(packages: &Path, to: &Path) -> Result<()> {
    for package in std::fs::read_dir(packages)? {
        let headers = package?.path().join("include");
        if headers.is_dir() {
            let mut copy = Command::new("cp");
            std::fs::create_dir_all(to)?;
            shell::run(copy.arg("-a").arg(headers.join(".")).arg(to))?;
        }
    }
    Ok(())
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
