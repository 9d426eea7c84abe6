//! A second node, for tests that lose one: in a network of its own, linked with the first node's.
//!
//! It is there only from `up` to `down`, and takes only pods that tolerate its taint.

use anyhow::{Context, Result, bail};
use clap::Subcommand;

use crate::{
    cluster::{
        self, Cluster, down,
        node::{self, Node},
    },
    tools::shell,
};

/// What to do with the second node.
#[derive(Clone, Copy, Debug, Subcommand)]
pub(crate) enum Action {
    /// Starts it with the images of the first node; removes what a killed one has left before.
    Up,
    /// Takes its network away and kills all its processes, pods too, as a power cut would.
    Kill,
    /// Cuts it off from the apiserver; its pods run on and still reach everything else.
    Disconnect,
    /// Undoes `disconnect`.
    Reconnect,
    /// Ends it and removes all it has, whatever of it still runs.
    Down,
}

/// Does what the command line asks for.
pub(crate) fn run(cluster: &Cluster, action: Action) -> Result<()> {
    let _lock = cluster.lock()?;
    let node = Node::second(cluster);
    match action {
        Action::Up => up(cluster, &node),
        Action::Kill => {
            node.namespace.take_link_down()?;
            down::kill(&node.directory, &[&node])
        }
        Action::Disconnect => cluster.namespace.disconnect_second(),
        Action::Reconnect => cluster.namespace.reconnect_second(),
        Action::Down => end(cluster, &node),
    }
}

fn up(cluster: &Cluster, node: &Node<'_>) -> Result<()> {
    if !cluster.is_running() {
        bail!("the cluster does not run; `cargo xtask cluster up` starts it");
    }
    if node.processes().are_running(&node::NAMES) {
        return Ok(());
    }
    end(cluster, node)?;
    cluster::make_directories(&node.directory)?;
    node.namespace.make(node.address)?;
    cluster.namespace.link(&node.namespace)?;
    node.start_runtime()?;
    node.wait_for_runtime()?;
    copy_images(&Node::first(cluster), node)?;
    node.start()
}

/// Ends the node and makes the cluster forget it.
fn end(cluster: &Cluster, node: &Node<'_>) -> Result<()> {
    down::kill(&node.directory, &[node])?;
    cluster.namespace.reconnect_second()?;
    cluster.namespace.unlink();
    down::remove(&node.directory, &[node])?;
    let mut delete = cluster.kubectl();
    delete.args(["delete", "node", node.name, "--ignore-not-found", "--wait=false"]);
    shell::quietly(&mut delete)
}

fn copy_images(from: &Node<'_>, to: &Node<'_>) -> Result<()> {
    let names = shell::output(from.ctr().args(["images", "list", "--quiet"]))?;
    // The kubelet's runtime gives each image a second name, by its digest.
    let names = names.lines().filter(|name| !name.starts_with("sha256:"));
    let archive = to.directory.join("etc/images.tar");
    // Without --local, ctr may exit before it has written the end of the archive.
    let export = ["images", "export", "--local"];
    shell::quietly(from.ctr().args(export).arg(&archive).args(names))
        .with_context(|| format!("cannot export the images of {}", from.name))?;
    to.load_image(&archive)?;
    Ok(std::fs::remove_file(archive)?)
}
