//! The second stage: pods train what was planned, and their report is the end of the run or the
//! reason of another attempt.

use finetune_api::{AttemptStatus, FineTuneJobStatus, PlanStatus, ResultStatus, Step};
use finetune_contract::{ExitCode, FailureReason, Outcome, Reason, RunConfig, RunReport};
use finetune_plan::{
    accelerators::Accelerator,
    fallbacks::{self, Adapted},
    run_plan::nothing_trained,
    units,
};

use super::{
    Action, Input,
    attempt::{self, AttemptState, Work},
    retry::{self, DISRUPTION_BACKOFF, is_last},
    state::{Finished, InProgress, Retry, State},
    status::{adapted_plan, has_trained, last_progress, next_attempt, pod_size, result_status},
    termination::Termination,
};
use crate::operator::job::build;

/// Decides about a job that has a plan.
pub(super) fn decide(input: &Input<'_>, status: &FineTuneJobStatus, plan: &PlanStatus) -> State {
    let config = match finetune_contract::parse::<RunConfig>(&plan.run_config) {
        Ok(config) => config,
        Err(error) => return State::InProgress(held(input, status, &error.to_string())),
    };
    let number = attempt::current(status, Step::Training).number.unsigned_abs();
    let config_of_attempt =
        || finetune_contract::render(&RunConfig { attempt: number, ..config.clone() });
    let work = Work {
        step: Step::Training,
        config: &config_of_attempt,
        plan: Some(plan),
        parallelism: config.parallelism,
    };
    let (attempt, termination) = match attempt::reconcile(input, status, &work) {
        AttemptState::Ended(attempt, termination) => (attempt, termination),
        AttemptState::Other(state) => return state,
    };
    let run = Run { input, plan, config: &config };
    match termination {
        Termination::Exited { code, message } => run.exited(status, attempt, code, &message),
        Termination::OutOfMemory(who) => run.oom_killed(attempt, &who),
        Termination::Disrupted(why) => retry::after_disruption(input, attempt, &why),
    }
}

/// Returns whether what a run that has trained misses may come back: its keys are being rotated, and the
/// next pod has the new ones.
fn is_outage(reason: FailureReason, status: &FineTuneJobStatus) -> bool {
    reason == FailureReason::PermissionDenied && has_trained(status)
}

/// The plan cannot be read: nothing is started and nothing ended, until a release that can read it is
/// back. A rollback must not end the runs that were planned before it.
fn held(input: &Input<'_>, status: &FineTuneJobStatus, error: &str) -> InProgress {
    let message = format!(
        "the plan in status.plan was made by another release: {error}. What runs, runs on; install that release again, or create the job again"
    );
    let attempt = attempt::current(status, Step::Training);
    let mut held = InProgress::new(attempt, Reason::PlanUnreadable, message);
    let live =
        input.observed.job_of(&held.attempt).filter(|job| job.ended.is_none() && !job.is_deleting);
    if let Some(job) = live.filter(|_| input.is_suspended()) {
        held.actions.push(Action::delete_job(job));
    }
    held
}

/// The planned run of which an attempt ended.
struct Run<'a> {
    input: &'a Input<'a>,
    plan: &'a PlanStatus,
    config: &'a RunConfig,
}

impl Run<'_> {
    fn exited(
        &self,
        status: &FineTuneJobStatus,
        attempt: AttemptStatus,
        code: i32,
        message: &str,
    ) -> State {
        match finetune_contract::parse::<RunReport>(message) {
            Ok(report) => match self.check_origin(&attempt, &report) {
                Ok(()) => self.take_report(status, attempt, &report),
                Err(why) => retry::with_foreign_report(self.input, attempt, code, &why),
            },
            Err(_) if ExitCode::from_code(code) == Some(ExitCode::OutOfMemory) => {
                self.adapt(attempt, "the trainer ran out of memory", self.tensor_limit())
            }
            Err(error) => {
                retry::without_report(self.input, attempt, code, message, &error.to_string())
            }
        }
    }

    /// Checks that a report is of this run and attempt, and that its result is where it was planned:
    /// a pod may say anything.
    fn check_origin(&self, attempt: &AttemptStatus, report: &RunReport) -> Result<(), String> {
        let (run, number) = (&self.config.run_id.0, attempt.number);
        if report.run_id.0 != *run || i64::from(report.attempt) != i64::from(number) {
            return Err(format!(
                "it is of attempt {} of the run {:?}, not of attempt {number} of {run:?}",
                report.attempt, report.run_id.0
            ));
        }
        let output = self.config.output.uri.to_string();
        match &report.outcome {
            Outcome::Succeeded { uri, .. } | Outcome::AlreadyPublished { uri, .. }
                if *uri != output =>
            {
                Err(format!("it says that {uri} was published, and {output} was planned"))
            }
            _ => Ok(()),
        }
    }

    fn take_report(
        &self,
        status: &FineTuneJobStatus,
        attempt: AttemptStatus,
        report: &RunReport,
    ) -> State {
        match &report.outcome {
            Outcome::Succeeded { kind, uri, manifest_sha256, .. } => {
                let message = self.success_message(report, kind.as_str(), uri);
                let result = result_status(report, *kind, uri, manifest_sha256);
                let progress = status.progress.clone();
                let end = Finished::succeeded(Reason::Succeeded, Reason::Proven, message, result);
                let progress = progress.map(|progress| last_progress(progress, report));
                State::Finished(Finished { progress, ..end }.of(attempt))
            }
            Outcome::AlreadyPublished { kind, uri, manifest_sha256, by } => {
                let result = result_status(report, *kind, uri, manifest_sha256);
                // The losses are another run's.
                let result = ResultStatus { eval_loss: None, ..result };
                let reason = Reason::AlreadyPublished;
                let message = nothing_trained(uri, by);
                State::Finished(Finished::succeeded(reason, reason, message, result).of(attempt))
            }
            Outcome::Interrupted { checkpoint_step } => {
                let why = format!("the trainer was told to stop and saved step {checkpoint_step}");
                retry::after_disruption(self.input, attempt, &why)
            }
            Outcome::Failed { reason, message }
                if reason.exit_code().is_retryable() || is_outage(*reason, status) =>
            {
                retry::after_failure(self.input, attempt, Reason::from(*reason), message)
            }
            Outcome::Failed { reason: FailureReason::OutOfMemory, message } => {
                self.adapt(attempt, message, self.tensor_limit())
            }
            Outcome::Failed { reason, message } => {
                let reason = Reason::from(*reason);
                State::Finished(Finished::failed(reason, message).of(attempt))
            }
        }
    }

    fn success_message(&self, report: &RunReport, kind: &str, uri: &str) -> String {
        let early = report.stopped_early.map_or(String::new(), |cause| {
            let total = self.config.training.total_steps;
            format!("; stopped by {} after {} of {total} steps", cause.field(), report.steps)
        });
        let left_out = report.rows_left_out.map_or(String::new(), |rows| {
            format!("; {rows} training rows could not be used and were left out")
        });
        format!("{kind} at {uri}, read back and verified{early}{left_out}")
    }

    /// A rank was OOM-killed at the memory limit of its pod.
    fn oom_killed(&self, attempt: AttemptStatus, who: &str) -> State {
        let limit = build::memory_limit(self.input.job, &pod_size(&self.plan.pod));
        let why = format!("{who} was OOM-killed at its memory limit ({})", units::bytes(limit));
        if self.has_device() {
            // The tensors are on the device: a smaller micro-batch changes nothing here.
            let message = format!("{why}: set resources.limits.memory");
            return State::Finished(Finished::failed(Reason::OutOfMemory, message).of(attempt));
        }
        self.adapt(attempt, &why, limit)
    }

    /// Takes the plan's next fallback, and resumes from the newest checkpoint. It costs neither a
    /// failure nor a disruption: there are finitely many fallbacks.
    fn adapt(&self, attempt: AttemptStatus, why: &str, limit: u64) -> State {
        let adapted = match fallbacks::adapt(self.config, &self.plan.fallbacks, Some(limit)) {
            Ok(adapted) if !is_last(&attempt) => adapted,
            Ok(_) => {
                return State::Finished(Finished::failed(Reason::OutOfMemory, why).of(attempt));
            }
            Err(nothing_left) => {
                let advice = if self.has_device() {
                    "list an accelerator with more memory in the operator's settings"
                } else {
                    "set resources.limits.memory"
                };
                let message =
                    format!("{why}, and {nothing_left}. Lower training.contextLength, or {advice}");
                return State::Finished(Finished::failed(Reason::OutOfMemory, message).of(attempt));
            }
        };
        let next = next_attempt(attempt, self.input.now + DISRUPTION_BACKOFF);
        let Adapted { config, left, change } = adapted;
        let message = format!("from attempt {} on: {change}, because {why}", next.number);
        let plan = adapted_plan(self.plan, &config, left, &message);
        State::Retry(Retry {
            attempt: next,
            reason: Reason::Adapted,
            message,
            adapted_plan: Some(plan),
        })
    }

    fn has_device(&self) -> bool {
        self.accelerator().is_some_and(Accelerator::is_device)
    }

    /// Returns the size of the memory that tensors are in.
    fn tensor_limit(&self) -> u64 {
        match self.accelerator() {
            Some(accelerator) if accelerator.is_device() => accelerator.memory_bytes(),
            _ => build::memory_limit(self.input.job, &pod_size(&self.plan.pod)),
        }
    }

    fn accelerator(&self) -> Option<&Accelerator> {
        self.input.settings.accelerator(&self.plan.accelerator)
    }
}
