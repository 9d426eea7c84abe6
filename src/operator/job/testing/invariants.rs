//! What must hold of every decision, whatever happened before.

use std::collections::HashSet;

use finetune_api::{FineTuneJob, FineTuneJobStatus, PlanStatus, Step};
use finetune_contract::{Reason, ReasonPhase};
use kube::ResourceExt;

use crate::operator::{
    job::{
        conditions::{self, Kind, find},
        decide::{Action, Decision},
        observe::{Observed, ObservedPod},
    },
    settings::Settings,
};

/// Checks a decision against the invariants of docs/ARCHITECTURE.md.
///
/// # Panics
/// With the invariant that is violated.
pub(super) fn check(
    job: &FineTuneJob,
    observed: &Observed,
    settings: &Settings,
    decision: &Decision,
) {
    let before = job.status.clone().unwrap_or_default();
    let after = &decision.status;
    check_conditions(after);
    check_plan(&before, after);
    check_attempt(&before, after, settings);
    check_end(job, &before, decision);
    check_actions(job, observed, decision);
}

/// Each condition is there once, with a reason of the contract that goes with its status.
fn check_conditions(status: &FineTuneJobStatus) {
    let types: HashSet<&str> =
        status.conditions.iter().map(|condition| condition.type_.as_str()).collect();
    assert_eq!(types, Kind::ALL.map(Kind::as_str).into(), "every condition is there");
    assert_eq!(status.conditions.len(), types.len(), "and once");
    for condition in &status.conditions {
        let reason: Reason = condition.reason.parse().expect("reasons are those of the contract");
        if condition.type_ == Kind::Succeeded.as_str() {
            let is_allowed = match (condition.status.as_str(), reason) {
                ("Unknown", _) => {
                    matches!(reason.phase(), ReasonPhase::InProgress | ReasonPhase::Startup)
                }
                ("True", _) => matches!(reason, Reason::Succeeded | Reason::AlreadyPublished),
                (_, Reason::Succeeded | Reason::AlreadyPublished) => false,
                _ => matches!(reason.phase(), ReasonPhase::Terminal | ReasonPhase::Startup),
            };
            assert!(is_allowed, "Succeeded is {} because of {reason}", condition.status);
        }
    }
}

/// A plan stays as it was made, but for its own fallbacks.
fn check_plan(before: &FineTuneJobStatus, after: &FineTuneJobStatus) {
    let Some(old) = &before.plan else { return };
    let new = after.plan.as_ref().expect("a plan does not vanish");
    if new == old {
        return;
    }
    let taken = old.fallbacks.len().checked_sub(new.fallbacks.len());
    let is_rest = taken.is_some_and(|taken| taken > 0 && old.fallbacks[taken..] == new.fallbacks);
    assert!(is_rest, "a plan changes by taking its next fallback, if at all");
    let adapted = PlanStatus {
        predicted_peak_bytes: new.predicted_peak_bytes,
        summary: new.summary.clone(),
        run_config: new.run_config.clone(),
        fallbacks: new.fallbacks.clone(),
        ..old.clone()
    };
    assert_eq!(*new, adapted, "a fallback changes nothing but the sizes of the pieces");
    let planned = find(after, Kind::Planned).expect("it was planned");
    assert_eq!(planned.reason, Reason::Adapted.as_str(), "and the condition says so");
}

/// Attempts of a stage are counted up, one at a time, within their budgets.
fn check_attempt(before: &FineTuneJobStatus, after: &FineTuneJobStatus, settings: &Settings) {
    let Some(new) = &after.attempt else {
        assert!(before.attempt.is_none(), "an attempt is not forgotten");
        return;
    };
    assert!(new.failures + new.disruptions <= new.number, "each retry has one cause at most");
    assert!(new.failures <= settings.retries, "retries have a budget");
    assert!(new.disruptions <= settings.disruptions, "disruptions have a budget");
    let Some(old) = &before.attempt else {
        assert_eq!(new.number, 0, "the first attempt is 0");
        return;
    };
    if old.step == new.step {
        assert!((0..=1).contains(&(new.number - old.number)), "attempts follow each other");
        let is_counted_on = new.failures >= old.failures && new.disruptions >= old.disruptions;
        let got_further = new.counted_from_step > old.counted_from_step;
        assert!(is_counted_on || got_further, "budgets are renewed by progress only");
        let is_same = new.number == old.number && old.job_uid.is_some();
        assert!(!is_same || new.job_uid == old.job_uid, "an attempt has one Job");
    } else {
        assert_eq!((old.step, new.number), (Step::Preflight, 0), "training follows the preflight");
    }
}

/// An end is final, leaves nothing running, and has a result if it is a success.
fn check_end(job: &FineTuneJob, before: &FineTuneJobStatus, decision: &Decision) {
    let after = &decision.status;
    let is_finished = conditions::is_finished(after);
    if conditions::is_finished(before) {
        let mut same = before.clone();
        same.observed_generation = after.observed_generation;
        assert_eq!(*after, same, "an end is final");
        assert!(decision.events.is_empty(), "an end is reported once");
    }
    assert_eq!(is_finished, after.completion_time.is_some(), "an end has a time");
    let is_success =
        find(after, Kind::Succeeded).is_some_and(|condition| condition.status == "True");
    assert_eq!(is_success, after.result.is_some(), "a success has a result, and nothing else");
    let published = find(after, Kind::Published).expect("every condition is there");
    assert_eq!(is_success, published.status == "True", "a success is published");
    if is_finished {
        let has_ttl = job.spec.ttl_seconds_after_finished.is_some();
        assert!(has_ttl || decision.requeue_after.is_none(), "a finished job is left alone");
    } else {
        assert!(decision.requeue_after.is_some(), "a missed event is made up for");
        assert!(!decision.actions.contains(&Action::DeleteSelf), "only a finished job is deleted");
    }
}

/// No two attempts run at once, and what is deleted is what was observed.
fn check_actions(job: &FineTuneJob, observed: &Observed, decision: &Decision) {
    let status = &decision.status;
    let mut created = 0;
    for action in &decision.actions {
        match action {
            Action::CreateJob(new) => {
                created += 1;
                let attempt = status.attempt.as_ref().expect("a Job belongs to an attempt");
                assert!(!conditions::is_finished(status), "a finished job holds no pod");
                assert_ne!(job.spec.suspend, Some(true), "a suspended job holds no pod");
                assert!(observed.job(&new.name_any()).is_none(), "an attempt has one Job");
                assert!(observed.jobs.iter().all(|job| job.ended.is_some()), "no two attempts");
                assert_eq!(observed.orphaned_pods().count(), 0, "no two attempts, not even pods");
                let is_training = attempt.step == Step::Training;
                assert_eq!(is_training, status.plan.is_some(), "what is trained was planned");
            }
            Action::CreateService(_) | Action::CreateNetworkPolicy(_) => {
                assert_eq!(created, 0, "what ranks need is there before them");
            }
            Action::DeleteJob { name, uid } => {
                let known = observed.job(name).expect("a Job that is deleted was observed");
                assert_eq!(known.uid, *uid);
            }
            Action::DeletePod { name, uid } => {
                observed_pod(observed, name, uid);
            }
            Action::ForceDeletePod { name, uid } => {
                let is_deleting = observed_pod(observed, name, uid).deletion_timestamp.is_some();
                assert!(is_deleting, "only a pod that is being deleted is deleted by force");
            }
            Action::DeleteSelf => {}
        }
    }
    assert!(created <= 1, "no two attempts");
}

fn observed_pod<'a>(observed: &'a Observed, name: &str, uid: &str) -> &'a ObservedPod {
    let mut pods = observed.pods.iter();
    pods.find(|pod| pod.name == name && pod.uid == uid).expect("a pod that is deleted was observed")
}
