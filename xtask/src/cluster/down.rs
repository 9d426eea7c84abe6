//! The end of a cluster: processes, containers, mounts, cgroups, network, files.
//!
//! What there is to end is read from the system, so that nothing stays after a crash of anything.

use std::{
    collections::BTreeSet,
    fs::{read_dir, read_link, read_to_string, remove_file},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use rustix::mount::{UnmountFlags, unmount};

use crate::{
    cluster::{
        Cluster, Extent, cgroups, names, network,
        processes::{self, Process},
    },
    tools::cache,
};

/// Where the kubelet links the logs of containers, whatever its configuration says.
const LOG_LINKS: &str = "/var/log/containers";
/// Where containerd keeps the answers of network plugins, whatever its configuration says.
const CNI_RESULTS: &str = "/var/lib/cni/results";

/// Ends and removes everything.
pub(crate) fn run(cluster: &Cluster) -> Result<()> {
    let state_dir = &cluster.state_dir;
    // First what would start others.
    let recorded = names(Extent::Whole).into_iter();
    let recorded: Vec<Process> =
        recorded.filter_map(|name| cluster.processes().find(name)).collect();
    processes::kill(&recorded);

    let bundles = state_dir.join("run/containerd/io.containerd.runtime.v2.task/k8s.io");
    let containers = children(&bundles);
    let sockets: Vec<PathBuf> =
        containers.iter().filter_map(|id| shim_socket(&bundles.join(id))).collect();
    processes::kill(&of_cluster(cluster));
    for socket in sockets {
        let _ = remove_file(socket);
    }
    unmount_below(state_dir)?;
    cgroups::remove(&cluster.namespace.name);
    cluster.namespace.remove()?;
    remove_links(state_dir);
    for result in children(Path::new(CNI_RESULTS)) {
        if containers.iter().any(|id| result.contains(id)) {
            let _ = remove_file(Path::new(CNI_RESULTS).join(result));
        }
    }
    if state_dir.exists() {
        std::fs::remove_dir_all(state_dir)
            .with_context(|| format!("cannot remove {}", state_dir.display()))?;
    }
    Ok(())
}

/// Finds what runs in the namespace, in the cgroup of pods, or, should the namespace be gone, from
/// the cache with the state directory on its command line.
fn of_cluster(cluster: &Cluster) -> Vec<Process> {
    let state_dir = [cluster.state_dir.as_os_str().as_bytes(), b"/"].concat();
    let cgroup = format!("/{}/", cluster.namespace.name).into_bytes();
    let programs = cache::directory();
    let namespace = cluster.namespace.identity();
    let is_ours = |&pid: &u32| {
        let file = |name: &str| Path::new("/proc").join(pid.to_string()).join(name);
        let read = |name: &str| std::fs::read(file(name)).unwrap_or_default();
        let is_inside = || namespace.is_some() && network::identity(&file("ns/net")) == namespace;
        let is_pod = || contains(&read("cgroup"), &cgroup);
        let is_program = || {
            read_link(file("exe")).is_ok_and(|program| program.starts_with(&programs))
                && contains(&read("cmdline"), &state_dir)
        };
        pid != std::process::id() && (is_inside() || is_pod() || is_program())
    };
    let pids = children(Path::new("/proc")).into_iter().filter_map(|name| name.parse().ok());
    pids.filter(is_ours).filter_map(Process::of).collect()
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

/// Returns the socket that a container's shim listens on, which is outside the state directory.
fn shim_socket(bundle: &Path) -> Option<PathBuf> {
    let text = read_to_string(bundle.join("bootstrap.json")).ok()?;
    let bootstrap: serde_json::Value = serde_json::from_str(&text).ok()?;
    bootstrap["address"].as_str()?.strip_prefix("unix://").map(PathBuf::from)
}

/// Unmounts what pods and containers have mounted, the latest first.
fn unmount_below(state_dir: &Path) -> Result<()> {
    let mounts = read_to_string("/proc/self/mounts")?;
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(1)).map(unescape);
    let mut below: Vec<String> =
        points.filter(|point| Path::new(point).starts_with(state_dir)).collect();
    below.reverse();
    for point in below {
        unmount(&point, UnmountFlags::DETACH)
            .with_context(|| format!("cannot unmount {point:?}"))?;
    }
    Ok(())
}

/// The kernel writes blanks and backslashes of paths as octal numbers.
fn unescape(path: &str) -> String {
    path.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")
}

fn remove_links(state_dir: &Path) {
    for name in children(Path::new(LOG_LINKS)) {
        let link = Path::new(LOG_LINKS).join(name);
        if read_link(&link).is_ok_and(|target| target.starts_with(state_dir)) {
            let _ = remove_file(link);
        }
    }
}

/// Returns the names in a directory, none if it is not there.
fn children(directory: &Path) -> BTreeSet<String> {
    let entries = read_dir(directory).into_iter().flatten().filter_map(Result::ok);
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}
