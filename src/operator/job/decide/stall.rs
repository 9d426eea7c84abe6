//! Training attempts that stall: the trainer answers, but makes no progress.
//!
//! One that does not answer is left alone: a network policy may be in the way.

use finetune_api::FineTuneJobStatus;
use finetune_contract::{Progress, Reason};
use k8s_openapi::jiff::SignedDuration;

use super::{Action, Input, state::InProgress};
use crate::operator::job::{
    conditions::{Kind, find},
    observe::{ObservedJob, ObservedPod},
};

const STALLED: &str = "no progress since";
const RESTART: &str = "; it is stopped, and the next attempt resumes from the newest checkpoint";

/// Returns why the current attempt is being stopped, if it is because it stalled.
pub(super) fn cause(status: &FineTuneJobStatus) -> Option<&str> {
    let summary = find(status, Kind::Succeeded)?;
    let is_stopping = summary.reason == Reason::Stopping.as_str();
    let message = summary.message.strip_suffix(RESTART).filter(|_| is_stopping)?;
    message.starts_with(STALLED).then_some(message)
}

/// Deletes the Job of an attempt that has been at the same step and stage for the administrator's timeout: the
/// next attempt resumes from the newest checkpoint. `progress` is what the trainer answered now.
pub(super) fn restart(
    input: &Input<'_>,
    status: &FineTuneJobStatus,
    job: &ObservedJob,
    pods: &[Option<&ObservedPod>],
    progress: &Progress,
    state: InProgress,
) -> InProgress {
    let timeout = input.settings.stall_timeout_seconds;
    let last = status.progress.as_ref().and_then(|last| last.last_updated_time.as_ref());
    let Some(last) = last.filter(|_| timeout > 0 && state.progress.is_none()) else { return state };
    // What an earlier attempt reported says nothing about how long this one has been there.
    let scheduled = pods.iter().flatten().filter_map(|pod| pod.scheduled).max();
    let since = scheduled.map_or(last.0, |scheduled| scheduled.max(last.0));
    if input.now < since + SignedDuration::from_secs(timeout) {
        return state;
    }
    let Progress { step, total_steps, stage, .. } = progress;
    let stage = stage.as_str();
    let message = format!("{STALLED} {since}, at step {step} of {total_steps} ({stage}){RESTART}");
    let mut state = state.with_summary(Reason::Stopping, message);
    state.actions.push(Action::delete_job(job));
    state
}
