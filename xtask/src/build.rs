//! Building both binaries against libtorch.

use std::path::PathBuf;

use anyhow::Result;

use crate::tools::{libtorch, shell};

/// Where the binaries are.
pub(crate) struct Binaries {
    /// The command line.
    pub finetune: PathBuf,
    /// The trainer.
    pub trainer: PathBuf,
}

/// Builds the workspace for release, but for xtask, which runs already.
///
/// Always the rest as a whole: cargo unites features over what it builds at once, and building one
/// package alone would compile half of the dependencies again.
pub(crate) fn run() -> Result<Binaries> {
    let libtorch = libtorch::directory()?;
    println!("building against libtorch in {}", libtorch.display());
    shell::run(
        shell::cargo(&["build", "--release", "--workspace", "--exclude", "xtask"])
            .env("LIBTORCH", libtorch),
    )?;
    let release = shell::root().join("target/release");
    Ok(Binaries { finetune: release.join("finetune"), trainer: release.join("finetune-trainer") })
}

/// Builds the trainer that computes on GPUs, beside the usual one.
pub(crate) fn run_cuda() -> Result<PathBuf> {
    let libtorch = libtorch::with_cuda()?;
    println!("building against libtorch in {}", libtorch.display());
    let target = shell::root().join("target/cuda");
    let mut cargo = shell::cargo(&["build", "--release", "--package", "finetune-trainer"]);
    cargo
        .args(["--features", "cuda", "--target-dir"])
        .arg(&target)
        .env("CUDA_HOME", libtorch.join("cuda"))
        .env("LIBTORCH", libtorch);
    shell::run(&mut cargo)?;
    Ok(target.join("release/finetune-trainer"))
}
