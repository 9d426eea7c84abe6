//! The steps of `finetune plan` and `finetune run`: manifest, preflight, plan, training, summary.

use std::{
    fs,
    path::{Path, PathBuf},
};

use finetune_api::{FineTuneJob, manifest};
use finetune_contract::{
    ExitCode, FailureReason, ObjectUri, Outcome, ParseDocumentError, PreflightConfig,
    PreflightReport, RunConfig, RunReport, Scheme, TrainerCommand,
};
use finetune_plan::{
    accelerators::Accelerator,
    fallbacks::{self, Adapted},
    render, resolve,
    run_plan::{RunPlan, nothing_trained},
    target::Target,
    units,
};

use super::{
    display,
    failure::Failure,
    lock::Locks,
    trainer::{self, Trainer},
};

/// A job read and a trainer found.
pub(super) struct Prepared {
    job: FineTuneJob,
    trainer: Trainer,
}

/// Reads the manifest, finds the trainer and makes the work directory.
pub(super) fn prepare(
    file: &Path,
    work_dir: Option<PathBuf>,
    named: Option<PathBuf>,
) -> Result<Prepared, Failure> {
    let job = read(file)?;
    notice_cluster_fields(&job);
    let program = trainer::find(named)?;
    let work_dir = make_work_dir(work_dir, &job)?;
    Ok(Prepared { job, trainer: Trainer { program, work_dir, locks: None } })
}

/// Reads a manifest that can run here.
pub(super) fn read(file: &Path) -> Result<FineTuneJob, Failure> {
    let text = fs::read_to_string(file).map_err(|error| {
        Failure::configuration(format!("cannot read {}: {error}", file.display()))
    })?;
    let job = manifest::parse(&text).map_err(|error| match error {
        manifest::Error::Violations(violations) => {
            Failure::violations(&format!("{} cannot run:", file.display()), &violations)
        }
        other => Failure::configuration(format!("{}: {other}", file.display())),
    })?;
    refuse_claims(&job)?;
    Ok(job)
}

/// Creates the directory of a job's work: the one named, else one below the user's state.
pub(super) fn make_work_dir(named: Option<PathBuf>, job: &FineTuneJob) -> Result<PathBuf, Failure> {
    let work_dir = match named {
        Some(work_dir) => std::path::absolute(&work_dir).map_err(Failure::internal)?,
        None => default_work_dir()?.join(resolve::run_id(job).0),
    };
    fs::create_dir_all(&work_dir).map_err(|error| {
        Failure::configuration(format!(
            "cannot make {}: {error}: choose another directory with --work-dir",
            work_dir.display()
        ))
    })?;
    Ok(work_dir)
}

/// Reads a file of accelerators; none if there is no file.
pub(super) fn read_accelerators(file: Option<&Path>) -> Result<Vec<Accelerator>, Failure> {
    let Some(file) = file else { return Ok(Vec::new()) };
    let text = fs::read_to_string(file).map_err(|error| {
        Failure::configuration(format!("cannot read {}: {error}", file.display()))
    })?;
    let accelerators: Vec<Accelerator> = serde_saphyr::from_str(&text).map_err(|error| {
        Failure::configuration(format!("{} is not a list of accelerators: {error}", file.display()))
    })?;
    for accelerator in &accelerators {
        if let Some((field, figure)) = accelerator.fault() {
            return Err(Failure::configuration(format!(
                "{}: {field} of {:?} is {figure}, must be a number above 0",
                file.display(),
                accelerator.name
            )));
        }
    }
    Ok(accelerators)
}

/// Returns what the preflight of a job is given.
pub(super) fn preflight_config(
    job: &FineTuneJob,
    measure_machine: bool,
) -> Result<PreflightConfig, Failure> {
    resolve::preflight_config(job, measure_machine).map_err(|problems| {
        Failure::problems("the run cannot start:", &problems, problems.len() as u64)
    })
}

/// Runs the preflight and decides.
pub(super) fn plan(
    prepared: &Prepared,
    ranks: u32,
    accelerators: &[Accelerator],
) -> Result<(PreflightReport, RunPlan), Failure> {
    let Prepared { job, trainer } = prepared;
    let (ended, text) = trainer.run(TrainerCommand::Preflight, &preflight_config(job, true)?)?;
    let Some(text) = text.filter(|_| !ended.was_interrupted) else {
        return Err(without_report("preflight", &ended));
    };
    let report: PreflightReport =
        finetune_contract::parse(&text).map_err(|error| unreadable(&error))?;
    let plan = finetune_plan::plan(job, &report, Target::Local(accelerators), ranks).map_err(
        |problems| {
            let hidden = report.problems_total.saturating_sub(report.problems.len() as u64);
            Failure::problems("the run cannot start:", &problems, problems.len() as u64 + hidden)
        },
    )?;
    Ok((report, plan))
}

/// Carries a job out, over so many ranks, and says how it ended; waits for another run of the same.
pub(super) fn run(mut prepared: Prepared, ranks: u32) -> Result<(), Failure> {
    let locks = default_work_dir().unwrap_or_else(|_| std::env::temp_dir().join("finetune"));
    let output = &prepared.job.spec.output.uri;
    let locks = Locks::take(&prepared.trainer.work_dir, &locks.join("locks"), output)?;
    prepared.trainer.locks = Some(locks);
    let (_, plan) = plan(&prepared, ranks, &[])?;
    if let Some(message) = plan.nothing_to_train() {
        display::result(&format!("{message}\n"));
        return Ok(());
    }
    display::note(&render::text(&plan));
    let report = train(&prepared.trainer, &plan)?;
    match &report.outcome {
        Outcome::Succeeded { .. } => {
            display::result(&summary(&report));
            Ok(())
        }
        Outcome::AlreadyPublished { uri, by, .. } => {
            display::result(&format!("{}\n", nothing_trained(uri, by)));
            Ok(())
        }
        Outcome::Interrupted { checkpoint_step } => Err(Failure::new(
            ExitCode::Interrupted,
            format!(
                "interrupted; step {checkpoint_step} is saved. Run the same command again to resume"
            ),
        )),
        Outcome::Failed { reason, message } => {
            Err(Failure::new(reason.exit_code(), message.clone()))
        }
    }
}

/// Trains; where memory is too little, in smaller pieces, as long as there are any.
fn train(trainer: &Trainer, plan: &RunPlan) -> Result<RunReport, Failure> {
    let (mut config, mut ways) = (plan.run_config.clone(), plan.fallbacks.clone());
    // The ranks share this machine.
    let ranks = u64::from(config.parallelism.world_size);
    let limit = plan.memory_limit.map(|limit| limit / ranks);
    loop {
        let why = match train_once(trainer, &config)? {
            Trained::Reported(report) => return Ok(*report),
            Trained::OutOfMemory(why) => why,
        };
        let Adapted { config: adapted, left, change } =
            fallbacks::adapt(&config, &ways, limit).map_err(|nothing_left| {
                let message = format!(
                    "{why}, and {nothing_left}. Lower training.contextLength, or use a machine with more memory"
                );
                Failure::new(ExitCode::OutOfMemory, message)
            })?;
        display::note(&format!("continuing with {change}, because {why}"));
        config = RunConfig { attempt: config.attempt + 1, ..adapted };
        ways = left;
    }
}

/// What one attempt came to.
enum Trained {
    Reported(Box<RunReport>),
    OutOfMemory(String),
}

fn train_once(trainer: &Trainer, config: &RunConfig) -> Result<Trained, Failure> {
    let (ended, text) = trainer.run(TrainerCommand::Train, config)?;
    if ended.is_out_of_memory && !ended.was_interrupted {
        let why = "the trainer was OOM-killed";
        return Ok(Trained::OutOfMemory(why.to_owned()));
    }
    let Some(text) = text else {
        return Err(without_report("train", &ended));
    };
    let report: RunReport = finetune_contract::parse(&text).map_err(|error| unreadable(&error))?;
    match report.outcome {
        Outcome::Failed { reason: FailureReason::OutOfMemory, message } => {
            Ok(Trained::OutOfMemory(message))
        }
        _ => Ok(Trained::Reported(Box::new(report))),
    }
}

fn summary(report: &RunReport) -> String {
    let mut lines = Vec::new();
    let mut line = |name: &str, value: String| lines.push(format!("{name:<12}{value}\n"));
    if let Outcome::Succeeded { uri, proof, .. } = &report.outcome {
        line("published", uri.clone());
        let losses =
            proof.loss_trained_and_reloaded.map_or(String::new(), |[trained, reloaded]| {
                format!("; loss {trained:.4} after training, {reloaded:.4} reloaded")
            });
        line("verified", format!("{} files, {}{losses}", proof.files, units::bytes(proof.bytes)));
    }
    if let Some([first, last]) = report.train_loss {
        line("train loss", format!("{first:.3} → {last:.3} in {} steps", report.steps));
    }
    if let Some([before, after]) = report.eval_loss {
        line("eval loss", format!("{before:.3} → {after:.3}"));
    }
    if let Some(rows) = report.rows_left_out {
        line("left out", format!("{rows} training rows that cannot be used"));
    }
    if let Some(cause) = report.stopped_early {
        line("ended early", format!("by {}", cause.field()));
    }
    if let Some(step) = report.best_step {
        line("best step", format!("{step}, published"));
    }
    let speed =
        report.tokens_per_second.map(|speed| format!(", {speed:.0} tok/s")).unwrap_or_default();
    let kernel =
        report.bf16_kernel.as_ref().map_or(String::new(), |kernel| format!(", bf16 by {kernel}"));
    line("time", format!("{}{speed}{kernel}", units::duration(report.duration_seconds)));
    line(
        "memory",
        format!(
            "{} peak, {} predicted",
            units::bytes(report.measured_peak_bytes),
            units::bytes(report.predicted_peak_bytes)
        ),
    );
    if let (Some(sent), Some(predicted)) = (report.measured_sent_bytes, report.predicted_sent_bytes)
    {
        let (sent, predicted) = (units::bytes(sent), units::bytes(predicted));
        line("network", format!("{sent} sent in a step by rank 0, {predicted} predicted"));
    }
    lines.concat()
}

fn unreadable(error: &ParseDocumentError) -> Failure {
    let code = match error {
        ParseDocumentError::UnknownVersion { .. } => ExitCode::BadConfiguration,
        ParseDocumentError::Invalid { .. } => ExitCode::Internal,
    };
    Failure::new(code, error.to_string())
}

fn without_report(step: &str, ended: &trainer::Ended) -> Failure {
    let trainer::Ended { code, was_interrupted, is_out_of_memory: _ } = ended;
    if *was_interrupted {
        return Failure::new(
            ExitCode::Interrupted,
            "interrupted. Run the same command again to resume from the last checkpoint",
        );
    }
    match code {
        Some(code) if *code != 0 => Failure::status(
            *code as u8,
            format!("finetune-trainer {step} exited with code {code} without a report; see above"),
        ),
        Some(_) => Failure::internal(format!(
            "finetune-trainer {step} left no report: is it of this release?"
        )),
        None => Failure::internal(format!(
            "finetune-trainer {step} was killed, perhaps because memory ran out. Run the same command again to resume from the last checkpoint"
        )),
    }
}

/// Refuses volume claims, which only a cluster has.
fn refuse_claims(job: &FineTuneJob) -> Result<(), Failure> {
    let claims: Vec<String> = job
        .spec
        .uris()
        .filter(|(_, uri)| ObjectUri::parse(uri).is_ok_and(|uri| uri.scheme == Scheme::Pvc))
        .map(|(path, uri)| format!("\n  {path} is {uri:?}: there are no volume claims without a cluster; write the file:// URI of where the data is here"))
        .collect();
    if claims.is_empty() {
        Ok(())
    } else {
        Err(Failure::configuration(format!("cannot run here:{}", claims.concat())))
    }
}

fn notice_cluster_fields(job: &FineTuneJob) {
    let spec = &job.spec;
    let fields: Vec<&str> = [
        ("suspend", spec.suspend.is_some()),
        ("approval", spec.approval.is_some()),
        ("activeDeadlineSeconds", spec.active_deadline_seconds.is_some()),
        ("ttlSecondsAfterFinished", spec.ttl_seconds_after_finished.is_some()),
        ("resources", spec.resources.is_some()),
        ("podTemplate", spec.pod_template.is_some()),
        ("model.secretRef", spec.model.secret_ref.is_some()),
        (
            "initialAdapter.secretRef",
            spec.initial_adapter.as_ref().is_some_and(|adapter| adapter.secret_ref.is_some()),
        ),
        (
            "initialCheckpoint.secretRef",
            spec.initial_checkpoint
                .as_ref()
                .is_some_and(|checkpoint| checkpoint.secret_ref.is_some()),
        ),
        ("dataset.secretRef", spec.dataset.secret_ref.is_some()),
        ("output.secretRef", spec.output.secret_ref.is_some()),
    ]
    .into_iter()
    .filter_map(|(field, is_set)| is_set.then_some(field))
    .collect();
    if !fields.is_empty() {
        display::note(&format!("ignored here, only a cluster reads: {}", fields.join(", ")));
    }
}

fn default_work_dir() -> Result<PathBuf, Failure> {
    let state =
        std::env::var_os("XDG_STATE_HOME").filter(|state| !state.is_empty()).map(PathBuf::from);
    state
        .or_else(|| std::env::home_dir().map(|home| home.join(".local/state")))
        .map(|state| state.join("finetune"))
        .ok_or_else(|| {
            Failure::configuration(
                "there is no home directory for the work: name one with --work-dir DIR",
            )
        })
}
