//! Attempts that end without a result, and what follows.

use std::time::Duration;

use finetune_api::Approval;
use finetune_contract::{ArtifactKind, FailureReason, Outcome, Progress, RunId, Stage, testing};
use k8s_openapi::jiff::SignedDuration;

use crate::operator::job::{
    conditions::{Kind, find},
    decide::Action,
    observe::{ObservedJob, PodState},
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

/// The trainer answers with a step, and the newest checkpoint.
fn answer(world: &mut World, step: u64, checkpoint_step: Option<u64>) {
    let (run_id, stage) = (RunId(world.run_id()), Stage::Training);
    world.observed.progress =
        Some(Progress { run_id, step, stage, checkpoint_step, ..testing::progress() });
}

/// The trainer has answered once.
fn progress(world: &mut World, step: u64, checkpoint_step: Option<u64>) {
    answer(world, step, checkpoint_step);
    world.settle();
    world.observed.progress = None;
}

#[test]
fn budgets_are_renewed_by_each_checkpoint_of_progress() {
    let mut world = World::new("  loraConfig: {}\n");
    world.pass_preflight();
    world.settle();
    // More disruptions than the budget of two, each a checkpoint further.
    for number in 1..=5 {
        progress(&mut world, 10 * number + 5, Some(10 * number));
        world.observed.pods.last_mut().unwrap().is_disrupted = true;
        world.end(Some(75), "");
        world.settle();
        assert_eq!(world.budgets(), (number as i32, 0, 1));
        world.wait(2);
        world.settle();
    }
    // Without progress they are used up.
    for expected in ["Unknown Retrying", "False TooManyDisruptions"] {
        progress(&mut world, 60, Some(50));
        world.observed.pods.last_mut().unwrap().is_disrupted = true;
        world.end(Some(75), "");
        world.settle();
        assert_eq!(world.summary(), expected);
        world.wait(2);
        world.settle();
    }
}

#[test]
fn a_run_that_has_trained_waits_for_what_it_had() {
    let pull_fails = |world: &mut World| {
        world.observed.pods.last_mut().unwrap().state = PodState::Waiting {
            reason: "ImagePullBackOff".to_owned(),
            message: "the registry does not answer".to_owned(),
        };
        world.wait(3600);
        world.settle();
    };
    let mut world = World::new("  loraConfig: {}\n");
    world.pass_preflight();
    world.settle();
    progress(&mut world, 3, None);
    // Its keys are rotated: the next pod has the new ones.
    let reason = FailureReason::PermissionDenied;
    let report = world.report(Outcome::Failed { reason, message: "403".to_owned() });
    world.end(Some(77), &report);
    world.settle();
    assert_eq!(world.summary(), "Unknown Retrying");
    world.wait(10);
    world.settle();
    pull_fails(&mut world);
    assert_eq!(world.summary(), "Unknown ImagePullFailed");
    world.wait(86_400);
    world.settle();
    assert_eq!(world.summary(), "False ImagePullFailed");
    // One that has made no step is told at once.
    let mut world = World::new("  loraConfig: {}\n");
    world.pass_preflight();
    world.settle();
    pull_fails(&mut world);
    assert_eq!(world.summary(), "False ImagePullFailed");
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
        let report = world.report(failed(reason, "why"));
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
fn a_report_of_another_run_attempt_or_place_is_not_believed() {
    let succeeded = |world: &World, uri: String| world.success_report(ArtifactKind::Adapter, uri);
    let ends_with = |change: &dyn Fn(&World) -> String| {
        let mut world = World::new("  loraConfig: {}\n");
        world.pass_preflight();
        world.settle();
        let report = change(&world);
        world.end(Some(0), &report);
        world.settle();
        format!("{}: {}", world.summary(), world.message())
    };
    let honest = ends_with(&|world| succeeded(world, world.output()));
    assert!(honest.starts_with("True Succeeded"), "{honest}");
    let forged = [
        ends_with(&|world| succeeded(world, world.output()).replace(&world.run_id(), "other-1")),
        ends_with(&|world| {
            succeeded(world, world.output()).replace("\"attempt\":0", "\"attempt\":3")
        }),
        ends_with(&|world| succeeded(world, "s3://other/place".to_owned())),
    ];
    insta::assert_snapshot!(forged.join("\n"), @r#"
    False TrainerFailed: the trainer exited with code 0 with a report that is not believed, because it is of attempt 0 of the run "other-1", not of attempt 0 of "minimal-0cfb31f0": did another program run in its pod?
    False TrainerFailed: the trainer exited with code 0 with a report that is not believed, because it is of attempt 3 of the run "minimal-0cfb31f0", not of attempt 0 of "minimal-0cfb31f0": did another program run in its pod?
    False TrainerFailed: the trainer exited with code 0 with a report that is not believed, because it says that s3://other/place was published, and s3://data/minimal was planned: did another program run in its pod?
    "#);
}

/// A Job that somebody else gave this name and owner, and that has ended.
fn foreign_job(name: &str) -> ObservedJob {
    ObservedJob {
        name: name.to_owned(),
        uid: "foreign".to_owned(),
        owner_uid: Some("job-uid".to_owned()),
        created: None,
        digest: "of another program".to_owned(),
        is_suspended: false,
        is_deleting: false,
        ended: Some(true),
        ranks: 1,
        has_failed_rank: false,
    }
}

#[test]
fn a_job_that_somebody_else_put_in_the_way_is_deleted_and_not_believed() {
    let mut world = World::new("  loraConfig: {}\n  approval: Manual\n");
    world.pass_preflight();
    world.settle();
    assert_eq!(world.summary(), "Unknown AwaitingApproval");
    world.observed.jobs.push(foreign_job("minimal-0"));
    world.job.spec.approval = Some(Approval::Auto);
    let decision = world.decide();
    assert!(matches!(&*decision.actions, [Action::DeleteJob { uid, .. }] if uid == "foreign"));
    world.settle();
    assert_eq!(world.summary(), "Unknown Starting");
    assert_ne!(world.observed.job("minimal-0").unwrap().uid, "foreign");
    assert_eq!(world.budgets(), (0, 0, 0));
    // Nor is one that takes the place of a Job that was deleted.
    world.observed.jobs.pop();
    world.observed.pods.pop();
    world.observed.jobs.push(foreign_job("minimal-0"));
    world.settle();
    assert_eq!(world.budgets(), (1, 0, 1));
    assert!(world.message().contains("its Job was deleted"), "{}", world.message());
}

#[test]
fn a_job_whose_creation_was_not_noted_is_taken_over() {
    let mut world = World::new("  loraConfig: {}\n");
    world.pass_preflight();
    world.settle();
    let uid = world.observed.job("minimal-0").unwrap().uid.clone();
    // The operator died before it wrote the status.
    world.job.status.as_mut().unwrap().attempt.as_mut().unwrap().job_uid = None;
    let decision = world.settle();
    assert_eq!(decision.actions, []);
    assert_eq!(decision.status.attempt.unwrap().job_uid, Some(uid));
    // So is one that an admission webhook has changed, if this process created it.
    world.job.status.as_mut().unwrap().attempt.as_mut().unwrap().job_uid = None;
    let job = world.observed.jobs.last_mut().unwrap();
    job.digest = "with another image".to_owned();
    world.observed.created = Some(job.uid.clone());
    assert_eq!(world.settle().actions, []);
}

#[test]
fn pods_that_the_cluster_refuses_are_reported_in_its_words() {
    let mut world = World::new("  loraConfig: {}\n");
    world.settle();
    let pod = world.observed.pods.pop().unwrap();
    let seconds = |wait: Option<Duration>| wait.unwrap().as_secs();
    assert_eq!(seconds(world.settle().requeue_after), 30, "Kubernetes has time to create it");
    assert_eq!(world.summary(), "Unknown Preflight");
    world.wait(30);
    world.observed.pods_refused = Some("exceeded quota: gpus".to_owned());
    assert_eq!(seconds(world.settle().requeue_after), 30);
    assert_eq!(world.summary(), "Unknown PodsRefused");
    assert_eq!(world.message(), "exceeded quota: gpus");
    assert_eq!(world.budgets(), (0, 0, 0));
    world.observed.pods.push(pod);
    world.settle();
    assert_eq!(world.summary(), "Unknown Preflight");
}

#[test]
fn a_plan_of_another_release_ends_nothing() {
    let mut world = World::new("  loraConfig: {}\n");
    world.pass_preflight();
    world.settle();
    let readable = world.job.status.as_ref().unwrap().plan.clone();
    let plan = world.job.status.as_mut().unwrap().plan.as_mut().unwrap();
    plan.run_config = plan.run_config.replacen('{', "{\"newer\":1,", 1);
    let unreadable = world.job.status.as_ref().unwrap().plan.clone();
    world.settle();
    assert_eq!(world.summary(), "Unknown PlanUnreadable");
    insta::assert_snapshot!(world.message(), @"the plan in status.plan was made by another release: run config is not valid: unknown field `newer`, expected one of `version`, `runId`, `attempt`, `model`, `dataset`, `lora`, `initialAdapter`, `initialCheckpoint`, `training`, `device`, `parallelism`, `output`, `checkpointsUri`, `expected`, `predictedPeakBytes`, `predictedSentBytes`. What runs, runs on; install that release again, or create the job again");
    let job = world.observed.jobs.last().unwrap().clone();
    assert_eq!(job.name, "minimal-0", "it runs on");
    // It succeeds meanwhile; the report waits for a release that knows what was planned.
    world.job.status.as_mut().unwrap().plan.clone_from(&readable);
    world.succeed();
    world.job.status.as_mut().unwrap().plan = unreadable;
    world.settle();
    assert_eq!(world.summary(), "Unknown PlanUnreadable");
    world.job.status.as_mut().unwrap().plan = readable;
    world.settle();
    assert_eq!(world.summary(), "True Succeeded");
}

#[test]
fn a_plan_of_another_release_can_be_suspended() {
    let mut world = World::new("  loraConfig: {}\n");
    world.pass_preflight();
    world.settle();
    world.job.status.as_mut().unwrap().plan.as_mut().unwrap().run_config = "{}".to_owned();
    world.job.spec.suspend = Some(true);
    world.settle();
    assert!(world.observed.job("minimal-0").is_none(), "a suspended job holds no pod");
}

#[test]
fn a_pod_that_does_not_go_names_its_node() {
    let mut world = World::new("  loraConfig: {}\n");
    world.pass_preflight();
    world.settle();
    // Five minutes after its node fell silent, Kubernetes deletes the pod, and nobody confirms it.
    let gone = world.now + SignedDuration::from_secs(120);
    let pod = world.observed.pods.last_mut().unwrap();
    (pod.is_deleting, pod.deletion_timestamp, pod.is_disrupted) = (true, Some(gone), true);
    let decision = world.settle();
    assert_ne!(world.summary(), "Unknown NodeUnreachable");
    assert!(decision.requeue_after.unwrap().as_secs() <= 180, "it is looked at when it is due");
    world.wait(180);
    world.settle();
    assert_eq!(world.summary(), "Unknown NodeUnreachable");
    insta::assert_snapshot!(world.message(), @"the pod minimal-0-0-abcde should have been gone by 2026-01-01T00:02:00Z: its node node-1 does not answer. At 2026-01-01T00:12:00Z the pod is deleted by force, and the run resumes elsewhere");
    assert_eq!(world.budgets(), (0, 0, 0), "nothing runs beside what may still run there");
    // Only if the administrator says so is the pod deleted by force, once.
    world.settings.lost_node_timeout_seconds = 0;
    world.wait(3600);
    assert!(world.settle().actions.is_empty());
    insta::assert_snapshot!(world.message(), @"the pod minimal-0-0-abcde should have been gone by 2026-01-01T00:02:00Z: its node node-1 does not answer. If the node is lost, delete its Node object, or the pod with --force, and the run resumes elsewhere");
    world.settings.lost_node_timeout_seconds = 600;
    let decision = world.decide();
    assert!(matches!(decision.actions.as_slice(), [Action::ForceDeletePod { .. }]));
    world.observed.pods.last_mut().unwrap().is_force_deleted = true;
    assert!(world.decide().actions.is_empty(), "the apiserver has it already");
    world.observed.pods.pop();
    world.observed.jobs.last_mut().unwrap().ended = Some(false);
    world.settle();
    assert_eq!(world.budgets(), (1, 0, 1));
}

#[test]
fn a_trainer_that_answers_and_does_not_get_further_is_restarted() {
    let mut world = World::new("  loraConfig: {}\n");
    world.settings.stall_timeout_seconds = 1800;
    world.pass_preflight();
    world.settle();
    answer(&mut world, 7, None);
    world.settle();
    world.wait(1799);
    answer(&mut world, 8, None);
    world.settle();
    world.wait(1799);
    assert!(world.settle().actions.is_empty(), "step 8 has not lasted that long");
    world.wait(1);
    // Without an answer nothing is known.
    let answered = world.observed.progress.take();
    assert!(world.settle().actions.is_empty());
    world.observed.progress = answered;
    let decision = world.decide();
    assert!(matches!(decision.actions.as_slice(), [Action::DeleteJob { .. }]));
    world.settle();
    assert_eq!((world.summary(), world.budgets()), ("Unknown Retrying".to_owned(), (1, 0, 1)));
    insta::assert_snapshot!(world.message(), @"retrying as attempt 1: no progress since 2026-01-01T00:29:59Z, at step 8 of 10 (Training)");
    // The next attempt was late, and has not been there for long.
    world.wait(7200);
    world.observed.progress = None;
    world.settle();
    answer(&mut world, 8, None);
    assert!(world.settle().actions.is_empty());
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
