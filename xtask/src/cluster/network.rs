//! A network namespace of the cluster's own: loopback and the bridge of its pods, and no route out.
//!
//! Nothing in it can reach, or be reached from, another network, and no port can be taken already.

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

use crate::tools::shell;

/// The node's address, and the pods' gateway.
pub(crate) const NODE: &str = "10.88.0.1";
/// The addresses of pods.
pub(crate) const PODS: &str = "10.88.0.0/24";
/// The addresses of Services.
pub(crate) const SERVICES: &str = "10.96.0.0/16";
/// The address of the apiserver's Service.
pub(crate) const FIRST_SERVICE: &str = "10.96.0.1";
/// The address of the Service of names.
pub(crate) const NAME_SERVICE: &str = "10.96.0.10";
/// The bridge that pods are plugged into.
pub(crate) const BRIDGE: &str = "cni0";

/// A network namespace.
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

    /// Creates the namespace and its bridge, unless they are there.
    pub(crate) fn make(&self) -> Result<()> {
        if !self.is_usable() {
            self.remove()?;
            shell::run(Command::new("ip").args(["netns", "add", &self.name]))?;
        }
        shell::run(&mut self.ip(&["link", "set", "lo", "up"]))?;
        if shell::quietly(&mut self.ip(&["link", "show", BRIDGE])).is_err() {
            shell::run(&mut self.ip(&["link", "add", BRIDGE, "type", "bridge"]))?;
        }
        let address = format!("{NODE}/24");
        shell::run(&mut self.ip(&["address", "replace", &address, "dev", BRIDGE]))?;
        shell::run(&mut self.ip(&["link", "set", BRIDGE, "up"]))?;
        self.enter(|| std::fs::write("/proc/sys/net/ipv4/ip_forward", "1"))?
            .context("cannot switch forwarding on")
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
