//! The end of a cluster or of a node: processes, containers, mounts, cgroups, network, files.
//!
//! What there is to end is read from the system, so that nothing stays after a crash of anything.

use std::{
    collections::BTreeSet,
    fs::{read_dir, read_link, read_to_string, remove_file},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use rustix::mount::{UnmountFlags, unmount};

use crate::{
    cluster::{
        Extent, cgroups, names, network,
        node::Node,
        processes::{self, Process},
    },
    tools::cache,
};

/// Where the kubelet links the logs of containers, whatever its configuration says.
const LOG_LINKS: &str = "/var/log/containers";
/// Where containerd keeps the answers of network plugins, whatever its configuration says.
const CNI_RESULTS: &str = "/var/lib/cni/results";

/// How many times to look for processes that were started in the meantime.
const ROUNDS: usize = 5;

/// Kills all processes of nodes whose files are below a directory.
pub(crate) fn kill(directory: &Path, nodes: &[&Node<'_>]) -> Result<()> {
    // First what would start others.
    let recorded = |node: &&Node<'_>| {
        names(Extent::Whole).into_iter().filter_map(|name| node.processes().find(name)).collect()
    };
    let recorded: Vec<Vec<Process>> = nodes.iter().map(recorded).collect();
    processes::kill(&recorded.concat());
    for _ in 0..ROUNDS {
        let running = running(directory, nodes);
        if running.is_empty() {
            return Ok(());
        }
        processes::kill(&running);
    }
    let pids: Vec<u32> = running(directory, nodes).iter().map(|process| process.pid).collect();
    ensure!(pids.is_empty(), "these processes cannot be killed: {pids:?}");
    Ok(())
}

/// Removes all that nodes without processes have left, and their directory.
pub(crate) fn remove(directory: &Path, nodes: &[&Node<'_>]) -> Result<()> {
    let bundles = |node: &&Node<'_>| {
        node.directory.join("run/containerd/io.containerd.runtime.v2.task/k8s.io")
    };
    let containers: BTreeSet<PathBuf> = nodes
        .iter()
        .map(bundles)
        .flat_map(|bundles| children(&bundles).into_iter().map(move |id| bundles.join(id)))
        .collect();
    for socket in containers.iter().filter_map(|bundle| shim_socket(bundle)) {
        let _ = remove_file(socket);
    }
    unmount_below(directory)?;
    for node in nodes {
        cgroups::remove(&node.namespace.name);
        node.namespace.remove()?;
    }
    remove_links(directory);
    let ids: Vec<String> = containers
        .iter()
        .filter_map(|bundle| Some(bundle.file_name()?.to_string_lossy().into_owned()))
        .collect();
    for result in children(Path::new(CNI_RESULTS)) {
        if ids.iter().any(|id| result.contains(id)) {
            let _ = remove_file(Path::new(CNI_RESULTS).join(result));
        }
    }
    if directory.exists() {
        std::fs::remove_dir_all(directory)
            .with_context(|| format!("cannot remove {}", directory.display()))?;
    }
    Ok(())
}

/// Finds what runs in the network of one of these nodes, in the cgroup of its pods, or, should the
/// network be gone, from the cache with the directory on its command line.
fn running(directory: &Path, nodes: &[&Node<'_>]) -> Vec<Process> {
    let directory = [directory.as_os_str().as_bytes(), b"/"].concat();
    let cgroups: Vec<Vec<u8>> =
        nodes.iter().map(|node| format!("/{}/", node.namespace.name).into_bytes()).collect();
    let networks: Vec<(u64, u64)> =
        nodes.iter().filter_map(|node| node.namespace.identity()).collect();
    let programs = cache::directory();
    let is_ours = |&pid: &u32| {
        let file = |name: &str| Path::new("/proc").join(pid.to_string()).join(name);
        let read = |name: &str| std::fs::read(file(name)).unwrap_or_default();
        let is_inside = || {
            network::identity(&file("ns/net")).is_some_and(|network| networks.contains(&network))
        };
        let is_pod = || cgroups.iter().any(|cgroup| contains(&read("cgroup"), cgroup));
        let is_program = || {
            read_link(file("exe")).is_ok_and(|program| program.starts_with(&programs))
                && contains(&read("cmdline"), &directory)
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
fn unmount_below(directory: &Path) -> Result<()> {
    let mounts = read_to_string("/proc/self/mounts")?;
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(1)).map(unescape);
    let mut below: Vec<String> =
        points.filter(|point| Path::new(point).starts_with(directory)).collect();
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

fn remove_links(directory: &Path) {
    for name in children(Path::new(LOG_LINKS)) {
        let link = Path::new(LOG_LINKS).join(name);
        if read_link(&link).is_ok_and(|target| target.starts_with(directory)) {
            let _ = remove_file(link);
        }
    }
}

/// Returns the names in a directory, none if it is not there.
fn children(directory: &Path) -> BTreeSet<String> {
    let entries = read_dir(directory).into_iter().flatten().filter_map(Result::ok);
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}
