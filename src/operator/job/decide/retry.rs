//! Whether another attempt follows one that ended, and when.

use finetune_api::AttemptStatus;
use finetune_contract::{ExitCode, Reason};
use k8s_openapi::jiff::SignedDuration;

use super::{
    Input,
    state::{Finished, Retry, State},
    status::next_attempt,
};

/// The first wait after a failure; it doubles.
const FIRST_BACKOFF: SignedDuration = SignedDuration::from_secs(10);
/// The longest wait after a failure.
const MAX_BACKOFF: SignedDuration = SignedDuration::from_mins(5);
/// The wait after a disruption.
pub(super) const DISRUPTION_BACKOFF: SignedDuration = SignedDuration::from_secs(2);
/// The most attempts of a stage: the number is three digits of the Job's name.
const MAX_ATTEMPTS: i32 = 1000;

/// Begins the counts of failures and disruptions again if a run has saved a newer checkpoint since: a
/// week on spot nodes has more disruptions than a run that makes no progress may have.
fn renew_budgets(input: &Input<'_>, attempt: AttemptStatus) -> AttemptStatus {
    let status = input.job.status.as_ref();
    let saved = status.and_then(|status| status.progress.as_ref()?.checkpoint_step);
    if saved <= attempt.counted_from_step {
        return attempt;
    }
    AttemptStatus { failures: 0, disruptions: 0, counted_from_step: saved, ..attempt }
}

/// The attempt failed for a reason that may pass.
pub(super) fn after_failure(
    input: &Input<'_>,
    attempt: AttemptStatus,
    reason: Reason,
    why: &str,
) -> State {
    let attempt = renew_budgets(input, attempt);
    let failures = attempt.failures + 1;
    if failures > input.settings.retries || is_last(&attempt) {
        let message = format!("{why}\nGave up after {failures} failed attempts.");
        return State::Finished(Finished::failed(reason, message).of(attempt));
    }
    let doublings = u32::try_from(failures - 1).unwrap_or(0).min(16);
    let backoff = (FIRST_BACKOFF * 2_i32.saturating_pow(doublings)).min(MAX_BACKOFF);
    let next = AttemptStatus { failures, ..next_attempt(attempt, input.now + backoff) };
    retrying(next, why)
}

/// The cluster ended the attempt.
pub(super) fn after_disruption(input: &Input<'_>, attempt: AttemptStatus, why: &str) -> State {
    let attempt = renew_budgets(input, attempt);
    let disruptions = attempt.disruptions + 1;
    if disruptions > input.settings.disruptions || is_last(&attempt) {
        let message =
            format!("{disruptions} attempts were disrupted by the cluster; the last one: {why}");
        return State::Finished(Finished::failed(Reason::TooManyDisruptions, message).of(attempt));
    }
    let next =
        AttemptStatus { disruptions, ..next_attempt(attempt, input.now + DISRUPTION_BACKOFF) };
    retrying(next, why)
}

/// The trainer ended with `code`, and its termination message is no report: `error` says why.
pub(super) fn without_report(
    input: &Input<'_>,
    attempt: AttemptStatus,
    code: i32,
    message: &str,
    error: &str,
) -> State {
    let report = if message.trim().is_empty() {
        "without a report".to_owned()
    } else {
        format!("with a report that cannot be read: {error}")
    };
    let hint = "are the operator and the trainer's image of the same release?";
    exited(input, attempt, code, &report, hint)
}

/// The trainer ended with `code` and a report that is not of this attempt: `why` says which it is of.
pub(super) fn with_foreign_report(
    input: &Input<'_>,
    attempt: AttemptStatus,
    code: i32,
    why: &str,
) -> State {
    let report = format!("with a report that is not believed, because {why}");
    exited(input, attempt, code, &report, "did another program run in its pod?")
}

fn exited(input: &Input<'_>, attempt: AttemptStatus, code: i32, report: &str, hint: &str) -> State {
    let what = format!("the trainer exited with code {code} {report}");
    match ExitCode::from_code(code) {
        Some(ExitCode::Interrupted) => after_disruption(input, attempt, &what),
        // It cannot read its input, or its report cannot be read: a retry would end alike.
        Some(exit) if !exit.is_retryable() => {
            let message = format!("{what}: {hint}");
            State::Finished(Finished::failed(Reason::TrainerFailed, message).of(attempt))
        }
        // Killed, crashed, or a store that did not answer.
        _ => after_failure(input, attempt, Reason::TrainerFailed, &what),
    }
}

fn retrying(attempt: AttemptStatus, why: &str) -> State {
    let message = format!("retrying as attempt {}: {why}", attempt.number);
    State::Retry(Retry { attempt, reason: Reason::Retrying, message, adapted_plan: None })
}

pub(super) fn is_last(attempt: &AttemptStatus) -> bool {
    attempt.number + 1 >= MAX_ATTEMPTS
}
