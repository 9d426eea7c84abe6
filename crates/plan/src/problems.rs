//! What makes a run impossible, or slow.

use finetune_api::{FineTuneJob, OUTPUT, Training};
use finetune_contract::{
    OutputState, PreflightReport, Problem, ProblemReason, PublishedResult, Recompute, RunConfig,
    artifact::MANIFEST_NAME, decisive_settings, settings_text,
};

use super::{
    resolve,
    sizing::{Memory, Workload},
    target::Target,
    units,
};

/// Returns the problem of a value that cannot work.
pub(super) fn invalid(location: &str, message: impl Into<String>) -> Problem {
    Problem {
        reason: ProblemReason::InvalidSpec,
        location: location.to_owned(),
        message: message.into(),
    }
}

/// Returns the problem of an output that holds a result of different inputs, unless the preflight said it.
pub(super) fn foreign_result(job: &FineTuneJob, report: &PreflightReport) -> Option<Problem> {
    let output = &job.spec.output;
    let is_foreign = report.output == Some(OutputState::OtherInputs)
        && output.overwrite != Some(true)
        && report.problems.iter().all(|problem| problem.reason != ProblemReason::OutputExists);
    is_foreign.then(|| Problem {
        reason: ProblemReason::OutputExists,
        location: OUTPUT.to_owned(),
        message: format!(
            "{} holds a result of different inputs: choose another uri, or set output.overwrite: true to replace it",
            output.uri
        ),
    })
}

/// Returns the result at the output if its settings are those of the run, too.
pub(super) fn published_before(
    report: &PreflightReport,
    config: &RunConfig,
) -> Result<Option<PublishedResult>, Problem> {
    let Some(published) = &report.published else { return Ok(None) };
    let settings = settings_text(&decisive_settings(config));
    let is_same = published.settings_sha256 == resolve::sha256_hex(settings.as_bytes());
    match (is_same, config.output.overwrite) {
        (true, _) => Ok(Some(published.clone())),
        (false, true) => Ok(None),
        (false, false) => Err(Problem {
            reason: ProblemReason::OutputExists,
            location: OUTPUT.to_owned(),
            message: format!(
                "{} holds a result of the same rows and model, made with other settings (by run {}; they are in its {MANIFEST_NAME}): choose another uri, or set output.overwrite: true to replace it",
                config.output.uri, published.run_id
            ),
        }),
    }
}

pub(super) fn check_patience(
    training: &Training,
    has_validation: bool,
    problems: &mut Vec<Problem>,
) {
    if training.early_stopping_patience.is_some_and(|patience| patience > 0) && !has_validation {
        problems.push(invalid(
            "spec.training.earlyStoppingPatience",
            "needs dataset.validation, which is not set: there is no loss to watch; set it or remove the patience",
        ));
    }
}

pub(super) fn too_little_memory(
    memory: &Memory,
    workload: &Workload,
    limit: u64,
    budget: u64,
    with_adamw_8bit: Option<u64>,
    target: Target<'_>,
) -> Problem {
    let who = if workload.ranks > 1 {
        format!("each of {} ranks needs", workload.ranks)
    } else {
        "the run needs".to_owned()
    };
    let where_ = target.name();
    let mut advice = Vec::new();
    if target.users_limit().is_some() {
        advice.push("raise resources.limits.memory".to_owned());
    }
    if workload.micro_batch > 1 {
        advice.push("lower training.trainBatchSizePerDevice".to_owned());
    }
    if workload.recompute == Recompute::None {
        advice.push("set training.recompute: block".to_owned());
    }
    if workload.ranks > 1 && matches!(target, Target::Local(_)) {
        advice.push("use fewer ranks, which share this machine's memory".to_owned());
    }
    if workload.is_full {
        advice.extend(with_adamw_8bit.map(|bytes| {
            format!("set training.optimizer: adamw8bit, with which it is {}", units::bytes(bytes))
        }));
        advice.push("set loraConfig: {}".to_owned());
    }
    advice.push(format!("lower training.contextLength below {}", workload.context));
    if target.users_limit().is_none() {
        advice.push("use a machine with more memory".to_owned());
    }
    invalid(
        "memory",
        format!(
            "{who} {}, but only {} of the {} {where_} is available, {} short: {}",
            units::bytes(memory.total()),
            units::bytes(budget),
            units::bytes(limit),
            units::bytes(memory.total() - budget),
            advice.join(", or "),
        ),
    )
}

/// Adds what only the plan can know: weights that will not stay in memory while training.
pub(super) fn warnings(
    report: &PreflightReport,
    memory: &Memory,
    limit: Option<u64>,
    workload: &Workload,
) -> Vec<Problem> {
    let mut warnings = report.warnings.clone();
    let room =
        limit.filter(|_| !workload.is_device).map(|limit| limit.saturating_sub(memory.total()));
    if let Some(room) = room.filter(|room| *room < memory.mapped_weights) {
        warnings.push(invalid(
            "memory",
            format!(
                "{} of weights are read in place, but only {} of memory stay free for them: they will be read from disk again and again, and the run will be slow",
                units::bytes(memory.mapped_weights),
                units::bytes(room),
            ),
        ));
    }
    warnings
}
