//! Runs one training process: starts the other ranks of its machine or is one of them, serves its
//! progress, and writes the run report whatever happens.

use std::{
    net::SocketAddr,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicBool},
};

use clap::Args;
use finetune_contract::{
    CONTRACT_VERSION, Dtype, ExitCode, FailureReason, Outcome, RunConfig, RunReport,
};
use tracing::error;

use crate::{
    commands::documents::{self, Documents},
    context::RunContext,
    distributed::{
        self, OnLost, Ranks,
        launch::{self, Launch, MODEL_CACHE},
        rank::{RankInfo, Timeouts},
    },
    failure::Failure,
    metrics::{
        history::History, recorder::Recorder, server::MetricsServer, sink::Sink, stdout::JsonLines,
    },
    recipe,
    runtime::device,
    store::Environment,
};

/// The files of the run, and how this process shares its progress and its models.
#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    documents: Documents,
    /// The address that serves /progress and /metrics; they are not served if absent.
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<SocketAddr>,
    /// The model cache of another rank of this machine, which fetches the models; if absent, this
    /// process fetches them into a cache in its work directory.
    #[arg(long = "models", value_name = "DIRECTORY", hide = true)]
    model_cache: Option<PathBuf>,
}

/// Trains as one rank, or starts all ranks of this pod or machine and waits for them.
///
/// # Errors
/// A [`Failure`] if the process cannot start; failures of the run itself are in its report.
pub fn run(arguments: &Arguments, environment: &Environment) -> Result<ExitCode, Failure> {
    let config: RunConfig = documents::read(&arguments.documents.config)?;
    if launch::is_launcher(&config, environment) {
        return run_all_ranks(&config, arguments, environment);
    }
    launch::end_with_launcher(environment);
    run_rank(&config, arguments, environment)
}

/// Trains with all ranks of this pod or machine, each in a process of its own.
fn run_all_ranks(
    config: &RunConfig,
    arguments: &Arguments,
    environment: &Environment,
) -> Result<ExitCode, Failure> {
    let Arguments { documents, listen, .. } = arguments;
    let launch = Launch {
        config,
        config_path: &documents.config,
        report_path: &documents.report,
        work_dir: &documents.create_work_dir()?,
        listen: *listen,
    };
    launch::run(&launch, environment)
        .map_err(|failure| report_early_failure(config, &documents.report, failure))
}

fn run_rank(
    config: &RunConfig,
    arguments: &Arguments,
    environment: &Environment,
) -> Result<ExitCode, Failure> {
    let Arguments { documents, listen, model_cache } = arguments;
    let report_failure = |failure| report_early_failure(config, &documents.report, failure);
    let work_dir = documents.create_work_dir()?;
    let stop = stop_on_signal()?;
    let device = device::open(config.device).map_err(report_failure)?;
    let ranks =
        join_ranks(config, &documents.report, environment, device).map_err(report_failure)?;
    let sinks = sinks(config, &work_dir, *listen, ranks.is_first())?;
    let mut recorder = Recorder::new(config, sinks);
    let context = RunContext {
        environment,
        work_dir: &work_dir,
        model_cache: &model_cache.clone().unwrap_or_else(|| work_dir.join(MODEL_CACHE)),
        shares_model_cache: model_cache.is_some(),
        stop: &stop,
        device,
        ranks: ranks.clone(),
    };
    // libtorch reports running out of memory by a panic.
    let result = catch_unwind(AssertUnwindSafe(|| recipe::run(config, &context, &mut recorder)))
        .unwrap_or_else(|panic| Err(Failure::from_panic(&*panic)));
    let (outcome, code) = match result {
        Ok(Some(outcome @ Outcome::Interrupted { .. })) => (outcome, ExitCode::Interrupted),
        Ok(Some(outcome)) => (outcome, ExitCode::Success),
        // Rank 0 alone reports a run that succeeded.
        Ok(None) => {
            ranks.done();
            return Ok(ExitCode::Success);
        }
        Err(failure) => {
            error!("{failure}");
            let code = failure.exit_code();
            ranks.fail(&failure.message);
            let report = report(config, &recorder, failed(failure)).fit();
            documents::write(&documents.report, &report)?;
            if ranks.world_size() > 1 {
                distributed::exit(code);
            }
            return Ok(code);
        }
    };
    ranks.done();
    documents::write(&documents.report, &report(config, &recorder, outcome).fit())?;
    Ok(code)
}

/// Returns what receives the progress of this rank. Only rank 0 prints and serves it.
fn sinks(
    config: &RunConfig,
    work_dir: &Path,
    listen: Option<SocketAddr>,
    is_first: bool,
) -> Result<Vec<Box<dyn Sink>>, Failure> {
    let mut sinks: Vec<Box<dyn Sink>> = Vec::new();
    if is_first {
        if let Some(address) = listen {
            let server = MetricsServer::new(config);
            server.start(address)?;
            sinks.push(Box::new(server));
        }
        sinks.push(Box::new(JsonLines));
    }
    sinks.push(Box::new(History::new(work_dir)));
    Ok(sinks)
}

/// Connects this process with the other ranks of the run, if it has any.
fn join_ranks(
    config: &RunConfig,
    report_path: &Path,
    environment: &Environment,
    device: tch::Device,
) -> Result<Ranks, Failure> {
    let Some(place) = RankInfo::read(config.parallelism, environment)? else {
        return Ok(Ranks::alone());
    };
    let name = format!("{}/{}", config.run_id, config.attempt);
    let on_lost = exit_on_lost_rank(config, report_path);
    Ok(Ranks::join(&place, &name, device, Timeouts::default(), on_lost)?)
}

/// Returns the callback that ends this process when another rank is lost, while a collective may
/// still be waiting for that rank.
fn exit_on_lost_rank(config: &RunConfig, report_path: &Path) -> OnLost {
    let (config, path) = (config.clone(), report_path.to_owned());
    Box::new(move |why| {
        let failure = Failure::new(FailureReason::PeerLost, why);
        let failure = report_early_failure(&config, &path, failure);
        error!("{failure}");
        distributed::exit(failure.exit_code());
    })
}

/// Writes the report of a run that failed before it recorded any progress.
fn report_early_failure(config: &RunConfig, path: &Path, failure: Failure) -> Failure {
    let recorder = Recorder::new(config, Vec::new());
    let report = report(config, &recorder, failed(failure.clone())).fit();
    if let Err(write_failure) = documents::write(path, &report) {
        error!("{write_failure}");
    }
    failure
}

fn failed(failure: Failure) -> Outcome {
    Outcome::Failed { reason: failure.reason, message: failure.message }
}

fn report(config: &RunConfig, recorder: &Recorder, outcome: Outcome) -> RunReport {
    let last = recorder.last();
    let state = recorder.state();
    RunReport {
        version: CONTRACT_VERSION,
        run_id: config.run_id.clone(),
        attempt: config.attempt,
        outcome,
        steps: last.step,
        tokens_seen: last.tokens_seen,
        rows_left_out: recorder.skipped_rows(),
        resumed_from_step: last.resumed_from_step,
        train_loss: state.first_loss.zip(state.last_loss).map(<[f64; 2]>::from),
        eval_loss: state.base_eval_loss.zip(state.best.map(|best| best.loss)).map(<[f64; 2]>::from),
        best_step: state.best.map(|best| best.step).filter(|&step| step != last.step),
        stopped_early: state.stopped_early,
        bf16_kernel: state.bf16_kernel.clone().filter(|_| config.training.dtype == Dtype::Bf16),
        tokens_per_second: recorder.median_speed(),
        duration_seconds: recorder.elapsed_seconds(),
        predicted_peak_bytes: config.predicted_peak_bytes,
        measured_peak_bytes: recorder.peak_memory(),
        predicted_sent_bytes: config.predicted_sent_bytes,
        measured_sent_bytes: config.predicted_sent_bytes.and(recorder.sent_bytes()),
    }
}

/// Returns a flag that SIGINT and SIGTERM set; the training loop checks it after each step.
fn stop_on_signal() -> Result<Arc<AtomicBool>, Failure> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&stop))
            .map_err(|error| Failure::from_io(&error, "cannot listen for signals"))?;
    }
    Ok(stop)
}
