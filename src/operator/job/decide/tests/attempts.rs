//! Attempts that end without a result, and what follows.

use finetune_contract::{FailureReason, Outcome};

use crate::operator::job::{
    conditions::{Kind, find},
    decide::Action,
    observe::PodState,
    testing::World,
};

#[test]
fn disruptions_have_a_budget_of_their_own() {
    let mut world = World::new("  loraConfig: {}\n");
    world.pass_preflight();
    world.settle();
    // Evicted: the pod says so.
    world.observed.pods.last_mut().unwrap().is_disrupted = true;
    world.end(Some(75), "");
    world.settle();
    assert_eq!(world.budgets(), (1, 0, 1));
    world.wait(2);
    world.settle();
    // Deleted by hand, Job and pod.
    world.observed.jobs.pop();
    world.observed.pods.pop();
    world.settle();
    assert_eq!(world.budgets(), (2, 0, 2));
    assert!(world.message().contains("its Job was deleted"), "{}", world.message());
    world.wait(2);
    world.settle();
    // Drained: the pod is gone without a trace.
    world.observed.jobs.last_mut().unwrap().ended = Some(false);
    world.observed.pods.pop();
    world.settle();
    assert_eq!(world.summary(), "False TooManyDisruptions");
}

#[test]
fn an_orphaned_pod_is_deleted_before_another_starts() {
    let mut world = World::new("  loraConfig: {}\n");
    world.pass_preflight();
    world.settle();
    world.observed.jobs.pop();
    let decision = world.decide();
    world.job.status = Some(decision.status);
    world.wait(2);
    let decision = world.decide();
    assert!(
        matches!(decision.actions.as_slice(), [Action::DeletePod { .. }]),
        "{:?}",
        decision.actions
    );
    world.settle();
    assert_eq!(world.observed.pods.len(), 2, "the preflight's and the new one");
}

#[test]
fn failures_are_retried_or_not_by_their_kind() {
    let failed = |reason, message: &str| Outcome::Failed { reason, message: message.to_owned() };
    for (reason, code, expected) in [
        (FailureReason::StoreUnavailable, 69, "Unknown Retrying"),
        (FailureReason::Diverged, 65, "False Diverged"),
        (FailureReason::OutputExists, 78, "False OutputExists"),
        (FailureReason::OutOfMemory, 71, "Unknown Adapted"),
    ] {
        let mut world = World::new("");
        world.pass_preflight();
        world.settle();
        let report = World::report(failed(reason, "why"));
        world.end(Some(code), &report);
        world.settle();
        assert_eq!(world.summary(), expected, "{reason:?}");
    }
    for (code, expected) in
        [(139, "Unknown Retrying"), (137, "Unknown Adapted"), (71, "Unknown Adapted")]
    {
        let mut world = World::new("");
        world.pass_preflight();
        world.settle();
        world.end(Some(code), "");
        world.settle();
        assert_eq!(world.summary(), expected, "{code}");
    }
}

#[test]
fn a_missing_image_is_reported_at_once_and_fails_the_job_later() {
    let mut world = World::new("  loraConfig: {}\n");
    world.settle();
    world.observed.pods.last_mut().unwrap().state = PodState::Waiting {
        reason: "ImagePullBackOff".to_owned(),
        message: "not found".to_owned(),
    };
    world.settle();
    assert_eq!(world.summary(), "Unknown ImagePullFailed");
    world.wait(600);
    world.settle();
    assert_eq!(world.summary(), "False ImagePullFailed");
    assert!(world.observed.jobs.is_empty());
}

#[test]
fn a_missing_volume_claim_is_no_want_of_room() {
    let mut world = World::new("  loraConfig: {}\n");
    world.settle();
    let pod = world.observed.pods.last_mut().unwrap();
    pod.scheduled = None;
    // The words of Kubernetes 1.36.
    pod.state = PodState::Unschedulable(
        "0/1 nodes are available: persistentvolumeclaim \"models\" not found. not found".to_owned(),
    );
    let decision = world.settle();
    assert_eq!(world.summary(), "Unknown VolumeClaimMissing");
    assert!(decision.requeue_after.is_some(), "it is looked at again when its time is up");
    // It is created, and the pod starts.
    world.observed.pods.last_mut().unwrap().state = PodState::Running;
    world.settle();
    assert_eq!(world.summary(), "Unknown Preflight");
    world.observed.pods.last_mut().unwrap().state =
        PodState::Unschedulable("persistentvolumeclaim \"models\" not found".to_owned());
    world.wait(600);
    world.settle();
    assert_eq!(world.summary(), "False VolumeClaimMissing");
    assert!(world.observed.jobs.is_empty(), "nothing is left waiting");
}

#[test]
fn a_refused_job_is_reported_and_created_again() {
    let mut world = World::new("  loraConfig: {}\n");
    world.observed.refusal = Some("exceeded quota".to_owned());
    let decision = world.decide();
    assert!(matches!(decision.actions.as_slice(), [Action::CreateJob(_)]));
    let condition = find(&decision.status, Kind::Succeeded).unwrap();
    assert_eq!(
        (condition.reason.as_str(), condition.message.as_str()),
        ("JobRefused", "exceeded quota")
    );
}
