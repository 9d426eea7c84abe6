//! The trainer's command line: parses the arguments, runs one command and returns its exit code.

use std::{
    io::{IsTerminal, Write},
    panic::{AssertUnwindSafe, catch_unwind},
    process,
};

use clap::{Parser, Subcommand};
use finetune_contract::{ExitCode, process::environment::LOG};
use finetune_trainer::{
    commands::{bench, data_check, generate, preflight, train, verify},
    failure::Failure,
    gguf,
    runtime::stdout::print_line,
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
    #[command(alias = "import")]
    Convert(gguf::Arguments),
}

fn main() -> process::ExitCode {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env(LOG).unwrap_or_else(|_| "info".into()),
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
            Self::Convert(arguments) => gguf::run(arguments)?,
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
            | Self::Convert(_) => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use finetune_contract::{TrainerArgs, TrainerCommand, process::POD_ADDRESS};

    use super::Cli;

    fn parse(args: &TrainerArgs) -> String {
        let program = std::iter::once("finetune-trainer".into());
        format!("{:?}", Cli::try_parse_from(program.chain(args.to_args())).unwrap().command)
    }

    #[test]
    fn the_command_line_of_the_contract_is_understood() {
        // Values that begin like options, too.
        let mut args = TrainerArgs::new(TrainerCommand::Preflight, "c", "--r", "w d");
        let documents = r#"Documents { config: "c", report: "--r", work_dir: "w d" }"#;
        assert_eq!(parse(&args), format!("Preflight(Arguments {{ documents: {documents} }})"));
        args.command = TrainerCommand::Train;
        let train = |rest: &str| format!("Train(Arguments {{ documents: {documents}, {rest} }})");
        assert_eq!(parse(&args), train("listen: None, model_cache: None"));
        args.listen = Some(POD_ADDRESS);
        args.models = Some("m".into());
        let listen = format!("listen: Some({POD_ADDRESS}), model_cache: Some(\"m\")");
        assert_eq!(parse(&args), train(&listen));
    }
}
