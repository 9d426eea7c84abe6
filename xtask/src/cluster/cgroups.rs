//! A cgroup for the pods of one cluster.
//!
//! A kubelet ends what it does not know below its own cgroup: two of them must not share one.

use std::{
    fs::{create_dir_all, read_dir, remove_dir, write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

const MOUNTED: &str = "/sys/fs/cgroup";
/// What the kubelet wants to limit.
const CONTROLLERS: [&str; 6] = ["cpuset", "cpu", "io", "memory", "hugetlb", "pids"];

/// Creates a cgroup in every hierarchy there is.
pub(crate) fn make(name: &str) -> Result<()> {
    for hierarchy in hierarchies() {
        // Version 2 has it from the cgroup above, version 1 knows no such file.
        for controller in CONTROLLERS.iter().filter(|_| is_unified(&hierarchy)) {
            // A controller may be missing, or belong to a hierarchy of version 1.
            let _ = write(hierarchy.join("cgroup.subtree_control"), format!("+{controller}"));
        }
        let directory = hierarchy.join(name);
        create_dir_all(&directory)
            .with_context(|| format!("cannot make the cgroup {}", directory.display()))?;
    }
    Ok(())
}

/// Removes a cgroup, which no process may be in, from every hierarchy.
pub(crate) fn remove(name: &str) {
    for hierarchy in hierarchies() {
        remove_tree(&hierarchy.join(name));
    }
}

fn remove_tree(directory: &Path) {
    for child in directories(directory) {
        remove_tree(&child);
    }
    let _ = remove_dir(directory);
}

/// One in version 2; in version 1 one for each controller.
fn hierarchies() -> Vec<PathBuf> {
    let root = PathBuf::from(MOUNTED);
    if is_unified(&root) {
        return vec![root];
    }
    directories(&root)
}

fn is_unified(hierarchy: &Path) -> bool {
    hierarchy.join("cgroup.subtree_control").exists()
}

fn directories(directory: &Path) -> Vec<PathBuf> {
    let entries = read_dir(directory).into_iter().flatten().filter_map(Result::ok);
    // Not links: version 1 has `cpu` by more than one name.
    let real = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    real.map(|entry| entry.path()).collect()
}
