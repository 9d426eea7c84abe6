//! `finetune operator`: reads the settings and runs until it is told to stop.

use std::{net::SocketAddr, path::PathBuf};

use clap::Args;
use finetune_contract::process::environment::LOG;

use super::failure::Failure;
use crate::{
    operator::settings::Settings,
    operator::{self, Host},
};

/// Memory matters more than cores here: two threads serve thousands of jobs.
const THREADS: usize = 2;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// What the administrator decided, in YAML
    #[arg(long, value_name = "FILE")]
    settings: PathBuf,
    /// Where /metrics, /healthz and /readyz are served
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0:8080")]
    listen: SocketAddr,
    /// The namespace of the Lease by which replicas agree who acts
    #[arg(long, value_name = "NAMESPACE", env = "POD_NAMESPACE", default_value = "default")]
    namespace: String,
    /// What tells this replica from others
    #[arg(long, value_name = "NAME", env = "POD_NAME", default_value = "finetune-operator")]
    identity: String,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let Arguments { settings, listen, namespace, identity } = arguments;
    let text = std::fs::read_to_string(settings).map_err(|error| {
        Failure::configuration(format!("cannot read {}: {error}", settings.display()))
    })?;
    let settings = Settings::parse(&text)
        .map_err(|error| Failure::configuration(format!("{}: {error}", settings.display())))?;
    tracing_subscriber::fmt()
        .json()
        .flatten_event(true)
        .with_current_span(false)
        .with_span_list(false)
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env(LOG).unwrap_or_else(|_| "info".into()),
        )
        .with_writer(std::io::stderr)
        .init();
    let host = Host { listen: *listen, namespace: namespace.clone(), identity: identity.clone() };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(THREADS)
        .enable_all()
        .build()
        .map_err(Failure::internal)?;
    runtime
        .block_on(operator::run(settings, host))
        .map_err(|error| Failure::internal(format!("{error:#}")))
}
