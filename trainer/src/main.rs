//! The trainer's command line: parses, calls, and turns every ending into a report and an exit code.

use std::{
    io::{IsTerminal, Write},
    net::SocketAddr,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    process,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use clap::{Args, Parser, Subcommand};
use finetune_contract::{
    CONTRACT_VERSION, Document, Dtype, ExitCode, FailureReason, Outcome, PreflightConfig,
    RunConfig, RunReport, parse, process::environment::LOG, render,
};
use finetune_trainer::{
    commands::{bench, data_check, generate, verify},
    context::RunContext,
    distributed::{
        self, OnLost, Ranks,
        launch::{self, Launch, MODEL_CACHE},
        rank::{RankInfo, Timeouts},
    },
    failure::Failure,
    gguf,
    metrics::{recorder::Teller, server::Board},
    preflight, recipe,
    runtime::device,
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
    Preflight(Documents),
    /// Trains, publishes and proves one run.
    Train(Train),
    /// Reads a published result back and checks it.
    Verify(verify::Arguments),
    /// Continues a prompt with a model.
    Generate(generate::Arguments),
    /// Shows what of the training rows is trained on.
    DataCheck(data_check::Arguments),
    /// Times training steps on given tokens and prints the figures as JSON.
    #[command(hide = true)]
    Bench(bench::Arguments),
    /// Converts a GGUF file to a Hugging Face directory.
    #[command(alias = "import")]
    Convert(gguf::Arguments),
}

#[derive(Debug, Args)]
struct Documents {
    /// The document that says what to do.
    #[arg(long)]
    config: PathBuf,
    /// Where to write the report.
    #[arg(long)]
    report: PathBuf,
    /// Scratch space; kept between attempts where it can be.
    #[arg(long)]
    work_dir: PathBuf,
}

#[derive(Debug, Args)]
struct Train {
    #[command(flatten)]
    documents: Documents,
    /// Where to serve /progress and /metrics; nowhere if absent.
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<SocketAddr>,
    /// Where another rank of this machine keeps the models it fetches; below the work directory, and
    /// fetched by this one, if absent.
    #[arg(long, value_name = "DIRECTORY", hide = true)]
    models: Option<PathBuf>,
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
    std::panic::set_hook(Box::new(|_| {}));
    let ended = catch_unwind(AssertUnwindSafe(|| dispatch(&cli.command)))
        .unwrap_or_else(|panic| Err(failure_of_panic(&*panic)));
    let code = ended.unwrap_or_else(|failure| {
        if cli.command.is_for_a_person() {
            // Nobody looking is no failure of ours.
            let _ = writeln!(std::io::stderr(), "error: {failure}");
        } else {
            error!("{failure}");
        }
        failure.exit_code()
    });
    process::ExitCode::from(code.code())
}

impl Command {
    /// Tells whether a person asked and reads the answer; else it goes to a log.
    fn is_for_a_person(&self) -> bool {
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

fn dispatch(command: &Command) -> Result<ExitCode, Failure> {
    let environment = Environment::from_process();
    match command {
        Command::Preflight(documents) => run_preflight(documents, &environment),
        Command::Train(arguments) => {
            let config: RunConfig = read(&arguments.documents.config)?;
            if launch::is_launcher(&config, &environment) {
                run_ranks(&config, arguments, &environment)
            } else {
                launch::end_with_launcher(&environment);
                run_train(&config, arguments, &environment)
            }
        }
        Command::Verify(arguments) => {
            verify::run(arguments, &environment).map(|()| ExitCode::Success)
        }
        Command::Generate(arguments) => {
            generate::run(arguments, &environment).map(|()| ExitCode::Success)
        }
        Command::DataCheck(arguments) => {
            let config: PreflightConfig = read(arguments.config())?;
            data_check::run(&config, arguments, &environment).map(|()| ExitCode::Success)
        }
        Command::Bench(arguments) => bench::run(arguments, &environment).map(|figures| {
            print_line(&figures);
            ExitCode::Success
        }),
        Command::Convert(arguments) => gguf::run(arguments).map(|()| ExitCode::Success),
    }
}

fn run_preflight(documents: &Documents, environment: &Environment) -> Result<ExitCode, Failure> {
    let config: PreflightConfig = read(&documents.config)?;
    let work_dir = make_work_dir(&documents.work_dir)?;
    let report = preflight::run(&config, environment, &work_dir).fit();
    write(&documents.report, &report)?;
    // What another try may mend must not hide what it cannot.
    let codes = || report.problems.iter().map(|problem| problem.reason.exit_code());
    let code = codes().find(|code| !code.is_retryable()).or_else(|| codes().next());
    Ok(code.unwrap_or(ExitCode::Success))
}

/// Trains with all ranks of this pod or machine, each a process of its own.
fn run_ranks(
    config: &RunConfig,
    arguments: &Train,
    environment: &Environment,
) -> Result<ExitCode, Failure> {
    let Train { documents, listen, .. } = arguments;
    let launch = Launch {
        config,
        config_path: &documents.config,
        report_path: &documents.report,
        work_dir: &make_work_dir(&documents.work_dir)?,
        listen: *listen,
    };
    launch::run(&launch, environment)
        .map_err(|failure| report_early(config, &documents.report, failure))
}

fn run_train(
    config: &RunConfig,
    arguments: &Train,
    environment: &Environment,
) -> Result<ExitCode, Failure> {
    let Train { documents, listen, models } = arguments;
    let early = |failure| report_early(config, &documents.report, failure);
    let work_dir = make_work_dir(&documents.work_dir)?;
    let stop = stop_on_signal()?;
    let device = device::open(config.device).map_err(early)?;
    let place = RankInfo::read(config.parallelism, environment).map_err(early)?;
    let ranks = match place {
        None => Ranks::alone(),
        Some(place) => {
            let name = format!("{}/{}", config.run_id, config.attempt);
            let on_lost = end_when_lost(config, &documents.report);
            Ranks::join(&place, &name, device, Timeouts::default(), on_lost)
                .map_err(|error| early(error.into()))?
        }
    };
    let board = Board::new(config);
    if let Some(address) = listen.filter(|_| ranks.is_first()) {
        board.serve(address)?;
    }
    let mut line = |line: &str| {
        if ranks.is_first() {
            board.put(line);
            print_line(line);
        }
    };
    let mut teller = Teller::new(config, &work_dir, &mut line);
    let context = RunContext {
        environment,
        work_dir: &work_dir,
        model_cache: &models.clone().unwrap_or_else(|| work_dir.join(MODEL_CACHE)),
        shares_model_cache: models.is_some(),
        stop: &stop,
        device,
        ranks: ranks.clone(),
    };
    // The one place a panic ends: libtorch reports running out of memory as one.
    let ended = catch_unwind(AssertUnwindSafe(|| recipe::run(config, &context, &mut teller)))
        .unwrap_or_else(|panic| Err(failure_of_panic(&*panic)));
    let (outcome, code) = match ended {
        Ok(Some(outcome @ Outcome::Interrupted { .. })) => (outcome, ExitCode::Interrupted),
        Ok(Some(outcome)) => (outcome, ExitCode::Success),
        // Rank 0 has the last word of a run that went well.
        Ok(None) => {
            ranks.done();
            return Ok(ExitCode::Success);
        }
        Err(failure) => {
            error!("{failure}");
            let code = failure.exit_code();
            ranks.fail(&failure.message);
            write(&documents.report, &report(config, &teller, failed(failure)).fit())?;
            if ranks.world_size() > 1 {
                distributed::exit(code);
            }
            return Ok(code);
        }
    };
    ranks.done();
    write(&documents.report, &report(config, &teller, outcome).fit())?;
    Ok(code)
}

fn failed(failure: Failure) -> Outcome {
    Outcome::Failed { reason: failure.reason, message: failure.message }
}

/// Makes what ends this process when another rank is lost and a collective waits for it.
fn end_when_lost(config: &RunConfig, path: &Path) -> OnLost {
    let (config, path) = (config.clone(), path.to_owned());
    Box::new(move |why| {
        let failure = Failure::new(FailureReason::PeerLost, why);
        let failure = report_early(&config, &path, failure);
        error!("{failure}");
        distributed::exit(failure.exit_code());
    })
}

/// Reports a failure about which there is nothing else to say.
fn report_early(config: &RunConfig, path: &Path, failure: Failure) -> Failure {
    let mut nowhere = |_: &str| {};
    let teller = Teller::new(config, Path::new(""), &mut nowhere);
    if let Err(unwritten) = write(path, &report(config, &teller, failed(failure.clone())).fit()) {
        error!("{unwritten}");
    }
    failure
}

fn report(config: &RunConfig, teller: &Teller<'_>, outcome: Outcome) -> RunReport {
    let last = teller.last();
    let state = teller.state();
    RunReport {
        version: CONTRACT_VERSION,
        run_id: config.run_id.clone(),
        attempt: config.attempt,
        outcome,
        steps: last.step,
        tokens_seen: last.tokens_seen,
        rows_left_out: teller.rows_left_out(),
        resumed_from_step: last.resumed_from_step,
        train_loss: state.first_loss.zip(state.last_loss).map(<[f64; 2]>::from),
        eval_loss: state.base_eval_loss.zip(state.best.map(|best| best.loss)).map(<[f64; 2]>::from),
        best_step: state.best.map(|best| best.step).filter(|&step| step != last.step),
        stopped_early: state.stopped_early,
        bf16_kernel: state.bf16_kernel.clone().filter(|_| config.training.dtype == Dtype::Bf16),
        tokens_per_second: teller.median_speed(),
        duration_seconds: teller.elapsed_seconds(),
        predicted_peak_bytes: config.predicted_peak_bytes,
        measured_peak_bytes: teller.peak_memory(),
        predicted_sent_bytes: config.predicted_sent_bytes,
        measured_sent_bytes: config.predicted_sent_bytes.and(teller.sent_bytes()),
    }
}

/// Sets a flag on SIGINT and SIGTERM; the loop looks at it after each step.
fn stop_on_signal() -> Result<Arc<AtomicBool>, Failure> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&stop))
            .map_err(|error| Failure::from_io(&error, "cannot listen for signals"))?;
    }
    debug_assert!(!stop.load(Ordering::Relaxed));
    Ok(stop)
}

fn failure_of_panic(panic: &(dyn std::any::Any + Send)) -> Failure {
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no message");
    let is_out_of_memory = ["can't allocate memory", "out of memory", "OutOfMemoryError"]
        .iter()
        .any(|words| text.contains(words));
    if is_out_of_memory {
        let message = format!("the device ran out of memory ({text})");
        return Failure::new(FailureReason::OutOfMemory, message);
    }
    Failure::new(
        FailureReason::Internal,
        format!("this is a defect of the trainer, please report it: {text}"),
    )
}

fn read<D: Document>(path: &Path) -> Result<D, Failure> {
    let text = std::fs::read_to_string(path).map_err(|error| {
        Failure::new(FailureReason::InvalidConfiguration, format!("cannot read {path:?}: {error}"))
    })?;
    parse(&text).map_err(|error| Failure::from_chain(FailureReason::InvalidConfiguration, &error))
}

fn write<D: Document>(path: &Path, document: &D) -> Result<(), Failure> {
    std::fs::write(path, render(document))
        .map_err(|error| Failure::from_io(&error, &format!("cannot write {path:?}")))
}

/// Makes the work directory and returns its absolute path.
fn make_work_dir(path: &Path) -> Result<PathBuf, Failure> {
    std::fs::create_dir_all(path)
        .and_then(|()| std::path::absolute(path))
        .map_err(|error| Failure::from_io(&error, &format!("cannot make {path:?}")))
}

/// Prints one line of progress. Nobody listening is no reason to stop training.
fn print_line(line: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use clap::Parser;
    use finetune_contract::{TrainerArgs, TrainerCommand, process::POD_ADDRESS};

    use super::{Cli, Command, Documents, Train};

    fn parse(args: &TrainerArgs) -> Command {
        let program = std::iter::once("finetune-trainer".into());
        Cli::try_parse_from(program.chain(args.to_args())).unwrap().command
    }

    fn paths(documents: &Documents) -> [&PathBuf; 3] {
        let Documents { config, report, work_dir } = documents;
        [config, report, work_dir]
    }

    #[test]
    fn the_command_line_of_the_contract_is_understood() {
        // Values that begin like options, too.
        let [config, report, work_dir] = ["c", "--r", "w d"].map(PathBuf::from);
        let mut args = TrainerArgs::new(TrainerCommand::Preflight, &config, &report, &work_dir);
        let Command::Preflight(documents) = parse(&args) else { panic!("another command") };
        assert_eq!(paths(&documents), [&config, &report, &work_dir]);
        args.command = TrainerCommand::Train;
        let Command::Train(Train { documents, listen, models }) = parse(&args) else {
            panic!("another command")
        };
        assert_eq!(
            (paths(&documents), listen, models),
            ([&config, &report, &work_dir], None, None)
        );
        args.listen = Some(POD_ADDRESS);
        args.models = Some(PathBuf::from("m"));
        let Command::Train(Train { listen, models, .. }) = parse(&args) else {
            panic!("another command")
        };
        assert_eq!((listen, models), (args.listen, args.models));
    }
}
