//! The pages of docs/reference, generated from the contract, the CRD and the command line.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::build::Binaries;

mod cli;
mod crd;
mod reasons;

/// Renders every page, with its path.
pub(crate) fn pages(root: &Path, crd: &str, binaries: &Binaries) -> Result<Vec<(PathBuf, String)>> {
    let directory = root.join("docs/reference");
    Ok(vec![
        (directory.join("finetunejob.md"), crd::page(crd)?),
        (directory.join("finetune.md"), cli::page(binaries)?),
        (directory.join("reasons.md"), reasons::page()),
    ])
}
