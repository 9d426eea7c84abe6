//! Decides what happens next to a job, from what is observed of it. Pure: no I/O, no clock.
//!
//! The status of the job is the only state. Whoever reads a job, its children and the settings comes
//! to the same decision, whatever happened before; killing the operator at any line loses nothing.
//!
//! In reading order: [`decide`] is the whole decision; `preflight` and `training` are the two stages
//! of a job, each a series of attempts; `attempt` observes or starts the current one, `termination`
//! says how it ended, and `retry` whether another follows. They return a `State`, which `state` writes
//! into the next status; `status` converts what others say into the words of the status.

mod attempt;
mod lost_node;
mod ownership;
mod preflight;
mod retry;
mod stall;
mod state;
mod status;
mod termination;
#[cfg(test)]
mod tests;
mod training;

use std::time::Duration;

use finetune_api::{FineTuneJob, FineTuneJobStatus, OUTPUT};
use finetune_contract::{Problem, Reason};
use finetune_plan::resolve;
use k8s_openapi::{
    api::{batch::v1::Job, core::v1::Service, networking::v1::NetworkPolicy},
    jiff::{SignedDuration, Timestamp},
};

use super::{
    conditions::{self, Kind, Truth},
    observe::{Observed, ObservedJob, ObservedPod},
};
use crate::operator::settings::Settings;
use state::{ConditionChange, Finished, NextStatus};

pub use attempt::PROGRESS_INTERVAL;

/// What is to be done.
#[derive(Debug, Clone, PartialEq)]
pub struct Decision {
    /// The job's next status; written first.
    pub status: FineTuneJobStatus,
    /// The changes in the cluster, in this order.
    pub actions: Vec<Action>,
    /// The events to emit.
    pub events: Vec<JobEvent>,
    /// When to reconcile again at the latest; none if only a change can matter.
    pub requeue_after: Option<Duration>,
}

/// One change in the cluster.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Action {
    CreateService(Box<Service>),
    CreateNetworkPolicy(Box<NetworkPolicy>),
    CreateJob(Box<Job>),
    DeleteJob {
        name: String,
        uid: String,
    },
    DeletePod {
        name: String,
        uid: String,
    },
    /// Without waiting for the kubelet to confirm that its containers have stopped.
    ForceDeletePod {
        name: String,
        uid: String,
    },
    DeleteSelf,
}

impl Action {
    fn delete_job(job: &ObservedJob) -> Self {
        Self::DeleteJob { name: job.name.clone(), uid: job.uid.clone() }
    }

    fn delete_pod(pod: &ObservedPod) -> Self {
        Self::DeletePod { name: pod.name.clone(), uid: pod.uid.clone() }
    }

    fn force_delete_pod(pod: &ObservedPod) -> Self {
        Self::ForceDeletePod { name: pod.name.clone(), uid: pod.uid.clone() }
    }
}

/// One event of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobEvent {
    /// Whether something went wrong.
    pub is_warning: bool,
    /// Why, as the condition has it.
    pub reason: Reason,
    /// The text for people.
    pub message: String,
}

/// Decides what happens next to `job`.
pub fn decide(
    job: &FineTuneJob,
    observed: &Observed,
    settings: &Settings,
    now: Timestamp,
) -> Decision {
    let input = Input { job, observed, settings, now };
    let mut next = NextStatus::new(&input);

    if conditions::is_finished(&next.status) {
        // Only cleaning up is left.
    } else if let Some(end) =
        deadline_exceeded(&input, &next.status).or_else(|| invalid_spec(&input))
    {
        next.finish(end);
    } else {
        if !input.is_suspended() {
            next.set(ConditionChange::not_suspended());
        }
        if next.status.plan.is_none() {
            let state = preflight::decide(&input, &next.status);
            next.write(state);
        }
        if let Some(plan) = next.status.plan.clone()
            && !conditions::is_finished(&next.status)
        {
            let state = training::decide(&input, &next.status, &plan);
            next.write(state);
        }
    }
    next.into_decision(&input)
}

/// What a decision is made from.
struct Input<'a> {
    job: &'a FineTuneJob,
    observed: &'a Observed,
    settings: &'a Settings,
    now: Timestamp,
}

impl<'a> Input<'a> {
    fn name(&self) -> &'a str {
        self.job.metadata.name.as_deref().unwrap_or_default()
    }

    fn is_suspended(&self) -> bool {
        self.job.spec.suspend == Some(true)
    }

    fn until(&self, time: Timestamp) -> Duration {
        until(self.now, time)
    }

    /// Returns when the run must have ended, once it has started.
    fn deadline(&self, status: &FineTuneJobStatus) -> Option<Timestamp> {
        let seconds = self.job.spec.active_deadline_seconds?;
        Some(status.start_time.as_ref()?.0 + SignedDuration::from_secs(seconds))
    }

    fn orphan_deletions(&self) -> impl Iterator<Item = Action> {
        self.observed.orphaned_pods().filter(|pod| !pod.is_deleting).map(Action::delete_pod)
    }
}

/// Returns the wait from `now` to `time`; none if it is past.
fn until(now: Timestamp, time: Timestamp) -> Duration {
    Duration::try_from(now.duration_until(time)).unwrap_or_default()
}

fn deadline_exceeded(input: &Input<'_>, status: &FineTuneJobStatus) -> Option<Finished> {
    input.deadline(status).filter(|deadline| input.now >= *deadline)?;
    let seconds = input.job.spec.active_deadline_seconds.unwrap_or_default();
    Some(Finished::failed(
        Reason::DeadlineExceeded,
        format!("exceeded activeDeadlineSeconds ({seconds} s); the last checkpoint is kept"),
    ))
}

/// Finds what the schema cannot: it is refused before any pod exists. A run that has its plan was
/// checked before, perhaps by a release that checks less.
fn invalid_spec(input: &Input<'_>) -> Option<Finished> {
    let job = input.job;
    if job.status.as_ref().is_some_and(|status| status.plan.is_some()) {
        return None;
    }
    let problem = unusable_uris(job)
        .or_else(|| unreachable_uri(job))
        .or_else(|| overlapping_output(job))
        .or_else(|| resolve::unusable_names(job))?;
    Some(not_accepted(problem))
}

fn not_accepted(problem: String) -> Finished {
    let accepted =
        ConditionChange::new(Kind::Accepted, Truth::False, Reason::InvalidSpec, &problem);
    Finished::failed(Reason::InvalidSpec, problem).with(accepted)
}

/// Returns what is wrong with the URIs that cannot be parsed: the CRD checks only their schemes.
fn unusable_uris(job: &FineTuneJob) -> Option<String> {
    let problems = resolve::unusable_uris(&job.spec);
    (!problems.is_empty()).then(|| lines(&problems))
}

/// Returns problems as text, one a line.
fn lines(problems: &[Problem]) -> String {
    problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

/// Returns what is wrong with a `file://` URI, which means nothing in a cluster.
fn unreachable_uri(job: &FineTuneJob) -> Option<String> {
    let (path, uri) = job.spec.uris().find(|(_, uri)| uri.starts_with("file://"))?;
    Some(format!(
        "{path} is {uri:?}: a pod does not see files of your machine; use s3://, gs://, az://, hf:// or pvc://, or run it here with `finetune run`"
    ))
}

/// Returns how the output overlaps with what the run reads.
fn overlapping_output(job: &FineTuneJob) -> Option<String> {
    let messages = job.spec.overlaps();
    (!messages.is_empty()).then(|| format!("{OUTPUT}: {}", messages.join("\n")))
}
