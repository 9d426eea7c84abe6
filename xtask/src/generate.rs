//! Files generated from the code, committed, and compared in `cargo xtask check`.

use anyhow::{Result, bail};

use crate::shell;

/// Writes the generated files; with `check`, fails if one would change and changes none.
pub(crate) fn run(check: bool) -> Result<()> {
    let libtorch = crate::libtorch::directory()?;
    let mut command = shell::cargo(&[
        "run",
        "--release",
        "--quiet",
        "--workspace",
        "--bin",
        "finetune",
        "--",
        "crd",
    ]);
    let generated = shell::output(command.env("LIBTORCH", libtorch))?;
    let path = shell::root().join("crds/finetunejobs.finetune.dev.yaml");
    if std::fs::read_to_string(&path).is_ok_and(|committed| committed == generated) {
        return Ok(());
    }
    if check {
        bail!("{} is not what the code generates: run cargo xtask generate", path.display());
    }
    std::fs::write(&path, generated)?;
    println!("wrote {}", path.display());
    Ok(())
}
