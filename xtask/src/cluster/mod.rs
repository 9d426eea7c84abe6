//! A real Kubernetes on this machine, of one node, or of two for tests that lose one: built from
//! source, in a network of its own.
//!
//! Everything it has is below one directory: `$FINETUNE_CLUSTER`, or `cluster` in the cache. Its
//! programs run on after this process; `up` starts those that do not run, `down` leaves nothing.

pub(crate) mod binaries;
mod cgroups;
mod control_plane;
mod debian;
mod dns;
mod down;
mod network;
mod node;
mod pki;
mod processes;
mod second_node;
mod storage;

use std::{
    ffi::OsString,
    fs::File,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::Instant,
};

use anyhow::{Context, Result, bail};
use clap::Subcommand;

use crate::{
    cluster::{binaries::Binaries, network::Namespace, node::Node, processes::Processes},
    fixtures::s3,
    tools::{cache, shell},
};

/// The file by which a directory is known to be a cluster's, to be removed with all it has.
const MARKER: &str = "finetune-cluster";
/// Paths of sockets below the state directory must fit into 108 bytes.
const STATE_PATH_MAX_BYTES: usize = 70;

/// What to do with the cluster.
#[derive(Debug, Subcommand)]
pub(crate) enum Action {
    /// Builds what is missing and starts what does not run.
    Up {
        /// No container runtime, kubelet and kube-proxy: objects are kept, pods never run.
        #[arg(long)]
        control_plane_only: bool,
    },
    /// Ends the cluster and removes all it has.
    Down,
    /// Describes which of its programs run.
    Status,
    /// Runs kubectl as the cluster's administrator.
    #[command(disable_help_flag = true)]
    Kubectl {
        /// What kubectl is given.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Runs helm as the cluster's administrator.
    #[command(disable_help_flag = true)]
    Helm {
        /// What helm is given.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Runs a program in the cluster's network, with KUBECONFIG and the S3 server's address.
    Exec {
        /// The program.
        program: OsString,
        /// What it is given.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Loads an image from an OCI archive.
    Load {
        /// The archive.
        archive: PathBuf,
    },
    /// A second node, for tests that lose one.
    #[command(subcommand)]
    Node1(second_node::Action),
}

/// How much of a cluster is started.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Extent {
    /// The apiserver and what it needs, and the S3 server.
    ControlPlane,
    /// A node too, so that pods run.
    Whole,
}

/// A cluster, running or not.
pub(crate) struct Cluster {
    state_dir: PathBuf,
    namespace: Namespace,
    binaries: Binaries,
}

/// Does what the command line asks for.
pub(crate) fn run(action: Action) -> Result<ExitCode> {
    match action {
        Action::Up { control_plane_only } => {
            let extent = if control_plane_only { Extent::ControlPlane } else { Extent::Whole };
            up(extent).map(|_| ExitCode::SUCCESS)
        }
        Action::Down => down().map(|()| ExitCode::SUCCESS),
        Action::Status => status(),
        Action::Kubectl { arguments } => {
            shell::code(Cluster::existing()?.kubectl().args(arguments))
        }
        Action::Helm { arguments } => shell::code(Cluster::existing()?.helm().args(arguments)),
        Action::Exec { program, arguments } => {
            let cluster = Cluster::existing()?;
            let mut command = cluster.inside(program);
            command.args(arguments).env("KUBECONFIG", cluster.kubeconfig());
            shell::code(command.envs(s3_environment()))
        }
        Action::Load { archive } => {
            Cluster::existing()?.load_image(&archive).map(|()| ExitCode::SUCCESS)
        }
        Action::Node1(action) => {
            second_node::run(&Cluster::existing()?, action).map(|()| ExitCode::SUCCESS)
        }
    }
}

/// Starts what does not run yet of a cluster, and waits until it can be used.
pub(crate) fn up(extent: Extent) -> Result<Cluster> {
    start(Cluster::of_environment()?, extent)
}

/// Starts a cluster of another directory beside the usual one.
pub(crate) fn up_beside(name: &str, extent: Extent) -> Result<Cluster> {
    start(Cluster::at(cache::directory().join(name))?, extent)
}

fn start(mut cluster: Cluster, extent: Extent) -> Result<Cluster> {
    let _lock = cluster.lock()?;
    debian::ensure()?;
    cluster.binaries = Binaries::build()?;
    let started = Instant::now();
    let processes = cluster.processes();
    if processes.are_running(&names(extent)) && control_plane::is_ready(&cluster) {
        println!("the cluster in {} is up", cluster.state_dir.display());
        return Ok(cluster);
    }
    cluster.refuse_other_directory()?;
    std::fs::create_dir_all(&cluster.state_dir)?;
    std::fs::write(cluster.path(MARKER), "")?;
    make_directories(&cluster.state_dir)?;
    cluster.namespace.make(network::NODE)?;
    pki::make(&cluster.state_dir)?;
    storage::start(&cluster)?;
    let node = Node::first(&cluster);
    if extent == Extent::Whole {
        node.start_runtime()?;
    }
    control_plane::start(&cluster)?;
    if extent == Extent::Whole {
        dns::start(&cluster)?;
        node.wait_for_runtime()?;
        node.load_pause()?;
        node.start()?;
        dns::wait(&cluster)?;
    }
    storage::wait(&cluster)?;
    println!(
        "the cluster in {} is up after {:.1} s",
        cluster.state_dir.display(),
        started.elapsed().as_secs_f64()
    );
    Ok(cluster)
}

/// Creates the directories that a node, or the control plane, keeps its files in.
fn make_directories(parent: &Path) -> Result<()> {
    for directory in ["data", "etc", "log", "run"] {
        std::fs::create_dir_all(parent.join(directory))?;
    }
    Ok(())
}

/// Ends the cluster and removes all it has, whatever of it still runs.
pub(crate) fn down() -> Result<()> {
    Cluster::of_environment()?.end()
}

/// Returns where a cluster's S3 server is, for clients in the namespace and in pods.
pub(crate) fn s3_environment() -> [(&'static str, String); 6] {
    s3::environment(storage::ENDPOINT)
}

/// Returns the S3 server's address by name, which only pods resolve.
pub(crate) fn s3_endpoint_of_pods() -> String {
    dns::s3_endpoint()
}

/// Prints which programs run; the exit code tells whether all do that were started.
fn status() -> Result<ExitCode> {
    let cluster = Cluster::of_environment()?;
    let mut is_whole = cluster.state_dir.exists();
    println!("{:<24} {:>8}  state", "component", "pid");
    let second = Node::second(&cluster);
    let components = names(Extent::Whole).into_iter();
    let mut processes: Vec<_> =
        components.map(|name| (name.to_owned(), cluster.processes().find(name))).collect();
    if second.directory.exists() {
        let of_second = node::NAMES
            .map(|name| (format!("{name} {}", second.name), second.processes().find(name)));
        processes.extend(of_second);
    }
    for (name, process) in processes {
        let (pid, state) = match process {
            None => (String::new(), "not started"),
            Some(process) if process.is_running() => (process.pid.to_string(), "runs"),
            Some(process) => {
                is_whole = false;
                (process.pid.to_string(), "ended")
            }
        };
        println!("{name:<24} {pid:>8}  {state}");
    }
    println!("state: {}, network: {}", cluster.state_dir.display(), cluster.namespace.name);
    Ok(if is_whole { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Returns the names of all components in the order of their start.
fn names(extent: Extent) -> Vec<&'static str> {
    let control_plane = [&[storage::NAME], &control_plane::NAMES[..]].concat();
    match extent {
        Extent::ControlPlane => control_plane,
        Extent::Whole => [&control_plane[..], &[dns::NAME], &node::NAMES].concat(),
    }
}

impl Cluster {
    fn of_environment() -> Result<Self> {
        let set = std::env::var_os("FINETUNE_CLUSTER").filter(|value| !value.is_empty());
        Self::at(set.map_or_else(|| cache::directory().join("cluster"), PathBuf::from))
    }

    fn at(directory: PathBuf) -> Result<Self> {
        if !rustix::process::geteuid().is_root() {
            bail!("a cluster needs root: it makes a network namespace, mounts and cgroups");
        }
        let state_dir = real_path(&std::path::absolute(directory)?)?;
        if state_dir.as_os_str().len() > STATE_PATH_MAX_BYTES {
            bail!(
                "{} is too long a path for sockets below it, of {STATE_PATH_MAX_BYTES} bytes at \
                 most; set FINETUNE_CLUSTER to a shorter one",
                state_dir.display()
            );
        }
        let namespace = Namespace::of(&state_dir);
        Ok(Self { state_dir, namespace, binaries: Binaries::expected() })
    }

    /// Returns the cluster that `up` has made.
    pub(crate) fn existing() -> Result<Self> {
        let cluster = Self::of_environment()?;
        if !cluster.kubeconfig().exists() {
            bail!("there is no cluster; `cargo xtask cluster up` makes one");
        }
        Ok(cluster)
    }

    /// Returns whether every program of a whole cluster runs.
    pub(crate) fn is_running(&self) -> bool {
        self.processes().are_running(&names(Extent::Whole))
    }

    /// Ends it and removes all it has, whatever of it still runs.
    pub(crate) fn end(&self) -> Result<()> {
        let _lock = self.lock()?;
        self.refuse_other_directory()?;
        let nodes = [&Node::first(self), &Node::second(self)];
        down::kill(&self.state_dir, &nodes)?;
        down::remove(&self.state_dir, &nodes)?;
        println!("the cluster in {} is gone", self.state_dir.display());
        Ok(())
    }

    /// Returns the administrator's kubeconfig; its server answers inside the namespace only.
    pub(crate) fn kubeconfig(&self) -> PathBuf {
        self.path("pki/admin.conf")
    }

    /// Creates a command that runs in the cluster's network.
    pub(crate) fn inside(&self, program: impl Into<OsString>) -> Command {
        self.namespace.command(program)
    }

    /// Returns the program kubectl.
    pub(crate) fn kubectl_program(&self) -> PathBuf {
        self.binaries.kubernetes("kubectl")
    }

    /// Creates a kubectl command of the administrator.
    pub(crate) fn kubectl(&self) -> Command {
        let mut command = self.inside(self.kubectl_program());
        command.env("KUBECONFIG", self.kubeconfig());
        command
    }

    /// Creates a helm command of the administrator.
    pub(crate) fn helm(&self) -> Command {
        let mut command = self.inside(self.binaries.helm());
        command.env("KUBECONFIG", self.kubeconfig());
        command
    }

    /// Loads an image from an OCI archive into the first node; the second gets what this one has.
    pub(crate) fn load_image(&self, archive: &Path) -> Result<()> {
        Node::first(self).load_image(archive)
    }

    /// Fails if the state directory has files and is not a cluster's.
    fn refuse_other_directory(&self) -> Result<()> {
        let mut entries = std::fs::read_dir(&self.state_dir).into_iter().flatten();
        if entries.next().is_some() && !self.path(MARKER).exists() {
            bail!("{} has files and is no cluster's directory", self.state_dir.display());
        }
        Ok(())
    }

    fn path(&self, below: &str) -> PathBuf {
        self.state_dir.join(below)
    }

    fn processes(&self) -> Processes<'_> {
        Processes { state_dir: &self.state_dir, namespace: &self.namespace }
    }

    /// Keeps others from changing the same cluster at the same time.
    fn lock(&self) -> Result<File> {
        let path = cache::directory().join(format!("{}.lock", self.namespace.name));
        std::fs::create_dir_all(cache::directory())?;
        let file = File::create(&path)?;
        file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
        Ok(file)
    }
}

/// Follows links, as the kernel does in its list of mounts; the path need not be there yet.
fn real_path(path: &Path) -> Result<PathBuf> {
    if path.exists() {
        return Ok(path.canonicalize()?);
    }
    let parent = path.parent().context("the root is no directory for a cluster")?;
    std::fs::create_dir_all(parent)?;
    Ok(parent.canonicalize()?.join(path.file_name().context("the path has no last part")?))
}
