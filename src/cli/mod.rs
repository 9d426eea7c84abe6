//! The `finetune` command line: what an operator does in a cluster, here and for one job; and the
//! operator itself.

mod data;
mod display;
mod failure;
mod lock;
mod operator;
mod run;
mod trainer;

use std::{ffi::OsString, path::PathBuf, process};

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use finetune_api::crd;
use finetune_contract::Parallelism;
use finetune_plan::render;

use failure::Failure;

/// Fine-tunes a language model from one manifest.
#[derive(Debug, Parser)]
#[command(
    name = "finetune",
    version,
    about = "Fine-tunes a language model from one manifest",
    max_term_width = 100
)]
struct Arguments {
    /// The trainer's program; finetune-trainer beside this one if absent
    #[arg(long, global = true, value_name = "FILE")]
    trainer: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Say what would run and why, or every reason why it cannot
    Plan {
        #[command(flatten)]
        job: Job,
        #[command(flatten)]
        ranks: Ranks,
        /// Accelerators to size the run for: a YAML list of name, memoryGiB, bf16Tflops,
        /// fp32Tflops, hasBf16, pricePerHour
        #[arg(long, value_name = "FILE")]
        accelerators: Option<PathBuf>,
        /// How to print it
        #[arg(short, long, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
    /// Run it here: preflight, plan, train, publish, verify; resumes an interrupted run
    Run {
        #[command(flatten)]
        job: Job,
        #[command(flatten)]
        ranks: Ranks,
    },
    /// Download and verify a published result
    #[command(disable_help_flag = true)]
    Verify(PassedOn),
    /// Continue a prompt with a model, with or without an adapter
    #[command(disable_help_flag = true)]
    Generate(PassedOn),
    /// Look at a dataset before it is trained on
    #[command(subcommand)]
    Data(Data),
    /// Convert a GGUF file to a Hugging Face directory
    #[command(disable_help_flag = true, alias = "import")]
    Convert(PassedOn),
    /// Run the operator of a cluster; its Helm chart does
    Operator(operator::Arguments),
    /// Print a shell completion script
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print the CRD
    #[command(hide = true)]
    Crd,
}

#[derive(Debug, Subcommand)]
enum Data {
    /// Show what of the rows is trained on and what is not, from the tokens that training reads
    Check(data::Check),
}

#[derive(Debug, Args)]
struct Job {
    /// The FineTuneJob, in YAML or JSON
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
    /// Where caches, documents and local checkpoints go; below ~/.local/state/finetune if absent
    #[arg(long, value_name = "DIR")]
    work_dir: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct Ranks {
    /// Trainers that share this machine and train one model together
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=i64::from(Parallelism::MAX_RANKS)))]
    ranks: u32,
}

#[derive(Debug, Args)]
struct PassedOn {
    /// What the trainer is told; --help lists it
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENTS")]
    arguments: Vec<OsString>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    Text,
    Json,
    Yaml,
}

/// Runs the command line and returns its exit status.
pub fn main() -> process::ExitCode {
    let arguments = Arguments::parse();
    match carry_out(arguments) {
        Ok(()) => process::ExitCode::SUCCESS,
        Err(failure) => {
            if !failure.is_explained() {
                display::error(&failure.to_string());
            }
            process::ExitCode::from(failure.code)
        }
    }
}

fn carry_out(arguments: Arguments) -> Result<(), Failure> {
    let Arguments { trainer, command } = arguments;
    match command {
        Command::Plan { job, ranks, accelerators, output } => {
            let accelerators = run::read_accelerators(accelerators.as_deref())?;
            let prepared = run::prepare(&job.file, job.work_dir, trainer)?;
            let (_, plan) = run::plan(&prepared, ranks.ranks, &accelerators)?;
            let text = match output {
                Output::Text => render::text(&plan),
                Output::Json => {
                    serde_json::to_string_pretty(&plan).map_err(Failure::internal)? + "\n"
                }
                Output::Yaml => serde_saphyr::to_string(&plan).map_err(Failure::internal)?,
            };
            display::result(&text);
            Ok(())
        }
        Command::Run { job, ranks } => {
            run::run(run::prepare(&job.file, job.work_dir, trainer)?, ranks.ranks)
        }
        Command::Verify(passed) => trainer::pass_on(trainer, "verify", &passed.arguments),
        Command::Generate(passed) => trainer::pass_on(trainer, "generate", &passed.arguments),
        Command::Data(Data::Check(asked)) => data::check(asked, trainer),
        Command::Convert(passed) => trainer::pass_on(trainer, "convert", &passed.arguments),
        Command::Operator(arguments) => operator::run(&arguments),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Arguments::command(), "finetune", &mut script);
            display::result(&String::from_utf8_lossy(&script));
            Ok(())
        }
        Command::Crd => {
            display::result(&crd::crd_yaml().map_err(Failure::internal)?);
            Ok(())
        }
    }
}
