//! Decides what happens next to a job, from what is seen of it. Pure: no I/O, no clock.
//!
//! The whole of what is remembered is the job's status. Whoever reads a job, its children and the
//! settings comes to the same decision, whatever happened before; killing the operator at any line
//! loses nothing.

use std::time::Duration;

use finetune_contract::{
    ExitCode, FailureReason, Outcome, Parallelism, PreflightReport, Progress, Reason, RunConfig,
    RunReport, Stage,
};
use k8s_openapi::{
    api::{batch::v1::Job, core::v1::Service, networking::v1::NetworkPolicy},
    apimachinery::pkg::apis::meta::v1::Time,
    jiff::{SignedDuration, Timestamp},
};

use super::{
    build::{self, Attempt, QUEUE_LABEL, job_name},
    conditions::{self, Kind, Truth},
    observe::{Observed, ObservedJob, ObservedPod, PodState},
    settings::Settings,
};
use crate::{
    api::{
        Approval, AttemptStatus, FineTuneJob, FineTuneJobStatus, OUTPUT, PlanStatus, PodStatus,
        ProgressStatus, ResultStatus, Step,
    },
    plan::{
        RunPlan,
        accelerators::Accelerator,
        fallbacks::{self, Adapted},
        nothing_trained,
        placement::{self, Placement, PodSize, Unplaced},
        render, settings as wishes,
    },
};

/// How often a running trainer is asked for its progress, at most.
pub const PROGRESS_INTERVAL: Duration = Duration::from_secs(15);
/// How soon a job is looked at again though nothing was heard of it.
const SAFETY_INTERVAL: Duration = Duration::from_mins(5);
/// The first wait after a failure; it doubles.
const FIRST_WAIT: SignedDuration = SignedDuration::from_secs(10);
/// The longest wait after a failure.
const LONGEST_WAIT: SignedDuration = SignedDuration::from_mins(5);
/// The wait after a disruption.
const DISRUPTION_WAIT: SignedDuration = SignedDuration::from_secs(2);
/// The most tries of a step: the number is three digits of the Job's name.
const MOST_TRIES: i32 = 1000;
/// How long ranks have to end by themselves after another has failed: they notice in seconds, half a
/// minute if it fell silent, but wait for minutes for one that has not come yet.
const RANKS_GRACE: SignedDuration = SignedDuration::from_secs(60);

/// The longest summary of a plan; the CRD allows a little more.
const SUMMARY_LIMIT: usize = 16_000;

const QUEUED: &str = "the queue decides when the pod starts";

/// What is to be done.
#[derive(Debug, Clone, PartialEq)]
pub struct Decision {
    /// What the job's status shall be; written first.
    pub status: FineTuneJobStatus,
    /// What else, in this order.
    pub actions: Vec<Action>,
    /// What people are told.
    pub notes: Vec<Note>,
    /// When to look again at the latest; none if only a change can matter.
    pub look_again: Option<Duration>,
}

/// One change in the cluster.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Action {
    CreateService(Box<Service>),
    CreateNetworkPolicy(Box<NetworkPolicy>),
    CreateJob(Box<Job>),
    DeleteJob { name: String, uid: String },
    DeletePod { name: String, uid: String },
    DeleteSelf,
}

/// One event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// Whether something went wrong.
    pub is_warning: bool,
    /// Why, as the condition has it.
    pub reason: Reason,
    /// For people.
    pub message: String,
}

/// How a try ended.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Ending {
    /// The program ended with a status, and perhaps a report.
    Exited { code: i32, message: String },
    /// The kernel ended it, or the rank that is named, for want of memory.
    OutOfMemory(String),
    /// The cluster ended it, or it is gone without a trace.
    Disrupted(String),
}

/// Decides.
pub fn decide(
    job: &FineTuneJob,
    observed: &Observed,
    settings: &Settings,
    now: Timestamp,
) -> Decision {
    let mut visit = Visit::new(job, observed, settings, now);
    if conditions::is_finished(&visit.decision.status) {
        visit.after_the_end();
    } else if visit.is_overdue() {
        let seconds = job.spec.active_deadline_seconds.unwrap_or_default();
        visit.finish(
            Truth::False,
            Reason::DeadlineExceeded,
            &format!("the run took longer than activeDeadlineSeconds: {seconds}; its last checkpoint stays"),
        );
    } else if let Some(problem) = unreachable_uri(job)
        .or_else(|| overlapping_output(job))
        .or_else(|| wishes::unusable_names(job))
    {
        visit.set(Kind::Accepted, Truth::False, Reason::InvalidSpec, &problem);
        visit.finish(Truth::False, Reason::InvalidSpec, &problem);
    } else {
        visit.go_on();
    }
    visit.decision
}

/// Returns what is wrong with a `file://` URI, which means nothing in a cluster.
fn unreachable_uri(job: &FineTuneJob) -> Option<String> {
    let (path, uri) = job.spec.uris().find(|(_, uri)| uri.starts_with("file://"))?;
    Some(format!(
        "{path} is {uri:?}: a pod does not see files of your machine; use s3://, gs://, az://, hf:// or pvc://, or run it here with `finetune run`"
    ))
}

/// Returns how the output touches what the run reads; a run that has its plan was checked before.
fn overlapping_output(job: &FineTuneJob) -> Option<String> {
    if job.status.as_ref().is_some_and(|status| status.plan.is_some()) {
        return None;
    }
    let messages = job.spec.overlaps();
    (!messages.is_empty()).then(|| format!("{OUTPUT}: {}", messages.join("\n")))
}

struct Visit<'a> {
    job: &'a FineTuneJob,
    observed: &'a Observed,
    settings: &'a Settings,
    now: Timestamp,
    decision: Decision,
}

impl<'a> Visit<'a> {
    fn new(
        job: &'a FineTuneJob,
        observed: &'a Observed,
        settings: &'a Settings,
        now: Timestamp,
    ) -> Self {
        let mut status = job.status.clone().unwrap_or_default();
        status.observed_generation = job.metadata.generation;
        conditions::complete(&mut status, now);
        let decision = Decision {
            status,
            actions: Vec::new(),
            notes: Vec::new(),
            look_again: Some(SAFETY_INTERVAL),
        };
        Self { job, observed, settings, now, decision }
    }

    fn set(&mut self, kind: Kind, truth: Truth, reason: Reason, message: &str) {
        conditions::set(&mut self.decision.status, self.now, kind, truth, reason, message);
    }

    /// Says that the preflight found nothing in the way.
    fn accept(&mut self) {
        let message = "model, dataset and output can be used";
        self.set(Kind::Accepted, Truth::True, Reason::PreflightPassed, message);
    }

    /// Says where the run is.
    fn say(&mut self, reason: Reason, message: &str) {
        self.set(Kind::Succeeded, Truth::Unknown, reason, message);
    }

    fn note(&mut self, is_warning: bool, reason: Reason, message: impl Into<String>) {
        let message = message.into();
        self.decision.notes.push(Note { is_warning, reason, message });
    }

    fn look_again_in(&mut self, wait: Duration) {
        let soonest = self.decision.look_again.map_or(wait, |other| other.min(wait));
        self.decision.look_again = Some(soonest);
    }

    fn look_again_at(&mut self, time: Timestamp) {
        let wait = self.now.duration_until(time);
        self.look_again_in(Duration::try_from(wait).unwrap_or_default());
    }

    fn is_suspended(&self) -> bool {
        self.job.spec.suspend == Some(true)
    }

    fn name(&self) -> &'a str {
        self.job.metadata.name.as_deref().unwrap_or_default()
    }

    fn is_overdue(&mut self) -> bool {
        let start = self.decision.status.start_time.clone();
        let (Some(seconds), Some(start)) = (self.job.spec.active_deadline_seconds, start) else {
            return false;
        };
        let end = start.0 + SignedDuration::from_secs(seconds);
        if self.now < end {
            self.look_again_at(end);
        }
        self.now >= end
    }

    /// Ends the run for good.
    fn finish(&mut self, truth: Truth, reason: Reason, message: &str) {
        self.set(Kind::Succeeded, truth, reason, message);
        self.decision.status.completion_time = Some(Time(self.now));
        if let Some(progress) = &mut self.decision.status.progress {
            progress.eta = None;
            progress.eta_seconds = None;
        }
        self.note(truth != Truth::True, reason, message);
        self.after_the_end();
    }

    /// Leaves nothing running, and deletes the job when its time has come.
    fn after_the_end(&mut self) {
        self.stop_all();
        self.decision.look_again = None;
        let status = &self.decision.status;
        let (Some(ttl), Some(end)) =
            (self.job.spec.ttl_seconds_after_finished, status.completion_time.clone())
        else {
            return;
        };
        let due = end.0 + SignedDuration::from_secs(ttl);
        if self.now >= due {
            self.decision.actions.push(Action::DeleteSelf);
        } else {
            self.look_again_at(due);
        }
    }

    /// Deletes every Job that has not ended, and pods without one.
    fn stop_all(&mut self) {
        let live = self.observed.jobs.iter().filter(|job| job.ended.is_none() && !job.is_deleting);
        let jobs =
            live.map(|job| Action::DeleteJob { name: job.name.clone(), uid: job.uid.clone() });
        let actions: Vec<Action> = jobs.chain(self.stray_deletions()).collect();
        self.decision.actions.extend(actions);
    }

    fn stray_deletions(&self) -> Vec<Action> {
        self.observed
            .strays()
            .filter(|pod| !pod.is_deleting)
            .map(|pod| Action::DeletePod { name: pod.name.clone(), uid: pod.uid.clone() })
            .collect()
    }

    /// Takes the run one step further.
    fn go_on(&mut self) {
        if !self.is_suspended() {
            self.set(
                Kind::Suspended,
                Truth::False,
                Reason::NotSuspended,
                "spec.suspend is not set",
            );
        }
        if self.decision.status.plan.is_none() {
            self.preflight();
        }
        if let Some(plan) = self.decision.status.plan.clone()
            && !conditions::is_finished(&self.decision.status)
        {
            self.training(&plan);
        }
    }

    fn preflight(&mut self) {
        let job = self.job;
        let config = || finetune_contract::render(&wishes::preflight_config(job, false));
        let Some(ending) = self.pursue(Step::Preflight, &config, None) else { return };
        let (code, message) = match ending {
            Ending::Exited { code, message } => (code, message),
            Ending::OutOfMemory(_) => {
                return self.finish(
                    Truth::False,
                    Reason::OutOfMemory,
                    "the preflight's pod has too little memory for this dataset: an administrator must raise preflight.memoryGiB of the operator's settings",
                );
            }
            Ending::Disrupted(why) => return self.try_again_after_disruption(&why),
        };
        let report = match finetune_contract::parse::<PreflightReport>(&message) {
            Ok(report) => report,
            Err(error) => return self.without_report(code, &message, &error.to_string()),
        };
        let retryable =
            |problem: &finetune_contract::Problem| problem.reason.exit_code().is_retryable();
        if !report.problems.is_empty() && report.problems.iter().all(retryable) {
            return self.try_again_after_failure(Reason::StoreUnavailable, &listed(&report));
        }
        match placement::place(self.job, &report, &self.settings.accelerators) {
            Ok(placement) => {
                self.take_plan(&placement);
                self.finish_if_published(&placement.plan);
            }
            Err(unplaced) => self.refuse(&unplaced, &report),
        }
    }

    fn take_plan(&mut self, placement: &Placement) {
        let Placement { plan, accelerator, pod } = placement;
        let parallelism = plan.run_config.parallelism;
        let ranks = parallelism.world_size;
        let place = match (parallelism.places(), parallelism.local_world_size) {
            (1, 1) => format!("On {accelerator}:"),
            (1, all) => format!("On one pod with {all} {accelerator}:"),
            (pods, 1) => format!("On {pods} pods of {accelerator}, each"),
            (pods, some) => format!("On {pods} pods with {some} {accelerator} each, a pod"),
        };
        let summary = format!("{place} {}\n\n{}", placement::describe(pod), render::text(plan));
        let bytes = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
        let method = if plan.run_config.lora.is_some() { "LoRA" } else { "Full" };
        self.decision.status.plan = Some(PlanStatus {
            run_id: plan.run_config.run_id.0.clone(),
            method: method.to_owned(),
            accelerator: accelerator.clone(),
            summary: summary[..summary.floor_char_boundary(SUMMARY_LIMIT)].to_owned(),
            predicted_peak_bytes: bytes(plan.memory.total()),
            estimated_seconds: plan.seconds.map(|seconds| seconds.ceil() as i64),
            pod: PodStatus {
                cpu_millis: pod.cpu_millis,
                memory_bytes: bytes(pod.memory_bytes),
                shared_memory_bytes: bytes(pod.shared_memory_bytes),
                storage_bytes: bytes(pod.storage_bytes),
            },
            run_config: finetune_contract::render(&plan.run_config),
            fallbacks: plan.fallbacks.clone(),
        });
        self.decision.status.attempt = Some(first_try(Step::Training));
        self.accept();
        let time = plan
            .seconds
            .map_or(String::new(), |seconds| format!(", about {}", render::duration(seconds)));
        let place = if ranks > 1 {
            format!("over {ranks} ranks, each on one {accelerator} with")
        } else {
            format!("on one {accelerator},")
        };
        let message = format!(
            "{method} {place} {}{time}; see status.plan.summary",
            render::bytes(plan.memory.total())
        );
        self.set(Kind::Planned, Truth::True, Reason::Planned, &message);
        self.note(false, Reason::Planned, message);
    }

    /// Ends a run of inputs that were published before; no pod trains them again.
    fn finish_if_published(&mut self, plan: &RunPlan) {
        let (Some(found), Some(message)) = (&plan.already_published, plan.nothing_to_train())
        else {
            return;
        };
        self.already_published(
            ResultStatus {
                uri: plan.run_config.output.uri.clone(),
                kind: found.kind.as_str().to_owned(),
                manifest_sha256: found.manifest_sha256.clone(),
                eval_loss: None,
                steps: i64::try_from(found.step).unwrap_or(i64::MAX),
                measured_peak_bytes: 0,
            },
            &message,
        );
    }

    fn already_published(&mut self, result: ResultStatus, message: &str) {
        self.decision.status.result = Some(result);
        self.set(Kind::Published, Truth::True, Reason::AlreadyPublished, message);
        self.finish(Truth::True, Reason::AlreadyPublished, message);
    }

    fn refuse(&mut self, unplaced: &Unplaced, report: &PreflightReport) {
        let hidden = report.problems_total.saturating_sub(report.problems.len() as u64);
        let more = if hidden > 0 { format!("\nand {hidden} more") } else { String::new() };
        let message = format!("{unplaced}{more}");
        match unplaced {
            Unplaced::Problems(_) => {
                let reason = unplaced.reason().map_or(Reason::InvalidSpec, Reason::from);
                self.set(Kind::Accepted, Truth::False, reason, &message);
                self.finish(Truth::False, reason, &message);
            }
            Unplaced::TooLarge(_) => {
                self.accept();
                self.set(Kind::Planned, Truth::False, Reason::NoAcceleratorFits, &message);
                self.finish(Truth::False, Reason::NoAcceleratorFits, &message);
            }
            Unplaced::NoTrainer { .. } => {
                // Held, not failed: it can be planned once the settings have changed.
                self.accept();
                self.set(Kind::Planned, Truth::False, Reason::TrainerImageMissing, &message);
                self.say(Reason::TrainerImageMissing, &message);
            }
        }
    }

    fn training(&mut self, plan: &PlanStatus) {
        let config = match finetune_contract::parse::<RunConfig>(&plan.run_config) {
            Ok(config) => config,
            Err(error) => {
                return self.finish(
                    Truth::False,
                    Reason::PlanUnreadable,
                    &format!("the plan in status.plan was made by another release: {error}; create the job again"),
                );
            }
        };
        let number = self.attempt(Step::Training).number;
        let parallelism = config.parallelism;
        let told = || {
            let attempt = number.unsigned_abs();
            finetune_contract::render(&RunConfig { attempt, ..config.clone() })
        };
        let Some(ending) = self.pursue(Step::Training, &told, Some((plan, parallelism))) else {
            return;
        };
        let (code, message) = match ending {
            Ending::Exited { code, message } => (code, message),
            Ending::OutOfMemory(who) => return self.out_of_memory(&who, plan, &config),
            Ending::Disrupted(why) => return self.try_again_after_disruption(&why),
        };
        let report = match finetune_contract::parse::<RunReport>(&message) {
            Ok(report) => report,
            Err(_) if ExitCode::from_code(code) == Some(ExitCode::OutOfMemory) => {
                let why = "the trainer found too little memory";
                return self.adapt(why, plan, &config, self.tensor_limit(plan));
            }
            Err(error) => return self.without_report(code, &message, &error.to_string()),
        };
        self.take_report(&report, plan, &config);
    }

    fn take_report(&mut self, report: &RunReport, plan: &PlanStatus, config: &RunConfig) {
        match &report.outcome {
            Outcome::Succeeded { kind, uri, manifest_sha256, .. } => {
                self.decision.status.result = Some(ResultStatus {
                    uri: uri.clone(),
                    kind: kind.as_str().to_owned(),
                    manifest_sha256: manifest_sha256.clone(),
                    eval_loss: report.eval_loss.map(|[_, after]| rounded(after)),
                    steps: i64::try_from(report.steps).unwrap_or(i64::MAX),
                    measured_peak_bytes: i64::try_from(report.measured_peak_bytes)
                        .unwrap_or(i64::MAX),
                });
                if let Some(progress) = &mut self.decision.status.progress {
                    progress.step = i64::try_from(report.steps).unwrap_or(i64::MAX);
                    progress.loss = report.train_loss.map(|[_, last]| last).or(progress.loss);
                    progress.eval_loss =
                        report.eval_loss.map(|[_, after]| after).or(progress.eval_loss);
                }
                let early = report.stopped_early.map_or(String::new(), |cause| {
                    let total = config.training.total_steps;
                    format!("; ended by {} after {} of {total} steps", cause.field(), report.steps)
                });
                let left_out = report.rows_left_out.map_or(String::new(), |rows| {
                    format!("; {rows} training rows could not be used and were left out")
                });
                let kind = kind.as_str();
                let message = format!("{kind} at {uri}, read back and proven{early}{left_out}");
                self.set(Kind::Published, Truth::True, Reason::Proven, &message);
                self.finish(Truth::True, Reason::Succeeded, &message);
            }
            Outcome::AlreadyPublished { kind, uri, manifest_sha256, by } => {
                let result = ResultStatus {
                    uri: uri.clone(),
                    kind: kind.as_str().to_owned(),
                    manifest_sha256: manifest_sha256.clone(),
                    eval_loss: None,
                    steps: i64::try_from(report.steps).unwrap_or(i64::MAX),
                    measured_peak_bytes: i64::try_from(report.measured_peak_bytes)
                        .unwrap_or(i64::MAX),
                };
                self.already_published(result, &nothing_trained(uri, by));
            }
            Outcome::Interrupted { checkpoint_step } => self.try_again_after_disruption(&format!(
                "the trainer was told to stop and saved step {checkpoint_step}"
            )),
            Outcome::Failed { reason, message } => {
                let word = Reason::from(*reason);
                if reason.exit_code().is_retryable() {
                    self.try_again_after_failure(word, message);
                } else if *reason == FailureReason::OutOfMemory {
                    self.adapt(message, plan, config, self.tensor_limit(plan));
                } else {
                    self.finish(Truth::False, word, message);
                }
            }
        }
    }

    /// The kernel ended a rank at the limit of its pod's memory.
    fn out_of_memory(&mut self, who: &str, plan: &PlanStatus, config: &RunConfig) {
        let limit = build::memory_limit(self.job, &pod_size(&plan.pod));
        let why = format!("the kernel ended {who} at its limit of {}", render::bytes(limit));
        if self.has_device(plan) {
            // The tensors are elsewhere: a smaller micro-batch changes nothing here.
            let message = format!("{why}: set resources.limits.memory");
            return self.finish(Truth::False, Reason::OutOfMemory, &message);
        }
        self.adapt(&why, plan, config, limit);
    }

    fn has_device(&self, plan: &PlanStatus) -> bool {
        let accelerator = self.settings.accelerator(&plan.accelerator);
        accelerator.is_some_and(Accelerator::is_device)
    }

    /// Returns the memory that tensors are in.
    fn tensor_limit(&self, plan: &PlanStatus) -> u64 {
        match self.settings.accelerator(&plan.accelerator) {
            Some(accelerator) if accelerator.is_device() => accelerator.memory_bytes(),
            _ => build::memory_limit(self.job, &pod_size(&plan.pod)),
        }
    }

    /// Takes the plan's next way to need less memory, and goes on from the newest checkpoint. It costs
    /// neither a failure nor a disruption: the ways are finitely many.
    fn adapt(&mut self, why: &str, plan: &PlanStatus, config: &RunConfig, limit: u64) {
        let Some(attempt) = self.decision.status.attempt.clone() else { return };
        let adapted = match fallbacks::adapt(config, &plan.fallbacks, Some(limit)) {
            Ok(adapted) if !is_last(&attempt) => adapted,
            Ok(_) => return self.finish(Truth::False, Reason::OutOfMemory, why),
            Err(nothing_left) => {
                let advice = if self.has_device(plan) {
                    "list an accelerator with more memory in the operator's settings"
                } else {
                    "set resources.limits.memory"
                };
                let message =
                    format!("{why}, and {nothing_left}. Lower training.contextLength, or {advice}");
                return self.finish(Truth::False, Reason::OutOfMemory, &message);
            }
        };
        let Adapted { config, left, change } = adapted;
        let next = next_try(attempt, self.now + DISRUPTION_WAIT);
        let message = format!("from try {} on: {change}, because {why}", next.number + 1);
        let said = format!("\nAdapted\n  {message}\n");
        let kept = plan.summary.floor_char_boundary(SUMMARY_LIMIT.saturating_sub(said.len()));
        self.decision.status.plan = Some(PlanStatus {
            summary: format!("{}{said}", &plan.summary[..kept]),
            predicted_peak_bytes: i64::try_from(config.predicted_peak_bytes).unwrap_or(i64::MAX),
            run_config: finetune_contract::render(&config),
            fallbacks: left,
            ..plan.clone()
        });
        self.set(Kind::Planned, Truth::True, Reason::Adapted, &message);
        self.wait_for(next, Reason::Adapted, &message);
    }

    /// The program ended, and what it left is no report.
    fn without_report(&mut self, code: i32, message: &str, error: &str) {
        let left =
            if message.trim().is_empty() { "no report".to_owned() } else { error.to_owned() };
        let what = format!("the trainer ended with status {code} and left {left}");
        match ExitCode::from_code(code) {
            Some(ExitCode::Interrupted) => self.try_again_after_disruption(&what),
            // A report that cannot be read, or a refusal of its own input: the same again.
            Some(exit) if !exit.is_retryable() => {
                let hint = "are the operator and the trainer's image of the same release?";
                self.finish(Truth::False, Reason::TrainerFailed, &format!("{what}: {hint}"));
            }
            // Killed, crashed, or a store that did not answer.
            _ => self.try_again_after_failure(Reason::TrainerFailed, &what),
        }
    }

    fn attempt(&self, step: Step) -> AttemptStatus {
        self.decision
            .status
            .attempt
            .clone()
            .filter(|attempt| attempt.step == step)
            .unwrap_or_else(|| first_try(step))
    }

    fn try_again_after_disruption(&mut self, why: &str) {
        let Some(attempt) = self.decision.status.attempt.clone() else { return };
        let disruptions = attempt.disruptions + 1;
        if disruptions > self.settings.disruptions || is_last(&attempt) {
            return self.finish(
                Truth::False,
                Reason::TooManyDisruptions,
                &format!("the cluster ended {disruptions} tries, the last one: {why}"),
            );
        }
        let next = AttemptStatus { disruptions, ..next_try(attempt, self.now + DISRUPTION_WAIT) };
        self.wait_for_retry(next, why);
    }

    fn try_again_after_failure(&mut self, reason: Reason, why: &str) {
        let Some(attempt) = self.decision.status.attempt.clone() else { return };
        let failures = attempt.failures + 1;
        if failures > self.settings.retries || is_last(&attempt) {
            return self.finish(
                Truth::False,
                reason,
                &format!("{why}\nThis was try {failures} of {failures}."),
            );
        }
        let doublings = u32::try_from(failures - 1).unwrap_or(0).min(16);
        let wait = (FIRST_WAIT * 2_i32.saturating_pow(doublings)).min(LONGEST_WAIT);
        let next = AttemptStatus { failures, ..next_try(attempt, self.now + wait) };
        self.wait_for_retry(next, why);
    }

    fn wait_for_retry(&mut self, next: AttemptStatus, why: &str) {
        let message = format!("try {} follows, because: {why}", next.number + 1);
        self.wait_for(next, Reason::Retrying, &message);
    }

    fn wait_for(&mut self, next: AttemptStatus, reason: Reason, message: &str) {
        if let Some(time) = &next.retry_time {
            self.look_again_at(time.0);
        }
        self.say(reason, message);
        self.note(true, reason, message);
        self.decision.status.attempt = Some(next);
    }

    /// Sees to it that the current try of a step runs; returns how it ended once it has.
    fn pursue(
        &mut self,
        step: Step,
        config: &dyn Fn() -> String,
        plan: Option<(&PlanStatus, Parallelism)>,
    ) -> Option<Ending> {
        let attempt = self.attempt(step);
        self.decision.status.attempt = Some(attempt.clone());
        let name = job_name(self.name(), step, attempt.number);
        let Some(job) = self.observed.job(&name) else {
            return self.without_job(step, &attempt, config, plan);
        };
        if let Some(attempt) = &mut self.decision.status.attempt {
            attempt.job_uid = Some(job.uid.clone());
        }
        let pods = self.observed.pods_of(job);
        if job.is_deleting {
            self.say(Reason::Stopping, "the pods of this try are ending");
            return None;
        }
        if let Some(is_success) = job.ended {
            return Some(ending(&pods, is_success));
        }
        if self.is_suspended() {
            self.decision
                .actions
                .push(Action::DeleteJob { name: job.name.clone(), uid: job.uid.clone() });
            self.say(
                Reason::Stopping,
                "spec.suspend is set: the pods of this try save a checkpoint and end",
            );
            return None;
        }
        self.watch(step, job, &pods);
        None
    }

    /// There is no Job: it is to be made, or somebody deleted it.
    fn without_job(
        &mut self,
        step: Step,
        attempt: &AttemptStatus,
        config: &dyn Fn() -> String,
        plan: Option<(&PlanStatus, Parallelism)>,
    ) -> Option<Ending> {
        if attempt.job_uid.is_some() {
            if !self.is_suspended() {
                return Some(Ending::Disrupted("its Job was deleted".to_owned()));
            }
            let retry_time = None;
            self.decision.status.attempt =
                Some(AttemptStatus { retry_time, ..next_try(attempt.clone(), self.now) });
        }
        if self.is_suspended() {
            let message = "spec.suspend is set; set it to false to go on from the last checkpoint";
            self.set(Kind::Suspended, Truth::True, Reason::Suspended, message);
            self.say(Reason::Suspended, message);
            return None;
        }
        // A pod without a Job would work on the same run.
        let strays = self.observed.strays().count();
        if strays > 0 {
            let deletions = self.stray_deletions();
            self.decision.actions.extend(deletions);
            self.say(Reason::Stopping, &format!("{strays} pods of an earlier try are ending"));
            return None;
        }
        if let Some(time) = attempt.retry_time.as_ref().filter(|time| time.0 > self.now) {
            self.look_again_at(time.0);
            return None;
        }
        if step == Step::Training && self.job.spec.approval == Some(Approval::Manual) {
            let message = "read status.plan.summary, then set spec.approval to Auto";
            self.say(Reason::AwaitingApproval, message);
            return None;
        }
        self.start(step, attempt.number, config, plan);
        None
    }

    fn start(
        &mut self,
        step: Step,
        number: i32,
        config: &dyn Fn() -> String,
        plan: Option<(&PlanStatus, Parallelism)>,
    ) {
        let parallelism = plan.map_or(Parallelism::SINGLE, |(_, parallelism)| parallelism);
        let place = match plan {
            None => None,
            Some((plan, _)) => {
                let Some(accelerator) = self.settings.accelerator(&plan.accelerator) else {
                    let message = format!(
                        "the operator's settings no longer list the accelerator {:?} of the plan: an administrator must add it again, or create the job again",
                        plan.accelerator
                    );
                    return self.say(Reason::AcceleratorMissing, &message);
                };
                if !accelerator.has_trainer() {
                    let message = format!(
                        "the operator's settings no longer name a trainer for the accelerator {:?} of the plan: an administrator must set its `image` again",
                        plan.accelerator
                    );
                    return self.say(Reason::TrainerImageMissing, &message);
                }
                Some((accelerator, pod_size(&plan.pod)))
            }
        };
        let attempt = Attempt { step, number, config: &config(), place, parallelism };
        if parallelism.places() > 1 {
            let namespace = self.job.metadata.namespace.as_ref();
            if self.settings.confined_namespaces.iter().any(|name| Some(name) == namespace) {
                let policy = Box::new(build::ranks_policy(self.job));
                self.decision.actions.push(Action::CreateNetworkPolicy(policy));
            }
            let service = Box::new(build::ranks_service(self.job));
            self.decision.actions.push(Action::CreateService(service));
        }
        let job = build::job(self.job, self.settings, &attempt);
        self.decision.actions.push(Action::CreateJob(Box::new(job)));
        let labels = self.job.metadata.labels.as_ref();
        if let Some(refusal) = &self.observed.refusal {
            self.say(Reason::JobRefused, refusal);
        } else if step == Step::Training
            && labels.is_some_and(|labels| labels.contains_key(QUEUE_LABEL))
        {
            self.say(Reason::Queued, QUEUED);
        } else {
            self.say_started(step);
        }
        if step == Step::Training && self.decision.status.start_time.is_none() {
            self.decision.status.start_time = Some(Time(self.now));
        }
    }

    /// The Job is there and has not ended: say how it is. Ordinary states of a starting or ending pod
    /// share one message, for each message is a write.
    fn watch(&mut self, step: Step, job: &ObservedJob, pods: &[Option<&ObservedPod>]) {
        if job.is_suspended {
            return self.say(Reason::Queued, QUEUED);
        }
        if self.end_what_waits(job, pods) {
            return;
        }
        // The run is where its slowest rank is: the others wait for that one.
        let slowest = pods.iter().enumerate().min_by_key(|(_, pod)| readiness(**pod));
        let Some((rank, pod)) = slowest.map(|(rank, pod)| (rank, *pod)) else { return };
        let has_node = |pod: &&ObservedPod| pod.scheduled.is_some();
        let who = match pods {
            [_] => String::new(),
            // Which of several finds no room left when all are placed together is chance.
            _ if !pods.iter().flatten().any(has_node) => {
                format!("none of {} pods has a node yet, and the run needs them all: ", pods.len())
            }
            _ => format!("pod {rank} of {}, for which the others wait: ", pods.len()),
        };
        match pod.map(|pod| &pod.state) {
            None => self.say_started(step),
            Some(PodState::Unschedulable(message)) => {
                self.say(Reason::Unschedulable, &format!("{who}{message}"));
            }
            Some(PodState::Waiting { reason, message }) => {
                let scheduled = pod.and_then(|pod| pod.scheduled);
                self.wait_for_start(step, scheduled, reason, &format!("{who}{message}"));
            }
            Some(PodState::Running) if step == Step::Preflight => self.say_started(step),
            Some(PodState::Running) => self.take_progress(),
            // The Job will say so in a moment.
            Some(PodState::Ended { .. }) => {}
        }
    }

    /// Ends the ranks that wait for one that will not come any more; tells whether it did.
    fn end_what_waits(&mut self, job: &ObservedJob, pods: &[Option<&ObservedPod>]) -> bool {
        let is_over = |pod: &&ObservedPod| matches!(&pod.state, PodState::Ended { code, .. } if *code != Some(0));
        let failed = pods.iter().flatten().filter(|pod| is_over(pod));
        let first = failed.map(|pod| pod.ended.or(pod.created).unwrap_or(self.now)).min();
        // A pod that is gone leaves no time, and whoever waits for it has nothing to save.
        let is_gone = job.has_failed_rank && pods.iter().any(Option::is_none);
        let due = first.map(|first| first + RANKS_GRACE);
        if let Some(due) = due.filter(|due| !is_gone && self.now < *due) {
            self.look_again_at(due);
            return false;
        }
        if due.is_none() && !is_gone {
            return false;
        }
        let waiting: Vec<&ObservedPod> = pods
            .iter()
            .flatten()
            .filter(|pod| !matches!(pod.state, PodState::Ended { .. }))
            .copied()
            .collect();
        if waiting.is_empty() {
            return false;
        }
        let to_end = waiting.iter().filter(|pod| !pod.is_deleting);
        let deletions =
            to_end.map(|pod| Action::DeletePod { name: pod.name.clone(), uid: pod.uid.clone() });
        self.decision.actions.extend(deletions);
        let message = format!("a rank is lost; {} that wait for it are ended", waiting.len());
        self.say(Reason::Stopping, &message);
        true
    }

    fn say_started(&mut self, step: Step) {
        match step {
            Step::Preflight => {
                self.say(Reason::Preflight, "model, dataset and output are being checked");
            }
            Step::Training => {
                self.say(Reason::Starting, "the training pod starts and loads the model");
            }
        }
    }

    /// The container has not started: it is early, or the kubelet cannot start it.
    fn wait_for_start(
        &mut self,
        step: Step,
        scheduled: Option<Timestamp>,
        reason: &str,
        message: &str,
    ) {
        let word = match reason {
            "ErrImagePull" | "ImagePullBackOff" | "InvalidImageName" | "ErrImageNeverPull" => {
                Reason::ImagePullFailed
            }
            "CreateContainerConfigError" => Reason::SecretOrConfigMapMissing,
            "CreateContainerError" | "RunContainerError" => Reason::ContainerCannotStart,
            _ => return self.say_started(step),
        };
        let deadline = scheduled.map(|scheduled| {
            scheduled + SignedDuration::from_secs(self.settings.startup_deadline_seconds)
        });
        match deadline {
            Some(deadline) if self.now >= deadline => self.finish(
                Truth::False,
                word,
                &format!(
                    "{message}\nIt did not start within {} s.",
                    self.settings.startup_deadline_seconds
                ),
            ),
            Some(deadline) => {
                self.say(word, message);
                self.look_again_at(deadline);
            }
            None => self.say(word, message),
        }
    }

    fn take_progress(&mut self) {
        self.look_again_in(PROGRESS_INTERVAL);
        let Some(progress) = &self.observed.progress else {
            // Not asked just now, or it does not answer: what was known stays.
            if self.decision.status.progress.is_none() {
                self.say_started(Step::Training);
            }
            return;
        };
        let next = progress_status(progress, self.now);
        let is_news = self
            .decision
            .status
            .progress
            .as_ref()
            .is_none_or(|last| (last.step, &last.stage) != (next.step, &next.stage));
        if is_news {
            self.decision.status.progress = Some(next);
        }
        match progress.stage {
            Stage::Fetching | Stage::Loading => {
                self.say_started(Step::Training);
            }
            Stage::Training | Stage::Evaluating => {
                self.say(Reason::Training, "see status.progress");
            }
            Stage::Exporting | Stage::Publishing | Stage::Verifying => {
                self.say(Reason::Publishing, "the result is being written, read back and proven");
            }
        }
    }
}

fn progress_status(progress: &Progress, now: Timestamp) -> ProgressStatus {
    let whole = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    // JSON has no word for what is not finite; four digits are what a table has room for.
    let finite = |value: Option<f64>| value.filter(|value| value.is_finite()).map(rounded);
    ProgressStatus {
        stage: progress.stage.as_str().to_owned(),
        step: whole(progress.step),
        total_steps: whole(progress.total_steps),
        loss: finite(progress.loss),
        eval_loss: finite(progress.eval_loss),
        tokens_per_second: finite(progress.tokens_per_second),
        eta_seconds: progress.eta_seconds.map(whole),
        eta: progress.eta_seconds.map(|seconds| render::duration(seconds as f64)),
        last_updated_time: Some(Time(now)),
    }
}

fn rounded(number: f64) -> f64 {
    (number * 1e4).round() / 1e4
}

fn pod_size(pod: &PodStatus) -> PodSize {
    PodSize {
        cpu_millis: pod.cpu_millis,
        memory_bytes: pod.memory_bytes.unsigned_abs(),
        shared_memory_bytes: pod.shared_memory_bytes.unsigned_abs(),
        storage_bytes: pod.storage_bytes.unsigned_abs(),
    }
}

/// Orders ranks by how far they are: the first is what the others wait for.
fn readiness(pod: Option<&ObservedPod>) -> u8 {
    match pod.map(|pod| &pod.state) {
        Some(PodState::Unschedulable(message)) => u8::from(!says_what_lacks(message)),
        // What keeps a container from starting is said before that another is early.
        Some(PodState::Waiting { reason, .. }) => 2 + u8::from(reason.is_empty()),
        None => 4,
        Some(PodState::Running) => 5,
        Some(PodState::Ended { .. }) => 6,
    }
}

/// Tells whether a scheduler's words name what nodes lack, such as `0/3 nodes are available: 3
/// Insufficient memory`. Of a gang, a pod for which there would be room is only told that it waits.
fn says_what_lacks(message: &str) -> bool {
    message.contains("nodes are ")
}

/// Says how a try ended: with several ranks, by the cause. That a rank lost another, or was told to
/// stop with it, is what the other's end did to it.
fn ending(pods: &[Option<&ObservedPod>], is_success: bool) -> Ending {
    let mut endings = pods.iter().enumerate().map(|(rank, pod)| {
        let who = if pods.len() > 1 { format!(" {rank}") } else { String::new() };
        ending_of(*pod, &who, is_success)
    });
    // Rank 0 has the last word of a run that went well.
    let first = if is_success { endings.next() } else { endings.min_by_key(consequence) };
    first.unwrap_or_else(|| Ending::Disrupted("its pod is gone".to_owned()))
}

/// Orders endings from cause to consequence.
fn consequence(ending: &Ending) -> u8 {
    let exit = |code: i32| ExitCode::from_code(code);
    match ending {
        Ending::OutOfMemory(_) => 0,
        Ending::Disrupted(_) => 2,
        Ending::Exited { code, .. } => match exit(*code) {
            Some(ExitCode::Interrupted) => 3,
            Some(ExitCode::PeerLost) => 4,
            Some(ExitCode::Success) => 5,
            _ => 1,
        },
    }
}

/// Says how one pod ended; `who` is empty or ` 1`.
fn ending_of(pod: Option<&ObservedPod>, who: &str, is_success: bool) -> Ending {
    let Some(pod) = pod else {
        return Ending::Disrupted(format!("its pod{who} is gone"));
    };
    match &pod.state {
        PodState::Ended { code: Some(0), message, .. } if is_success => {
            Ending::Exited { code: 0, message: message.clone() }
        }
        // The trainer's own word on a stop it was asked for counts as the disruption it is.
        _ if pod.is_disrupted => Ending::Disrupted(format!("the cluster ended its pod{who}")),
        PodState::Ended { is_out_of_memory: true, .. } => {
            let of = if who.is_empty() { "" } else { " of pod" };
            Ending::OutOfMemory(format!("the trainer{of}{who}"))
        }
        PodState::Ended { .. } if pod.is_deleting => {
            Ending::Disrupted(format!("its pod{who} was deleted"))
        }
        PodState::Ended { code: Some(code), message, .. } => {
            Ending::Exited { code: *code, message: message.clone() }
        }
        PodState::Ended { code: None, message, .. } => {
            Ending::Disrupted(format!("its pod{who} ended before it ran: {message}"))
        }
        PodState::Unschedulable(_) | PodState::Waiting { .. } | PodState::Running => {
            Ending::Disrupted(format!("its pod{who} was lost"))
        }
    }
}

fn first_try(step: Step) -> AttemptStatus {
    AttemptStatus { step, number: 0, failures: 0, disruptions: 0, job_uid: None, retry_time: None }
}

fn next_try(attempt: AttemptStatus, at: Timestamp) -> AttemptStatus {
    AttemptStatus {
        number: attempt.number + 1,
        job_uid: None,
        retry_time: Some(Time(at)),
        ..attempt
    }
}

fn is_last(attempt: &AttemptStatus) -> bool {
    attempt.number + 1 >= MOST_TRIES
}

fn listed(report: &PreflightReport) -> String {
    let lines: Vec<String> = report.problems.iter().map(ToString::to_string).collect();
    lines.join("\n")
}

#[cfg(test)]
#[path = "lifecycle_tests.rs"]
mod tests;
