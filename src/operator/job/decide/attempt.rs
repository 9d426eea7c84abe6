//! The current attempt of a stage: observed if its Job exists, else started when it may be.

use std::time::Duration;

use finetune_api::{Approval, AttemptStatus, FineTuneJobStatus, PlanStatus, Step};
use finetune_contract::{Parallelism, Reason, Stage};
use finetune_plan::{accelerators::Accelerator, pod::PodSize};
use k8s_openapi::{
    api::batch::v1::Job,
    jiff::{SignedDuration, Timestamp},
};

use super::{
    Action, Input, lost_node, ownership, stall,
    state::{ConditionChange, Finished, InProgress, State},
    status::{first_attempt, has_trained, next_attempt, pod_size, progress_status},
    termination::{Termination, termination},
};
use crate::operator::job::{
    build::{
        self, Attempt,
        names::{QUEUE_LABEL, job_name},
        ranks,
    },
    conditions::{Kind, Truth},
    observe::{ObservedJob, ObservedPod, PodState},
};

/// How often a running trainer is asked for its progress, at most.
pub const PROGRESS_INTERVAL: Duration = Duration::from_secs(15);
/// How long an outage of what a run had before may last, in seconds.
const OUTAGE_SECONDS: i64 = 86_400;
/// How often it is asked why pods are missing.
const PODS_INTERVAL: Duration = Duration::from_secs(30);
/// How long ranks have to end by themselves after another has failed: they notice in seconds, half a
/// minute if it fell silent, but wait for minutes for one that has not come yet.
const RANKS_GRACE: SignedDuration = SignedDuration::from_secs(60);

const QUEUED: &str = "the queue decides when the pod starts";

/// What the attempts of a stage run.
pub(super) struct Work<'a> {
    pub(super) step: Step,
    /// Renders the trainer's configuration, for an attempt that is started.
    pub(super) config: &'a dyn Fn() -> String,
    /// The plan; absent for a preflight.
    pub(super) plan: Option<&'a PlanStatus>,
    pub(super) parallelism: Parallelism,
}

/// What the current attempt has come to.
#[expect(clippy::large_enum_variant, reason = "one value a decision, moved a few times")]
pub(super) enum AttemptState {
    /// It is over.
    Ended(AttemptStatus, Termination),
    /// It is not, or it could not be started.
    Other(State),
}

impl From<InProgress> for AttemptState {
    fn from(in_progress: InProgress) -> Self {
        Self::Other(State::InProgress(in_progress))
    }
}

/// Returns the number and budgets of a stage's current attempt.
pub(super) fn current(status: &FineTuneJobStatus, step: Step) -> AttemptStatus {
    let current = status.attempt.clone().filter(|attempt| attempt.step == step);
    current.unwrap_or_else(|| first_attempt(step))
}

/// Observes the current attempt of a stage, or starts it.
pub(super) fn reconcile(
    input: &Input<'_>,
    status: &FineTuneJobStatus,
    work: &Work<'_>,
) -> AttemptState {
    let attempt = current(status, work.step);
    let name = job_name(input.name(), work.step, attempt.number);
    let Some(job) = input.observed.job(&name) else {
        return without_job(input, status, attempt, work);
    };
    let would_create = || build_job(input, attempt.number, work).ok();
    if !ownership::is_ours(input, &attempt, job, would_create) {
        return ownership::delete_foreign(attempt, job).into();
    }
    let attempt = AttemptStatus { job_uid: Some(job.uid.clone()), ..attempt };
    let pods = input.observed.pods_of(job);
    if let Some(is_success) = job.ended.filter(|_| !job.is_deleting) {
        return AttemptState::Ended(attempt, termination(&pods, is_success));
    }
    match with_job(input, status, attempt, job, &pods) {
        AttemptState::Other(State::InProgress(state)) => {
            lost_node::report(input, pods.into_iter().flatten(), state).into()
        }
        other => other,
    }
}

/// There is a Job, and it has not ended.
fn with_job(
    input: &Input<'_>,
    status: &FineTuneJobStatus,
    attempt: AttemptStatus,
    job: &ObservedJob,
    pods: &[Option<&ObservedPod>],
) -> AttemptState {
    if job.is_deleting {
        if stall::cause(status).is_some() {
            return InProgress::unchanged(attempt).into();
        }
        let message = "the pods of this attempt are terminating";
        return InProgress::new(attempt, Reason::Stopping, message).into();
    }
    if input.is_suspended() {
        let message =
            "spec.suspend is set: the pods of this attempt save a checkpoint and terminate";
        let stopping = InProgress::new(attempt, Reason::Stopping, message);
        return InProgress { actions: vec![Action::delete_job(job)], ..stopping }.into();
    }
    running(input, status, attempt, job, pods)
}

/// There is no Job: it is to be created, or somebody deleted it.
fn without_job(
    input: &Input<'_>,
    status: &FineTuneJobStatus,
    attempt: AttemptStatus,
    work: &Work<'_>,
) -> AttemptState {
    let was_deleted = attempt.job_uid.is_some();
    if input.is_suspended() {
        let attempt = if was_deleted {
            AttemptStatus { retry_time: None, ..next_attempt(attempt, input.now) }
        } else {
            attempt
        };
        return suspended(attempt).into();
    }
    if was_deleted {
        let why = stall::cause(status).unwrap_or("its Job was deleted").to_owned();
        return AttemptState::Ended(attempt, Termination::Disrupted(why));
    }
    // A pod without a Job would work on the same run.
    let orphans = input.observed.orphaned_pods().count();
    if orphans > 0 {
        let message = format!("{orphans} pods of an earlier attempt are terminating");
        let stopping = InProgress::new(attempt, Reason::Stopping, message);
        let state = InProgress { actions: input.orphan_deletions().collect(), ..stopping };
        return lost_node::report(input, input.observed.orphaned_pods(), state).into();
    }
    let retry_time = attempt.retry_time.as_ref().map(|time| time.0);
    if let Some(time) = retry_time.filter(|time| *time > input.now) {
        let requeue_after = Some(input.until(time));
        return InProgress { requeue_after, ..InProgress::unchanged(attempt) }.into();
    }
    if work.step == Step::Training && input.job.spec.approval == Some(Approval::Manual) {
        let message = "read status.plan.summary, then set spec.approval to Auto";
        return InProgress::new(attempt, Reason::AwaitingApproval, message).into();
    }
    start(input, attempt, work).into()
}

fn suspended(attempt: AttemptStatus) -> InProgress {
    let message = "spec.suspend is set; set it to false to resume from the last checkpoint";
    let suspended = ConditionChange::new(Kind::Suspended, Truth::True, Reason::Suspended, message);
    InProgress::new(attempt, Reason::Suspended, message).with(suspended)
}

/// Builds the Job of an attempt.
///
/// # Errors
/// Why it has to wait for an administrator.
fn build_job(input: &Input<'_>, number: i32, work: &Work<'_>) -> Result<Job, (Reason, String)> {
    let Work { step, config, plan, parallelism } = *work;
    let place = plan.map(|plan| place(input, plan)).transpose()?;
    let attempt = Attempt { step, number, config: &config(), place, parallelism };
    Ok(build::job(input.job, input.settings, &attempt))
}

/// Creates the Job of an attempt, and what its ranks share.
fn start(input: &Input<'_>, attempt: AttemptStatus, work: &Work<'_>) -> InProgress {
    let job = match build_job(input, attempt.number, work) {
        Ok(job) => job,
        Err((reason, message)) => return InProgress::new(attempt, reason, message),
    };

    let mut actions = Vec::new();
    if work.parallelism.places() > 1 {
        let namespace = input.job.metadata.namespace.as_ref();
        if input.settings.confined_namespaces.iter().any(|name| Some(name) == namespace) {
            actions.push(Action::CreateNetworkPolicy(Box::new(ranks::policy(input.job))));
        }
        actions.push(Action::CreateService(Box::new(ranks::service(input.job))));
    }
    actions.push(Action::CreateJob(Box::new(job)));

    let labels = input.job.metadata.labels.as_ref();
    let is_queued = work.step == Step::Training
        && labels.is_some_and(|labels| labels.contains_key(QUEUE_LABEL));
    let state = if let Some(refusal) = &input.observed.refusal {
        InProgress::new(attempt, Reason::JobRefused, refusal)
    } else if is_queued {
        InProgress::new(attempt, Reason::Queued, QUEUED)
    } else {
        starting(attempt)
    };
    InProgress { actions, is_started: true, ..state }
}

/// Finds where a planned run is to be started.
///
/// # Errors
/// Why it has to wait for an administrator.
fn place<'a>(
    input: &Input<'a>,
    plan: &PlanStatus,
) -> Result<(&'a Accelerator, PodSize), (Reason, String)> {
    let name = &plan.accelerator;
    let Some(accelerator) = input.settings.accelerator(name) else {
        let message = format!(
            "the operator's settings no longer list the accelerator {name:?} of the plan: an administrator must add it again, or create the job again"
        );
        return Err((Reason::AcceleratorMissing, message));
    };
    if !accelerator.has_trainer() {
        let message = format!(
            "the operator's settings no longer name a trainer for the accelerator {name:?} of the plan: an administrator must set its `image` again"
        );
        return Err((Reason::TrainerImageMissing, message));
    }
    Ok((accelerator, pod_size(&plan.pod)))
}

fn starting(attempt: AttemptStatus) -> InProgress {
    let (reason, message) = match attempt.step {
        Step::Preflight => (Reason::Preflight, "model, dataset and output are being checked"),
        Step::Training => (Reason::Starting, "the training pod starts and loads the model"),
    };
    InProgress::new(attempt, reason, message)
}

/// The Job exists and has not ended. Ordinary states of a starting or terminating pod share one
/// message, for each message is a write.
fn running(
    input: &Input<'_>,
    status: &FineTuneJobStatus,
    attempt: AttemptStatus,
    job: &ObservedJob,
    pods: &[Option<&ObservedPod>],
) -> AttemptState {
    if job.is_suspended {
        return InProgress::new(attempt, Reason::Queued, QUEUED).into();
    }
    let grace = match surviving_ranks(input, job, pods) {
        SurvivingRanks::Terminate(pods) => return terminate(attempt, &pods).into(),
        SurvivingRanks::HaveUntil(time) => Some(input.until(time)),
        SurvivingRanks::RunOn => None,
    };
    match slowest_pod(input, status, attempt, job, pods) {
        AttemptState::Other(State::InProgress(state)) => match grace {
            Some(wait) => state.requeue_within(wait).into(),
            None => state.into(),
        },
        other => other,
    }
}

/// What becomes of the other ranks of a run.
enum SurvivingRanks<'a> {
    /// No rank is lost, or all have ended.
    RunOn,
    /// A rank is lost: they have until then to end by themselves.
    HaveUntil(Timestamp),
    /// They wait for a rank that will not come.
    Terminate(Vec<&'a ObservedPod>),
}

fn surviving_ranks<'a>(
    input: &Input<'_>,
    job: &ObservedJob,
    pods: &[Option<&'a ObservedPod>],
) -> SurvivingRanks<'a> {
    let has_failed = |pod: &&&ObservedPod| matches!(&pod.state, PodState::Ended { code, .. } if *code != Some(0));
    let failed = pods.iter().flatten().filter(has_failed);
    let first = failed.map(|pod| pod.ended.or(pod.created).unwrap_or(input.now)).min();
    // A pod that is gone leaves no time, and whoever waits for it has nothing to save.
    let is_gone = job.has_failed_rank && pods.iter().any(Option::is_none);
    if !is_gone {
        let Some(first) = first else { return SurvivingRanks::RunOn };
        let due = first + RANKS_GRACE;
        if input.now < due {
            return SurvivingRanks::HaveUntil(due);
        }
    }
    let has_ended = |pod: &&ObservedPod| matches!(pod.state, PodState::Ended { .. });
    let waiting: Vec<&ObservedPod> =
        pods.iter().flatten().copied().filter(|pod| !has_ended(pod)).collect();
    if waiting.is_empty() { SurvivingRanks::RunOn } else { SurvivingRanks::Terminate(waiting) }
}

fn terminate(attempt: AttemptStatus, pods: &[&ObservedPod]) -> InProgress {
    let live = pods.iter().filter(|pod| !pod.is_deleting);
    let deletions = live.map(|pod| Action::delete_pod(pod));
    let message =
        format!("a rank is lost; the {} ranks that wait for it are terminated", pods.len());
    let stopping = InProgress::new(attempt, Reason::Stopping, message);
    InProgress { actions: deletions.collect(), ..stopping }
}

/// The run is where its slowest rank is: the others wait for that one.
fn slowest_pod(
    input: &Input<'_>,
    status: &FineTuneJobStatus,
    attempt: AttemptStatus,
    job: &ObservedJob,
    pods: &[Option<&ObservedPod>],
) -> AttemptState {
    let slowest = pods.iter().enumerate().min_by_key(|(_, pod)| readiness(**pod));
    let Some((rank, pod)) = slowest.map(|(rank, pod)| (rank, *pod)) else {
        return InProgress::unchanged(attempt).into();
    };
    let has_node = |pod: &&ObservedPod| pod.scheduled.is_some();
    let who = match pods {
        [_] => String::new(),
        // Which of several finds no room left when all are placed together is chance.
        _ if !pods.iter().flatten().any(has_node) => {
            format!("none of {} pods has a node yet, and the run needs all of them: ", pods.len())
        }
        _ => format!("pod {rank} of {}, for which the others wait: ", pods.len()),
    };
    match pod.map(|pod| &pod.state) {
        None => without_pod(input, attempt, job, &who).into(),
        Some(PodState::Unschedulable(message)) if names_missing_claim(message) => {
            let created = pod.and_then(|pod| pod.created);
            let message = format!("{who}{message}");
            cannot_start(input, status, attempt, created, (Reason::VolumeClaimMissing, message))
        }
        Some(PodState::Unschedulable(message)) => {
            InProgress::new(attempt, Reason::Unschedulable, format!("{who}{message}")).into()
        }
        Some(PodState::Waiting { reason, message }) => {
            let scheduled = pod.and_then(|pod| pod.scheduled);
            waiting(input, status, attempt, scheduled, (reason, format!("{who}{message}")))
        }
        Some(PodState::Running) if attempt.step == Step::Preflight => starting(attempt).into(),
        Some(PodState::Running) => training(input, status, attempt, job, pods).into(),
        // The Job will end in a moment.
        Some(PodState::Ended { .. }) => InProgress::unchanged(attempt).into(),
    }
}

/// A pod is missing: Kubernetes has not created it yet, or the cluster refuses it.
fn without_pod(
    input: &Input<'_>,
    attempt: AttemptStatus,
    job: &ObservedJob,
    who: &str,
) -> InProgress {
    let state = match &input.observed.pods_refused {
        Some(message) => InProgress::new(attempt, Reason::PodsRefused, format!("{who}{message}")),
        None => starting(attempt),
    };
    let due = input.observed.pods_due(job).unwrap_or(input.now);
    let requeue_after = if due > input.now { input.until(due) } else { PODS_INTERVAL };
    InProgress { requeue_after: Some(requeue_after), ..state }
}

/// Orders ranks by how far they are: the first is what the others wait for.
fn readiness(pod: Option<&ObservedPod>) -> u8 {
    match pod.map(|pod| &pod.state) {
        Some(PodState::Unschedulable(message)) => u8::from(!names_shortage(message)),
        // What keeps a container from starting is reported before that another is early.
        Some(PodState::Waiting { reason, .. }) => 2 + u8::from(reason.is_empty()),
        None => 4,
        Some(PodState::Running) => 5,
        Some(PodState::Ended { .. }) => 6,
    }
}

/// Returns whether a scheduler's message names what nodes lack, such as `0/3 nodes are available: 3
/// Insufficient memory`. Of a gang, a pod for which there would be room is only said to wait.
fn names_shortage(message: &str) -> bool {
    message.contains("nodes are ")
}

/// Returns whether a scheduler's message says that a PersistentVolumeClaim does not exist, such as
/// `0/3 nodes are available: persistentvolumeclaim "models" not found`.
fn names_missing_claim(message: &str) -> bool {
    message.contains("persistentvolumeclaim \"") && message.contains("\" not found")
}

/// The container has not started: it is early, or the kubelet cannot start it.
fn waiting(
    input: &Input<'_>,
    status: &FineTuneJobStatus,
    attempt: AttemptStatus,
    scheduled: Option<Timestamp>,
    (kubelet_reason, message): (&str, String),
) -> AttemptState {
    let reason = match kubelet_reason {
        "ErrImagePull" | "ImagePullBackOff" | "InvalidImageName" | "ErrImageNeverPull" => {
            Reason::ImagePullFailed
        }
        "CreateContainerConfigError" => Reason::SecretOrConfigMapMissing,
        "CreateContainerError" | "RunContainerError" => Reason::ContainerCannotStart,
        _ => return starting(attempt).into(),
    };
    cannot_start(input, status, attempt, scheduled, (reason, message))
}

/// Something that the job names keeps its pod from starting: it has until the deadline to appear,
/// counted from `since`. A run that has trained has a day: it was there before.
fn cannot_start(
    input: &Input<'_>,
    status: &FineTuneJobStatus,
    attempt: AttemptStatus,
    since: Option<Timestamp>,
    (reason, message): (Reason, String),
) -> AttemptState {
    let limit = input.settings.startup_deadline_seconds;
    let seconds = if has_trained(status) { limit.max(OUTAGE_SECONDS) } else { limit };
    let deadline = since.map(|since| since + SignedDuration::from_secs(seconds));
    if deadline.is_some_and(|deadline| input.now >= deadline) {
        let message = format!("{message}\nIt did not start within {seconds} s.");
        return AttemptState::Other(State::Finished(Finished::failed(reason, message).of(attempt)));
    }
    let requeue_after = deadline.map(|deadline| input.until(deadline));
    InProgress { requeue_after, ..InProgress::new(attempt, reason, message) }.into()
}

/// All ranks of a training run.
fn training(
    input: &Input<'_>,
    status: &FineTuneJobStatus,
    attempt: AttemptStatus,
    job: &ObservedJob,
    pods: &[Option<&ObservedPod>],
) -> InProgress {
    let last = status.progress.as_ref();
    let Some(progress) = &input.observed.progress else {
        // It was not asked just now, or it does not answer: what was known stays.
        let state = match last {
            None => starting(attempt),
            Some(_) => InProgress::unchanged(attempt),
        };
        return InProgress { requeue_after: Some(PROGRESS_INTERVAL), ..state };
    };
    let next = progress_status(progress, input.now);
    let is_news = last.is_none_or(|last| (last.step, &last.stage) != (next.step, &next.stage));
    let state = match progress.stage {
        Stage::Fetching | Stage::Loading => starting(attempt),
        Stage::Training | Stage::Evaluating => {
            InProgress::new(attempt, Reason::Training, "see status.progress")
        }
        Stage::Exporting | Stage::Publishing | Stage::Verifying => {
            let message = "publishing and verifying the result";
            InProgress::new(attempt, Reason::Publishing, message)
        }
    };
    let requeue_after = Some(PROGRESS_INTERVAL);
    let state = InProgress { progress: is_news.then_some(next), requeue_after, ..state };
    stall::restart(input, status, job, pods, progress, state)
}
