//! How a trainer process is started and reached: arguments, environment, port and paths.

use std::{
    ffi::OsString,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
};

/// The port of [`PROGRESS_PATH`] and [`METRICS_PATH`] in a pod.
pub const METRICS_PORT: u16 = 9464;
/// Where [`METRICS_PORT`] is served in a pod: on all addresses.
pub const POD_ADDRESS: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::UNSPECIFIED), METRICS_PORT);
/// The path of the run's [`crate::Progress`], as JSON.
pub const PROGRESS_PATH: &str = "/progress";
/// The path of the run's metrics, as Prometheus reads them.
pub const METRICS_PATH: &str = "/metrics";
/// The directory below which a pod has the volume claims that `pvc://` URIs name, by claim.
pub const PVC_ROOT: &str = "/mnt/pvc";

/// A command of the trainer that reads a document and writes a report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TrainerCommand {
    /// Reads a [`crate::PreflightConfig`], writes a [`crate::PreflightReport`].
    Preflight,
    /// Reads a [`crate::RunConfig`], writes a [`crate::RunReport`].
    Train,
}

impl TrainerCommand {
    /// Returns the first argument of the process.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Preflight => "preflight",
            Self::Train => "train",
        }
    }
}

/// The command line of a trainer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrainerArgs {
    /// What it does.
    pub command: TrainerCommand,
    /// The file with the document to read.
    pub config: PathBuf,
    /// The file to write the report to.
    pub report: PathBuf,
    /// Scratch space, kept between attempts where it can be.
    pub work_dir: PathBuf,
    /// Where to serve [`PROGRESS_PATH`] and [`METRICS_PATH`]; nowhere if absent. Only of `train`.
    pub listen: Option<SocketAddr>,
    /// Where another rank of the machine keeps the models it fetches; the process fetches its own
    /// below the work directory if absent. Only of `train`.
    pub models: Option<PathBuf>,
}

impl TrainerArgs {
    /// Creates a command line without the optional arguments.
    pub fn new(
        command: TrainerCommand,
        config: impl Into<PathBuf>,
        report: impl Into<PathBuf>,
        work_dir: impl Into<PathBuf>,
    ) -> Self {
        Self {
            command,
            config: config.into(),
            report: report.into(),
            work_dir: work_dir.into(),
            listen: None,
            models: None,
        }
    }

    /// Returns the arguments of the process, the program's name left out.
    pub fn to_args(&self) -> Vec<OsString> {
        let Self { command, config, report, work_dir, listen, models } = self;
        let mut args = vec![OsString::from(command.as_str())];
        args.extend(listen.map(|address| OsString::from(format!("--listen={address}"))));
        args.push(path_option("--config=", config));
        args.push(path_option("--report=", report));
        args.push(path_option("--work-dir=", work_dir));
        args.extend(models.as_deref().map(|models| path_option("--models=", models)));
        args
    }
}

/// Paths need not be Unicode.
fn path_option(name: &str, path: &Path) -> OsString {
    let mut option = OsString::from(name);
    option.push(path);
    option
}

/// Environment variables of a trainer: our own, those of `torchrun`, by which a rank knows its place,
/// and those of libraries.
pub mod environment {
    /// Hosts, or host:port, separated by commas: the only servers that a store's variables may name.
    /// Set by an administrator; absent or empty for any.
    pub const ALLOWED_ENDPOINTS: &str = "FINETUNE_ALLOWED_ENDPOINTS";
    /// How often a request to a store is retried.
    pub const STORE_RETRIES: &str = "FINETUNE_STORE_RETRIES";
    /// What a program of ours logs, as `tracing-subscriber` reads it.
    pub const LOG: &str = "FINETUNE_LOG";

    /// This rank's number, from 0.
    pub const RANK: &str = "RANK";
    /// The number of a pod of an Indexed Job of Kubernetes, from 0; read where [`RANK`] is absent.
    pub const JOB_COMPLETION_INDEX: &str = "JOB_COMPLETION_INDEX";
    /// This rank's number among those of its pod or machine; set where one process started them.
    pub const LOCAL_RANK: &str = "LOCAL_RANK";
    /// How many ranks there are; must be the run's.
    pub const WORLD_SIZE: &str = "WORLD_SIZE";
    /// A name or address of rank 0.
    pub const MASTER_ADDR: &str = "MASTER_ADDR";
    /// The port on which rank 0 brings the ranks together.
    pub const MASTER_PORT: &str = "MASTER_PORT";

    /// How many threads libtorch computes with.
    pub const OMP_NUM_THREADS: &str = "OMP_NUM_THREADS";
    /// How long a thread of libtorch spins while it waits for the others, in turns of a loop, before
    /// it sleeps: some 30 µs. Waking costs a step 10 % and more if none spins; spinning without
    /// end takes the CPUs, or the quota, that the others need.
    pub const GOMP_SPINCOUNT: (&str, &str) = ("GOMP_SPINCOUNT", "2000");
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::{POD_ADDRESS, TrainerArgs, TrainerCommand};

    fn joined(args: &TrainerArgs) -> String {
        let args = args.to_args();
        args.iter().map(|arg| arg.to_str().unwrap()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn a_trainer_is_started_with_its_documents_and_what_else_it_needs() {
        let preflight = TrainerArgs::new(TrainerCommand::Preflight, "c", "r", "w");
        insta::assert_snapshot!(joined(&preflight), @"preflight --config=c --report=r --work-dir=w");
        let train = TrainerArgs {
            listen: Some(POD_ADDRESS),
            models: Some(PathBuf::from("m")),
            ..TrainerArgs::new(TrainerCommand::Train, "c", "r", "w")
        };
        insta::assert_snapshot!(joined(&train), @"train --listen=0.0.0.0:9464 --config=c --report=r --work-dir=w --models=m");
    }
}
