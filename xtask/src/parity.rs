//! Our exports in other people's software: transformers and PEFT, in an environment of their own.

use std::{path::PathBuf, process::Command};

use anyhow::Result;

use crate::{build, cache, libtorch, shell};

/// Returns a Python with the pinned libraries, made on the first call.
pub(crate) fn python() -> Result<PathBuf> {
    let directory = cache::directory().join("parity-venv");
    let script = shell::root().join("trainer/tests/golden/make_venv.py");
    // The script knows itself whether what is there is what is wanted.
    shell::run(Command::new("python3").arg(script).arg(&directory))?;
    Ok(directory.join("bin/python"))
}

/// Exports with our trainer, then loads and compares with theirs.
pub(crate) fn run() -> Result<()> {
    let python = python()?;
    build::run()?;
    let goldens = shell::root().join("trainer/tests/golden");
    shell::run(Command::new(&python).arg(goldens.join("gen.py")).arg("--check"))?;
    shell::run(
        shell::cargo(&["test", "--release", "--workspace", "--test", "golden", "exports"])
            .env("LIBTORCH", libtorch::directory()?),
    )?;
    shell::run(
        Command::new(&python)
            .arg(goldens.join("parity.py"))
            .arg(shell::root().join("target/tmp/parity")),
    )
}
