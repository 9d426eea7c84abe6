//! Files generated from the code or copied, committed, and compared in `cargo xtask check`.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::{build, reference, tools::shell};

/// What Helm can read must be below the chart.
const CHART_FILES: &str = "charts/finetune-operator/files";

/// Writes the generated files; with `check`, fails if one would change and changes none.
pub(crate) fn run(check: bool) -> Result<()> {
    let binaries = build::run()?;
    let crd = shell::output(Command::new(&binaries.finetune).arg("crd"))?;
    let root = shell::root();
    let pages = reference::pages(&root, &crd, &binaries)?;
    let changes = changes(&root, crd, pages)?;
    if check && !changes.is_empty() {
        let names: Vec<_> = changes.iter().map(|change| change.path(&root)).collect();
        bail!("not what the code generates: {}; run cargo xtask generate", names.join(", "));
    }
    for change in changes {
        println!("{}", change.make(&root)?);
    }
    Ok(())
}

/// A file that is not as it should be.
enum Change {
    Write(PathBuf, String),
    Remove(PathBuf),
}

impl Change {
    fn path(&self, root: &Path) -> String {
        let (Self::Write(path, _) | Self::Remove(path)) = self;
        path.strip_prefix(root).unwrap_or(path).display().to_string()
    }

    fn make(&self, root: &Path) -> Result<String> {
        let verb = match self {
            Self::Write(path, text) => std::fs::write(path, text).map(|()| "wrote"),
            Self::Remove(path) => std::fs::remove_file(path).map(|()| "removed"),
        };
        let name = self.path(root);
        Ok(format!("{} {name}", verb.with_context(|| format!("cannot change {name}"))?))
    }
}

/// Compares what is there with what should be.
fn changes(root: &Path, crd: String, mut files: Vec<(PathBuf, String)>) -> Result<Vec<Change>> {
    let chart = root.join(CHART_FILES);
    let crd_name = "finetunejobs.finetune.dev.yaml";
    files.push((root.join("crds").join(crd_name), crd.clone()));
    files.push((chart.join(crd_name), crd));
    let copies = chart.join("dashboards");
    for dashboard in json_files(&root.join("dashboards"))? {
        let copy = copies.join(dashboard.file_name().unwrap_or_default());
        files.push((copy, std::fs::read_to_string(&dashboard)?));
    }
    let without_source = json_files(&copies)?
        .into_iter()
        .filter(|copy| files.iter().all(|(path, _)| path != copy))
        .map(Change::Remove)
        .collect::<Vec<_>>();
    let is_new = |(path, text): &(PathBuf, String)| {
        std::fs::read_to_string(path).map_or(true, |committed| committed != *text)
    };
    let written = files.into_iter().filter(is_new).map(|(path, text)| Change::Write(path, text));
    Ok(written.chain(without_source).collect())
}

fn json_files(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(directory)
        .with_context(|| format!("cannot list {}", directory.display()))?;
    let paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    let mut files: Vec<PathBuf> = paths
        .into_iter()
        .filter(|path| path.extension().is_some_and(|end| end == "json"))
        .collect();
    files.sort();
    Ok(files)
}
