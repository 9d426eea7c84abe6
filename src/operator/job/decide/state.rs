//! What a job has come to, and how that is written into its next status.

use std::time::Duration;

use finetune_api::{
    AttemptStatus, FineTuneJobStatus, PlanStatus, ProgressStatus, ResultStatus, Step,
};
use finetune_contract::Reason;
use k8s_openapi::{
    apimachinery::pkg::apis::meta::v1::Time,
    jiff::{SignedDuration, Timestamp},
};

use super::{Action, Decision, Input, JobEvent, until};
use crate::operator::job::{
    conditions::{self, Kind, Truth},
    decide::status::first_attempt,
};

/// How soon a job is reconciled again though nothing changed.
const SAFETY_INTERVAL: Duration = Duration::from_mins(5);

/// What a job has come to.
#[expect(clippy::large_enum_variant, reason = "one value a decision, moved a few times")]
pub(super) enum State {
    /// The current attempt runs, or waits to be started.
    InProgress(InProgress),
    /// The current attempt ended, and another follows.
    Retry(Retry),
    /// The preflight succeeded, and training can be started.
    Planned(Planned),
    /// The run is over.
    Finished(Finished),
}

/// An attempt that runs, or waits to be started.
pub(super) struct InProgress {
    pub(super) attempt: AttemptStatus,
    /// What changes; what is said of an attempt stays until something else is known.
    pub(super) conditions: Vec<ConditionChange>,
    pub(super) actions: Vec<Action>,
    /// News of the trainer.
    pub(super) progress: Option<ProgressStatus>,
    pub(super) requeue_after: Option<Duration>,
    /// Whether its Job is created now.
    pub(super) is_started: bool,
}

/// The attempt that follows another.
pub(super) struct Retry {
    pub(super) attempt: AttemptStatus,
    pub(super) reason: Reason,
    pub(super) message: String,
    /// The plan with the next of its fallbacks, if that is why.
    pub(super) adapted_plan: Option<PlanStatus>,
}

/// A plan that was just made.
pub(super) struct Planned {
    pub(super) plan: PlanStatus,
    pub(super) message: String,
    /// The end, if the result was published before.
    pub(super) already_published: Option<Finished>,
}

/// The end of a run.
pub(super) struct Finished {
    /// The attempt that brought it about, if one did.
    pub(super) attempt: Option<AttemptStatus>,
    pub(super) truth: Truth,
    pub(super) reason: Reason,
    pub(super) message: String,
    /// Other conditions that the end settles.
    pub(super) conditions: Vec<ConditionChange>,
    pub(super) result: Option<ResultStatus>,
    /// The last progress, if more is known of it now.
    pub(super) progress: Option<ProgressStatus>,
}

/// A condition's next value.
pub(super) struct ConditionChange {
    kind: Kind,
    truth: Truth,
    reason: Reason,
    message: String,
}

impl ConditionChange {
    pub(super) fn new(
        kind: Kind,
        truth: Truth,
        reason: Reason,
        message: impl Into<String>,
    ) -> Self {
        Self { kind, truth, reason, message: message.into() }
    }

    /// The preflight found no problem.
    pub(super) fn accepted() -> Self {
        let message = "model, dataset and output can be used";
        Self::new(Kind::Accepted, Truth::True, Reason::PreflightPassed, message)
    }

    pub(super) fn not_suspended() -> Self {
        let message = "spec.suspend is not set";
        Self::new(Kind::Suspended, Truth::False, Reason::NotSuspended, message)
    }
}

impl InProgress {
    /// Returns an attempt of which nothing new is known.
    pub(super) fn unchanged(attempt: AttemptStatus) -> Self {
        Self {
            attempt,
            conditions: Vec::new(),
            actions: Vec::new(),
            progress: None,
            requeue_after: None,
            is_started: false,
        }
    }

    /// Returns an attempt whose state is `reason`.
    pub(super) fn new(attempt: AttemptStatus, reason: Reason, message: impl Into<String>) -> Self {
        Self::unchanged(attempt).because(reason, message)
    }

    /// Sets the summary.
    pub(super) fn because(self, reason: Reason, message: impl Into<String>) -> Self {
        let summary = ConditionChange::new(Kind::Succeeded, Truth::Unknown, reason, message);
        self.with(summary)
    }

    /// Replaces the summary.
    pub(super) fn with_summary(mut self, reason: Reason, message: impl Into<String>) -> Self {
        self.conditions.retain(|condition| condition.kind != Kind::Succeeded);
        self.because(reason, message)
    }

    /// Sets another condition.
    pub(super) fn with(mut self, condition: ConditionChange) -> Self {
        self.conditions.push(condition);
        self
    }

    /// Reconciles the job again after `wait` at the latest.
    pub(super) fn requeue_within(self, wait: Duration) -> Self {
        let requeue_after = [Some(wait), self.requeue_after].into_iter().flatten().min();
        Self { requeue_after, ..self }
    }
}

impl Finished {
    pub(super) fn failed(reason: Reason, message: impl Into<String>) -> Self {
        Self {
            attempt: None,
            truth: Truth::False,
            reason,
            message: message.into(),
            conditions: Vec::new(),
            result: None,
            progress: None,
        }
    }

    /// The result is at the output; `published` is why the condition `Published` is true.
    pub(super) fn succeeded(
        reason: Reason,
        published: Reason,
        message: String,
        result: ResultStatus,
    ) -> Self {
        let published = ConditionChange::new(Kind::Published, Truth::True, published, &message);
        let end = Self::failed(reason, message).with(published);
        Self { truth: Truth::True, result: Some(result), ..end }
    }

    pub(super) fn with(mut self, condition: ConditionChange) -> Self {
        self.conditions.push(condition);
        self
    }

    pub(super) fn of(self, attempt: AttemptStatus) -> Self {
        Self { attempt: Some(attempt), ..self }
    }
}

/// The next status while it is being written.
pub(super) struct NextStatus {
    pub(super) status: FineTuneJobStatus,
    actions: Vec<Action>,
    events: Vec<JobEvent>,
    requeue_after: Duration,
    now: Timestamp,
}

impl NextStatus {
    /// Takes the job's status up, with every condition.
    pub(super) fn new(input: &Input<'_>) -> Self {
        let mut status = input.job.status.clone().unwrap_or_default();
        status.observed_generation = input.job.metadata.generation;
        conditions::complete(&mut status, input.now);
        Self {
            status,
            actions: Vec::new(),
            events: Vec::new(),
            requeue_after: SAFETY_INTERVAL,
            now: input.now,
        }
    }

    pub(super) fn set(&mut self, change: ConditionChange) {
        let ConditionChange { kind, truth, reason, message } = change;
        conditions::set(&mut self.status, self.now, kind, truth, reason, &message);
    }

    pub(super) fn write(&mut self, state: State) {
        match state {
            State::InProgress(in_progress) => self.write_in_progress(in_progress),
            State::Retry(retry) => self.write_retry(retry),
            State::Planned(planned) => self.write_planned(planned),
            State::Finished(finished) => self.finish(finished),
        }
    }

    fn write_in_progress(&mut self, in_progress: InProgress) {
        let InProgress { attempt, conditions, actions, progress, requeue_after, is_started } =
            in_progress;
        if is_started && attempt.step == Step::Training && self.status.start_time.is_none() {
            self.status.start_time = Some(Time(self.now));
        }
        self.status.attempt = Some(attempt);
        for condition in conditions {
            self.set(condition);
        }
        self.actions.extend(actions);
        if progress.is_some() {
            self.status.progress = progress;
        }
        if let Some(wait) = requeue_after {
            self.requeue_within(wait);
        }
    }

    fn write_retry(&mut self, retry: Retry) {
        let Retry { attempt, reason, message, adapted_plan } = retry;
        if let Some(plan) = adapted_plan {
            self.status.plan = Some(plan);
            self.set(ConditionChange::new(Kind::Planned, Truth::True, reason, &message));
        }
        if let Some(time) = &attempt.retry_time {
            self.requeue_at(time.0);
        }
        self.status.attempt = Some(attempt);
        self.set(ConditionChange::new(Kind::Succeeded, Truth::Unknown, reason, &message));
        self.emit(true, reason, message);
    }

    fn write_planned(&mut self, planned: Planned) {
        let Planned { plan, message, already_published } = planned;
        self.status.plan = Some(plan);
        self.status.attempt = Some(first_attempt(Step::Training));
        self.set(ConditionChange::accepted());
        self.set(ConditionChange::new(Kind::Planned, Truth::True, Reason::Planned, &message));
        self.emit(false, Reason::Planned, message);
        if let Some(end) = already_published {
            self.finish(end);
        }
    }

    /// Ends the run for good.
    pub(super) fn finish(&mut self, finished: Finished) {
        let Finished { attempt, truth, reason, message, conditions, result, progress } = finished;
        if attempt.is_some() {
            self.status.attempt = attempt;
        }
        for condition in conditions {
            self.set(condition);
        }
        self.set(ConditionChange::new(Kind::Succeeded, truth, reason, &message));
        if result.is_some() {
            self.status.result = result;
        }
        if progress.is_some() {
            self.status.progress = progress;
        }
        if let Some(progress) = &mut self.status.progress {
            progress.eta = None;
            progress.eta_seconds = None;
        }
        self.status.completion_time = Some(Time(self.now));
        self.emit(truth != Truth::True, reason, message);
    }

    fn emit(&mut self, is_warning: bool, reason: Reason, message: String) {
        self.events.push(JobEvent { is_warning, reason, message });
    }

    fn requeue_at(&mut self, time: Timestamp) {
        self.requeue_within(until(self.now, time));
    }

    fn requeue_within(&mut self, wait: Duration) {
        self.requeue_after = self.requeue_after.min(wait);
    }

    /// Completes the decision: a finished run leaves nothing running.
    pub(super) fn into_decision(mut self, input: &Input<'_>) -> Decision {
        if conditions::is_finished(&self.status) {
            return self.clean_up(input);
        }
        if let Some(deadline) = input.deadline(&self.status) {
            self.requeue_at(deadline);
        }
        let Self { status, actions, events, requeue_after, now: _ } = self;
        Decision { status, actions, events, requeue_after: Some(requeue_after) }
    }

    /// Deletes every Job that has not ended, pods without one, and the FineTuneJob when its time has
    /// come.
    fn clean_up(self, input: &Input<'_>) -> Decision {
        let Self { status, mut actions, events, .. } = self;
        let live = input.observed.jobs.iter().filter(|job| job.ended.is_none() && !job.is_deleting);
        actions.extend(live.map(Action::delete_job));
        actions.extend(input.orphan_deletions());

        let ttl = input.job.spec.ttl_seconds_after_finished;
        let due = ttl
            .zip(status.completion_time.as_ref())
            .map(|(ttl, end)| end.0 + SignedDuration::from_secs(ttl));
        let requeue_after = due.filter(|due| input.now < *due).map(|due| input.until(due));
        if due.is_some_and(|due| input.now >= due) {
            actions.push(Action::DeleteSelf);
        }
        Decision { status, actions, events, requeue_after }
    }
}
