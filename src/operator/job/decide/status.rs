//! Plans, progress and reports in the words of a job's status.

use finetune_api::{
    AttemptStatus, Fallback, FineTuneJobStatus, MAX_LOSS, MAX_NUMBER, MAX_RATE, MAX_STEPS,
    PlanStatus, PodStatus, ProgressStatus, ResultStatus, Step,
};
use finetune_contract::{ArtifactKind, Progress, PublishedResult, RunConfig, RunReport};
use finetune_plan::{
    placement::Placement,
    pod::{self, PodSize},
    render, units,
};
use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};

/// The longest estimate of a status, in bytes.
const MAX_ETA: usize = 16;
/// The longest summary of a plan; the CRD allows a little more.
const SUMMARY_LIMIT: usize = 16_000;

pub(super) fn first_attempt(step: Step) -> AttemptStatus {
    AttemptStatus {
        step,
        number: 0,
        failures: 0,
        disruptions: 0,
        counted_from_step: None,
        job_uid: None,
        retry_time: None,
    }
}

/// Returns whether a run has made a step: what it needs was all there once.
pub(super) fn has_trained(status: &FineTuneJobStatus) -> bool {
    status.progress.as_ref().is_some_and(|progress| progress.step > 0)
}

pub(super) fn next_attempt(attempt: AttemptStatus, at: Timestamp) -> AttemptStatus {
    AttemptStatus {
        number: attempt.number + 1,
        job_uid: None,
        retry_time: Some(Time(at)),
        ..attempt
    }
}

pub(super) fn plan_status(placement: &Placement) -> PlanStatus {
    let Placement { plan, accelerator, pod } = placement;
    let summary = format!("{}\n\n{}", pods(placement), render::text(plan));
    PlanStatus {
        run_id: plan.run_config.run_id.0.clone(),
        method: method(placement).to_owned(),
        accelerator: accelerator.clone(),
        summary: summary[..summary.floor_char_boundary(SUMMARY_LIMIT)].to_owned(),
        predicted_peak_bytes: signed(plan.memory.total()),
        estimated_seconds: plan.seconds.map(|seconds| seconds.ceil() as i64),
        pod: PodStatus {
            cpu_millis: pod.cpu_millis,
            memory_bytes: signed(pod.memory_bytes),
            shared_memory_bytes: signed(pod.shared_memory_bytes),
            storage_bytes: signed(pod.storage_bytes),
        },
        run_config: finetune_contract::render(&plan.run_config),
        fallbacks: plan.fallbacks.clone(),
    }
}

/// Describes which pods a run has, and how large each is.
fn pods(placement: &Placement) -> String {
    let Placement { plan, accelerator, pod } = placement;
    let parallelism = plan.run_config.parallelism;
    let pods = match (parallelism.places(), parallelism.local_world_size) {
        (1, 1) => format!("On {accelerator}:"),
        (1, all) => format!("On one pod with {all} {accelerator}:"),
        (pods, 1) => format!("On {pods} pods of {accelerator}, each"),
        (pods, some) => format!("On {pods} pods with {some} {accelerator} each, a pod"),
    };
    format!("{pods} {}", pod::describe(pod))
}

/// Describes in one line what was planned.
pub(super) fn plan_message(placement: &Placement) -> String {
    let Placement { plan, accelerator, .. } = placement;
    let place = match plan.run_config.parallelism.world_size {
        1 => format!("on one {accelerator},"),
        ranks => format!("over {ranks} ranks, each on one {accelerator} with"),
    };
    let memory = units::bytes(plan.memory.total());
    let time = plan
        .seconds
        .map_or(String::new(), |seconds| format!(", about {}", units::duration(seconds)));
    format!("{} {place} {memory}{time}; see status.plan.summary", method(placement))
}

fn method(placement: &Placement) -> &'static str {
    if placement.plan.run_config.lora.is_some() { "LoRA" } else { "Full" }
}

/// Returns a plan with one of its fallbacks taken; `message` is added to its summary.
pub(super) fn adapted_plan(
    plan: &PlanStatus,
    config: &RunConfig,
    fallbacks: Vec<Fallback>,
    message: &str,
) -> PlanStatus {
    let added = format!("\nAdapted\n  {message}\n");
    let kept = plan.summary.floor_char_boundary(SUMMARY_LIMIT.saturating_sub(added.len()));
    PlanStatus {
        summary: format!("{}{added}", &plan.summary[..kept]),
        predicted_peak_bytes: signed(config.predicted_peak_bytes),
        run_config: finetune_contract::render(config),
        fallbacks,
        ..plan.clone()
    }
}

pub(super) fn pod_size(pod: &PodStatus) -> PodSize {
    PodSize {
        cpu_millis: pod.cpu_millis,
        memory_bytes: pod.memory_bytes.unsigned_abs(),
        shared_memory_bytes: pod.shared_memory_bytes.unsigned_abs(),
        storage_bytes: pod.storage_bytes.unsigned_abs(),
    }
}

pub(super) fn progress_status(progress: &Progress, now: Timestamp) -> ProgressStatus {
    ProgressStatus {
        stage: progress.stage.as_str().to_owned(),
        step: steps(progress.step),
        total_steps: steps(progress.total_steps),
        checkpoint_step: progress.checkpoint_step.map(steps),
        loss: bounded(progress.loss, MAX_LOSS),
        eval_loss: bounded(progress.eval_loss, MAX_LOSS),
        tokens_per_second: bounded(progress.tokens_per_second, MAX_RATE),
        eta_seconds: progress.eta_seconds.map(signed),
        eta: progress
            .eta_seconds
            .map(|seconds| units::duration(seconds as f64))
            .filter(|eta| eta.len() <= MAX_ETA),
        last_updated_time: Some(Time(now)),
    }
}

/// Returns the last progress of a run with what its report adds.
pub(super) fn last_progress(progress: ProgressStatus, report: &RunReport) -> ProgressStatus {
    let last = |losses: Option<[f64; 2]>| bounded(losses.map(|[_, last]| last), MAX_LOSS);
    ProgressStatus {
        step: steps(report.steps),
        loss: last(report.train_loss).or(progress.loss),
        eval_loss: last(report.eval_loss).or(progress.eval_loss),
        ..progress
    }
}

/// Returns a result that a trainer reported.
pub(super) fn result_status(
    report: &RunReport,
    kind: ArtifactKind,
    uri: &str,
    manifest_sha256: &str,
) -> ResultStatus {
    ResultStatus {
        uri: uri.to_owned(),
        kind: kind.as_str().to_owned(),
        manifest_sha256: manifest_sha256.to_owned(),
        eval_loss: bounded(report.eval_loss.map(|[_, after]| after), MAX_LOSS),
        steps: steps(report.steps),
        measured_peak_bytes: signed(report.measured_peak_bytes),
    }
}

/// Returns the result that another run of the same inputs published.
pub(super) fn published_before(uri: &str, found: &PublishedResult) -> ResultStatus {
    ResultStatus {
        uri: uri.to_owned(),
        kind: found.kind.as_str().to_owned(),
        manifest_sha256: found.manifest_sha256.clone(),
        eval_loss: None,
        steps: steps(found.step),
        measured_peak_bytes: 0,
    }
}

/// Returns a number within the bounds of the CRD, signed as Kubernetes' numbers are: one that is out of
/// them would make the apiserver refuse the whole status, again and again.
fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(MAX_NUMBER).min(MAX_NUMBER)
}

fn steps(number: u64) -> i64 {
    signed(number).min(MAX_STEPS)
}

/// Returns a number within the bounds of the CRD, with the four digits that a table has room for; JSON has
/// no word for what is not finite.
fn bounded(number: Option<f64>, max: f64) -> Option<f64> {
    let finite = number.filter(|number| number.is_finite());
    finite.map(|number| (number.clamp(0.0, max) * 1e4).round() / 1e4)
}
