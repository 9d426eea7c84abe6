//! A network namespace of each node's own: loopback and the bridge of its pods, a link to the other
//! node, and no route out.
//!
//! Nothing in them can reach, or be reached from, another network, and no port can be taken already.

use std::{
    ffi::OsString,
    fs::File,
    os::{
        fd::AsFd,
        unix::{ffi::OsStrExt, fs::MetadataExt},
    },
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use sha2::{Digest, Sha256};

use crate::{cluster::debian, tools::shell};

/// The first node's address, and its pods' gateway.
pub(crate) const NODE: &str = "10.88.0.1";
/// The addresses of its pods.
pub(crate) const PODS: &str = "10.88.0.0/24";
/// The same of the second node.
pub(crate) const SECOND_NODE: &str = "10.88.1.1";
/// The addresses of its pods.
pub(crate) const SECOND_PODS: &str = "10.88.1.0/24";
/// The port of the apiserver, which listens on the first node.
pub(crate) const APISERVER_PORT: u16 = 6443;
/// The addresses of Services.
pub(crate) const SERVICES: &str = "10.96.0.0/16";
/// The address of the apiserver's Service.
pub(crate) const FIRST_SERVICE: &str = "10.96.0.1";
/// The address of the Service of names.
pub(crate) const NAME_SERVICE: &str = "10.96.0.10";
/// The bridge that the pods of a node are plugged into.
pub(crate) const BRIDGE: &str = "cni0";

/// The first node's end of the link between the nodes.
const TO_SECOND: &str = "to-node1";
const TO_SECOND_ADDRESS: &str = "10.89.0.1";
/// The second node's end.
const TO_FIRST: &str = "to-node0";
const TO_FIRST_ADDRESS: &str = "10.89.0.2";
/// The port where the apiserver reaches a kubelet.
const KUBELET_PORT: u16 = 10250;
/// The nftables table that cuts the second node off.
const CUT: &str = "finetune-cut";

/// A network namespace.
#[derive(Clone)]
pub(crate) struct Namespace {
    /// Its name, also that of the pods' network.
    pub(crate) name: String,
}

impl Namespace {
    /// Names the namespace of a state directory.
    pub(crate) fn of(state_dir: &Path) -> Self {
        let digest = Sha256::digest(state_dir.as_os_str().as_bytes());
        let short: String = digest.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
        Self { name: format!("finetune-{short}") }
    }

    /// Names that of the second node.
    pub(crate) fn second(&self) -> Self {
        Self { name: format!("{}-1", self.name) }
    }

    /// Creates a command that runs inside.
    ///
    /// Not `ip netns exec`: that mounts another /sys, without cgroups.
    pub(crate) fn command(&self, program: impl Into<OsString>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path().display())).arg("--").arg(program.into());
        command
    }

    /// Runs a function inside, on a thread of its own.
    pub(crate) fn enter<T: Send>(&self, act: impl FnOnce() -> T + Send) -> Result<T> {
        let file = File::open(self.path()).context("the cluster's network is not there")?;
        let inside = move || {
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))?;
            Ok(act())
        };
        std::thread::scope(|scope| scope.spawn(inside).join())
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Creates the namespace and the bridge of a node with an address, unless they are there.
    pub(crate) fn make(&self, node: &str) -> Result<()> {
        if !self.is_usable() {
            self.remove()?;
            shell::run(Command::new("ip").args(["netns", "add", &self.name]))?;
        }
        shell::run(&mut self.ip(&["link", "set", "lo", "up"]))?;
        if shell::quietly(&mut self.ip(&["link", "show", BRIDGE])).is_err() {
            shell::run(&mut self.ip(&["link", "add", BRIDGE, "type", "bridge"]))?;
        }
        let address = format!("{node}/24");
        shell::run(&mut self.ip(&["address", "replace", &address, "dev", BRIDGE]))?;
        shell::run(&mut self.ip(&["link", "set", BRIDGE, "up"]))?;
        self.enter(|| std::fs::write("/proc/sys/net/ipv4/ip_forward", "1"))?
            .context("cannot switch forwarding on")
    }

    /// Links the first node's namespace, which this is, with the second's.
    pub(crate) fn link(&self, second: &Self) -> Result<()> {
        let ends = ["link", "add", TO_SECOND, "type", "veth", "peer", "name", TO_FIRST, "netns"];
        shell::run(self.ip(&ends).arg(&second.name))?;
        for (namespace, end, address) in
            [(self, TO_SECOND, TO_SECOND_ADDRESS), (second, TO_FIRST, TO_FIRST_ADDRESS)]
        {
            let address = format!("{address}/30");
            shell::run(&mut namespace.ip(&["address", "add", &address, "dev", end]))?;
            shell::run(&mut namespace.ip(&["link", "set", end, "up"]))?;
        }
        shell::run(&mut self.ip(&["route", "add", SECOND_PODS, "via", TO_FIRST_ADDRESS]))?;
        let out = ["route", "add", "default", "via", TO_SECOND_ADDRESS, "src", SECOND_NODE];
        shell::run(&mut second.ip(&out))
    }

    /// Removes the link, if it is there.
    pub(crate) fn unlink(&self) {
        // With its namespace, an end is removed some time later: a new one could not have its name.
        let _ = shell::quietly(&mut self.ip(&["link", "delete", TO_SECOND]));
    }

    /// Takes the link down at the second node, whose namespace this is.
    ///
    /// What is sent to it is lost without an answer, as if the machine had no power.
    pub(crate) fn take_link_down(&self) -> Result<()> {
        shell::run(&mut self.ip(&["link", "set", TO_FIRST, "down"]))
    }

    /// Cuts the second node and the apiserver off from each other, and from nothing else.
    ///
    /// Its connections are reset, so that none has to time out when it returns.
    pub(crate) fn disconnect_second(&self) -> Result<()> {
        self.reconnect_second()?;
        let rules = format!(
            "table inet {CUT} {{
               chain from_node1 {{
                 type filter hook input priority filter;
                 iifname {TO_SECOND} tcp dport {APISERVER_PORT} reject with tcp reset
               }}
               chain to_node1 {{
                 type filter hook output priority filter;
                 oifname {TO_SECOND} tcp sport {APISERVER_PORT} tcp flags & rst == 0 drop
                 oifname {TO_SECOND} tcp dport {KUBELET_PORT} drop
               }}
             }}"
        );
        shell::quietly(self.nft()?.arg(rules))
    }

    /// Undoes `disconnect_second`.
    pub(crate) fn reconnect_second(&self) -> Result<()> {
        // Only an existing table can be deleted.
        let rules = format!("table inet {CUT} {{}}; delete table inet {CUT}");
        shell::quietly(self.nft()?.arg(rules))
    }

    /// Removes the namespace, and with it all its interfaces.
    pub(crate) fn remove(&self) -> Result<()> {
        if !self.path().exists() {
            return Ok(());
        }
        shell::run(Command::new("ip").args(["netns", "delete", &self.name]))
    }

    /// Returns what tells it from other namespaces, if it is there.
    pub(crate) fn identity(&self) -> Option<(u64, u64)> {
        identity(&self.path())
    }

    fn nft(&self) -> Result<Command> {
        Ok(self.command(debian::find("nft").context("nft is not there")?))
    }

    fn ip(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("ip");
        command.args(["-netns", &self.name]).args(arguments);
        command
    }

    /// Returns whether it is there. After a restart of the machine, its file alone may be.
    fn is_usable(&self) -> bool {
        self.enter(|| ()).is_ok()
    }

    fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }
}

/// Returns the device and number of the file that stands for a namespace.
pub(crate) fn identity(path: &Path) -> Option<(u64, u64)> {
    std::fs::metadata(path).ok().map(|file| (file.dev(), file.ino()))
}
