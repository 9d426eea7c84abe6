//! Runs the preflight checks of one run and writes their report.

use clap::Args;
use finetune_contract::{ExitCode, PreflightConfig};

use crate::{
    commands::documents::{self, Documents},
    failure::Failure,
    preflight,
    store::Environment,
};

/// Where to read the configuration from and where to write the report.
#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    documents: Documents,
}

/// Checks a run and returns the exit code of its most severe problem.
///
/// # Errors
/// A [`Failure`] if the configuration cannot be read or the report cannot be written.
pub fn run(arguments: &Arguments, environment: &Environment) -> Result<ExitCode, Failure> {
    let documents = &arguments.documents;
    let config: PreflightConfig = documents::read(&documents.config)?;
    let work_dir = documents.create_work_dir()?;
    let report = preflight::run(&config, environment, &work_dir).fit();
    documents::write(&documents.report, &report)?;
    // A problem that a retry may solve must not hide one that it cannot.
    let codes = || report.problems.iter().map(|problem| problem.reason.exit_code());
    let code = codes().find(|code| !code.is_retryable()).or_else(|| codes().next());
    Ok(code.unwrap_or(ExitCode::Success))
}
