//! A job's life from its creation to its deletion.

use finetune_api::Approval;
use finetune_contract::{
    Progress, RunConfig, RunId, RunReport, StoppedEarly, parse, render, testing::progress,
};

use crate::operator::job::{
    build::names::QUEUE_LABEL,
    conditions::Kind,
    decide::{Action, PROGRESS_INTERVAL},
    observe::PodState,
    testing::World,
};

#[test]
fn numbers_out_of_bounds_do_not_block_the_status() {
    let mut world = World::new("  loraConfig: {}\n");
    world.pass_preflight();
    world.settle();
    let run_id = RunId(world.run_id());
    world.observed.progress = Some(Progress {
        run_id,
        step: u64::MAX,
        total_steps: 1 << 40,
        loss: Some(1e30),
        eval_loss: Some(f64::INFINITY),
        tokens_per_second: Some(-1.0),
        eta_seconds: Some(u64::MAX),
        ..progress()
    });
    world.settle();
    let found = world.job.status.unwrap().progress.unwrap();
    assert_eq!((found.step, found.total_steps), (10_000_000, 10_000_000));
    assert_eq!((found.loss, found.eval_loss), (Some(1e9), None));
    assert_eq!(found.tokens_per_second, Some(0.0));
    assert_eq!(found.eta_seconds, Some((1 << 53) - 1));
    assert!(found.eta.is_none_or(|eta| eta.len() <= 16), "as the CRD bounds it");
}

#[test]
fn a_life_without_trouble_takes_few_writes() {
    let mut world = World::new("  loraConfig: {}\n");
    world.settle();
    assert_eq!(world.summary(), "Unknown Preflight");
    world.pass_preflight();
    world.settle();
    assert_eq!(world.condition(Kind::Planned), "True Planned");
    assert_eq!(world.summary(), "Unknown Starting");
    let plan = world.job.status.as_ref().unwrap().plan.clone().unwrap();
    assert_eq!((plan.method.as_str(), plan.accelerator.as_str()), ("LoRA", "cpu"));
    let config: RunConfig = parse(&plan.run_config).unwrap();
    world.observed.progress = Some(Progress { run_id: config.run_id, ..progress() });
    let decision = world.settle();
    assert_eq!(decision.requeue_after, Some(PROGRESS_INTERVAL));
    assert_eq!(world.summary(), "Unknown Training");
    world.observed.progress = None;
    world.settle();
    let progress = world.job.status.as_ref().unwrap().progress.clone().unwrap();
    assert_eq!((progress.step, progress.eta.as_deref()), (5, Some("2 min")));
    world.succeed();
    let decision = world.settle();
    assert_eq!(decision.requeue_after, None, "a finished job is left alone");
    assert_eq!(world.summary(), "True Succeeded");
    assert_eq!(world.condition(Kind::Published), "True Proven");
    assert_eq!(world.observed.jobs.len(), 2);
    // Two events come to these.
    assert!(world.writes <= 8, "{} writes", world.writes);
}

#[test]
fn a_result_of_a_run_that_ended_early_says_so() {
    let mut world = World::new("  loraConfig: {}\n  training: {maxTimeSeconds: 60}\n");
    world.pass_preflight();
    world.settle();
    let plan = world.job.status.as_ref().unwrap().plan.clone().unwrap();
    assert_eq!(parse::<RunConfig>(&plan.run_config).unwrap().training.max_time_seconds, Some(60));
    world.succeed();
    let pod = world.observed.pods.last_mut().unwrap();
    let PodState::Ended { message, .. } = &mut pod.state else { panic!("it has not ended") };
    let mut report: RunReport = parse(message).unwrap();
    report.stopped_early = Some(StoppedEarly::Time);
    *message = render(&report);
    world.settle();
    assert_eq!(world.summary(), "True Succeeded");
    insta::assert_snapshot!(world.message(), @"Adapter at s3://data/minimal, read back and verified; stopped by training.maxTimeSeconds after 10 of 111 steps");
}

#[test]
fn a_plan_waits_for_approval_and_does_not_change_meanwhile() {
    let mut world = World::new("  loraConfig: {}\n  approval: Manual\n");
    world.pass_preflight();
    world.settle();
    assert_eq!(world.summary(), "Unknown AwaitingApproval");
    let plan = world.job.status.as_ref().unwrap().plan.clone();
    world.settings.accelerators[0].memory_gi_b = 2.0;
    world.job.spec.approval = Some(Approval::Auto);
    world.settle();
    assert_eq!(world.summary(), "Unknown Starting");
    assert_eq!(world.job.status.as_ref().unwrap().plan, plan);
}

#[test]
fn a_suspended_job_gives_its_pod_back_and_resumes_later() {
    let mut world = World::new("  loraConfig: {}\n");
    world.pass_preflight();
    world.settle();
    world.job.spec.suspend = Some(true);
    world.settle();
    assert_eq!(world.summary(), "Unknown Suspended");
    assert_eq!(world.condition(Kind::Suspended), "True Suspended");
    assert_eq!(world.observed.jobs.len(), 1, "the preflight's stays to be read");
    world.job.spec.suspend = Some(false);
    world.settle();
    assert_eq!(world.budgets(), (1, 0, 0), "a suspension is neither failure nor disruption");
    assert_eq!(world.summary(), "Unknown Starting");
}

#[test]
fn a_deadline_ends_the_job() {
    let mut world = World::new("  loraConfig: {}\n  activeDeadlineSeconds: 60\n");
    world.pass_preflight();
    let decision = world.settle();
    assert!(decision.requeue_after.is_some_and(|wait| wait.as_secs() <= 60));
    world.wait(60);
    world.settle();
    assert_eq!(world.summary(), "False DeadlineExceeded");
    assert!(world.observed.jobs.iter().all(|job| job.ended.is_some()), "nothing runs on");
}

#[test]
fn a_finished_job_is_deleted_after_its_ttl() {
    let mut world = World::new("  loraConfig: {}\n  ttlSecondsAfterFinished: 30\n");
    world.pass_preflight();
    world.settle();
    world.succeed();
    let decision = world.settle();
    assert_eq!(decision.requeue_after.map(|wait| wait.as_secs()), Some(30));
    world.wait(30);
    let decision = world.decide();
    assert_eq!(decision.actions, [Action::DeleteSelf]);
}

#[test]
fn a_queue_decides_when_the_pod_starts() {
    let mut world = World::new("  loraConfig: {}\n");
    world.job.metadata.labels = Some([(QUEUE_LABEL.to_owned(), "research".to_owned())].into());
    world.pass_preflight();
    world.settle();
    assert_eq!(world.summary(), "Unknown Queued");
    world.observed.jobs.last_mut().unwrap().is_suspended = false;
    world.settle();
    assert_eq!(world.summary(), "Unknown Starting");
}
