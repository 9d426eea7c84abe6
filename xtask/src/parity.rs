//! Our exports in other people's software: transformers and PEFT, in an environment of their own.

use std::{path::PathBuf, process::Command};

use anyhow::Result;

use crate::{
    build,
    fixtures::model,
    tools::{cache, libtorch, python::unpack, shell},
};

/// A package that has the chat templates of many models.
const TEMPLATES: &str = "trl==1.16.0";

/// Returns a Python with the pinned libraries, made on the first call.
pub(crate) fn python() -> Result<PathBuf> {
    let directory = cache::directory().join("parity-venv");
    let script = shell::root().join("trainer/tests/golden/make_venv.py");
    // The script knows itself whether what is there is what is wanted.
    shell::run(Command::new("python3").arg(script).arg(&directory))?;
    Ok(directory.join("bin/python"))
}

/// Returns the chat templates of models that people train, fetched on the first call.
fn real_templates() -> Result<PathBuf> {
    let directory = cache::directory().join("chat-templates");
    let templates = directory.join("trl/chat_templates");
    if !templates.exists() {
        unpack(TEMPLATES, &directory)?;
    }
    Ok(templates)
}

/// Exports with our trainer, then loads and compares with theirs.
pub(crate) fn run() -> Result<()> {
    let python = python()?;
    let binaries = build::run()?;
    let goldens = shell::root().join("trainer/tests/golden");
    shell::run(Command::new(&python).arg(goldens.join("gen.py")).arg("--check"))?;
    let templates = shell::root().join("target/tmp/templates");
    let script = goldens.join("templates.py");
    shell::run(Command::new(&python).arg(&script).args(["golden", "--check"]))?;
    shell::run(
        Command::new(&python).arg(&script).arg("render").args([&templates, &real_templates()?]),
    )?;
    shell::run(
        shell::cargo(&[
            "test",
            "--release",
            "--workspace",
            "--test",
            "golden",
            "--",
            "exports",
            "templates",
        ])
        .env("FINETUNE_TEMPLATES", &templates)
        .env("FINETUNE_TEST_MODEL", model::directory(&binaries)?)
        .env("LIBTORCH", libtorch::directory()?),
    )?;
    shell::run(
        Command::new(&python)
            .arg(goldens.join("parity.py"))
            .arg(shell::root().join("target/tmp/parity")),
    )
}
