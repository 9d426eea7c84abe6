//! Whether a Job is the operator's.

use finetune_api::AttemptStatus;
use finetune_contract::Reason;
use k8s_openapi::api::batch::v1::Job;

use super::{Action, Input, state::InProgress};
use crate::operator::job::{build::digest, observe::ObservedJob};

/// Returns whether the operator created a Job of the attempt's name: anybody who may create Jobs can
/// write the same name and owner.
///
/// It did if it noted its UID, in the status or in this process. Else it may have crashed in between:
/// then the Job runs what the operator would create now.
pub(super) fn is_ours(
    input: &Input<'_>,
    attempt: &AttemptStatus,
    job: &ObservedJob,
    would_create: impl FnOnce() -> Option<Job>,
) -> bool {
    if let Some(noted) = &attempt.job_uid {
        return *noted == job.uid;
    }
    input.observed.created.as_ref() == Some(&job.uid)
        || would_create().is_some_and(|ours| digest::of_pods(&ours) == job.digest)
}

/// Deletes a Job that is not ours before the attempt goes on.
pub(super) fn delete_foreign(attempt: AttemptStatus, job: &ObservedJob) -> InProgress {
    let message = format!(
        "a Job {:?} that the operator did not create is in the way of this attempt and is deleted",
        job.name
    );
    let actions = if job.is_deleting { vec![] } else { vec![Action::delete_job(job)] };
    InProgress { actions, ..InProgress::new(attempt, Reason::Stopping, message) }
}
