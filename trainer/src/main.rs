//! The trainer's command line: parses the arguments, runs one command and returns its exit code.

use std::{
    io::{IsTerminal, Write},
    panic::{AssertUnwindSafe, catch_unwind},
    process,
};

use clap::{Parser, Subcommand};
use finetune_contract::ExitCode;
use finetune_trainer::{
    commands::{bench, data_check, generate, preflight, print_line, train, verify},
    failure::Failure,
    gguf,
    store::Environment,
};
use tracing::error;

/// Fine-tunes a language model from one run configuration.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Checks model, dataset and output cheaply, and reports what was found.
    Preflight(preflight::Arguments),
    /// Trains, publishes and verifies one run.
    Train(train::Arguments),
    /// Downloads a published result and verifies it.
    Verify(verify::Arguments),
    /// Continues a prompt with a model.
    Generate(generate::Arguments),
    /// Shows which tokens of the training rows are trained on.
    DataCheck(data_check::Arguments),
    /// Times training steps on given tokens and prints the figures as JSON.
    #[command(hide = true)]
    Bench(bench::Arguments),
    /// Converts a GGUF file to a Hugging Face directory.
    Import(gguf::Arguments),
}

fn main() -> process::ExitCode {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("FINETUNE_LOG")
                .unwrap_or_else(|_| "info".into()),
        )
        .with_target(false)
        .init();
    let cli = Cli::parse();
    // Panics become failures below; the default hook would also print them.
    std::panic::set_hook(Box::new(|_| {}));
    let result = catch_unwind(AssertUnwindSafe(|| cli.command.run()))
        .unwrap_or_else(|panic| Err(Failure::from_panic(&*panic)));
    let code = result.unwrap_or_else(|failure| {
        if cli.command.is_interactive() {
            // A closed standard error is not a failure of the command.
            let _ = writeln!(std::io::stderr(), "error: {failure}");
        } else {
            error!("{failure}");
        }
        failure.exit_code()
    });
    process::ExitCode::from(code.code())
}

impl Command {
    fn run(&self) -> Result<ExitCode, Failure> {
        let environment = &Environment::from_process();
        match self {
            Self::Preflight(arguments) => return preflight::run(arguments, environment),
            Self::Train(arguments) => return train::run(arguments, environment),
            Self::Verify(arguments) => verify::run(arguments, environment)?,
            Self::Generate(arguments) => generate::run(arguments, environment)?,
            Self::DataCheck(arguments) => data_check::run(arguments, environment)?,
            Self::Bench(arguments) => print_line(&bench::run(arguments, environment)?),
            Self::Import(arguments) => gguf::run(arguments)?,
        }
        Ok(ExitCode::Success)
    }

    /// Returns whether a person reads the error; otherwise it goes to the log.
    fn is_interactive(&self) -> bool {
        match self {
            Self::Preflight(_) | Self::Train(_) => false,
            Self::Verify(_)
            | Self::Generate(_)
            | Self::DataCheck(_)
            | Self::Bench(_)
            | Self::Import(_) => true,
        }
    }
}
