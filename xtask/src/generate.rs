//! Files generated from the code, committed, and compared in `cargo xtask check`.

use std::process::Command;

use anyhow::{Result, bail};

use crate::{build, shell};

/// Writes the generated files; with `check`, fails if one would change and changes none.
pub(crate) fn run(check: bool) -> Result<()> {
    let binaries = build::run()?;
    let generated = shell::output(Command::new(binaries.finetune).arg("crd"))?;
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
