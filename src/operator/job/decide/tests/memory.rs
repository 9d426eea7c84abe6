//! Attempts that run out of memory.

use finetune_contract::{FailureReason, Outcome, RunConfig, parse};

use crate::operator::job::{conditions::Kind, testing::World};

#[test]
fn out_of_memory_takes_the_fallbacks_and_ends_with_what_is_missing() {
    let mut world = World::new("  loraConfig: {}\n");
    world.pass_preflight();
    world.settle();
    let config = |world: &World| -> RunConfig {
        let plan = world.job.status.as_ref().unwrap().plan.clone().unwrap();
        parse(&plan.run_config).unwrap()
    };
    let first = config(&world);
    assert_eq!(first.training.micro_batch_size, 8);
    world.end(Some(137), "");
    let decision = world.settle();
    assert_eq!(world.summary(), "Unknown Adapted");
    insta::assert_snapshot!(world.message(), @"from attempt 1 on: trainBatchSizePerDevice 4 instead of 8, gradientAccumulationSteps 4 instead of 2: 16 sequences per step and the same result, in 583 MB instead of 967 MB, because the trainer was OOM-killed at its memory limit (1.68 GB)");
    assert_eq!(world.condition(Kind::Planned), "True Adapted");
    let plan = world.job.status.as_ref().unwrap().plan.clone().unwrap();
    assert!(plan.summary.contains("\nAdapted\n  from attempt 1 on: "), "{}", plan.summary);
    assert_eq!(
        plan.predicted_peak_bytes,
        i64::try_from(config(&world).predicted_peak_bytes).unwrap()
    );
    assert_eq!(decision.requeue_after.map(|wait| wait.as_secs()), Some(2));
    // The run of the checkpoint continues: the same name, the same sequences per step.
    let second = config(&world);
    assert_eq!((second.training.micro_batch_size, second.run_id), (4, first.run_id.clone()));
    world.wait(2);
    world.settle();
    assert_eq!(world.summary(), "Unknown Starting");
    assert_eq!(world.condition(Kind::Planned), "True Adapted", "it stays to be read");
    // A trainer that reports it, and then the kernel each time: it ends, and costs no retry.
    let failed = Outcome::Failed {
        reason: FailureReason::OutOfMemory,
        message: "the device ran out of memory".to_owned(),
    };
    world.end(Some(71), &world.report(failed));
    world.settle();
    let mut number = 2;
    while world.summary() == "Unknown Adapted" {
        assert_eq!(world.budgets(), (number, 0, 0));
        assert_eq!(config(&world).global_batch_size(), first.global_batch_size());
        world.wait(2);
        world.settle();
        let ranks = config(&world).parallelism.world_size;
        assert_eq!(world.observed.jobs.last().unwrap().ranks, ranks);
        world.observed.jobs.last_mut().unwrap().ended = Some(false);
        for rank in 0..ranks {
            world.end_rank(rank, 137, "");
        }
        world.settle();
        number += 1;
    }
    assert_eq!(world.summary(), "False OutOfMemory");
    insta::assert_snapshot!(world.message(), @"the trainer was OOM-killed at its memory limit (1.68 GB), and no smaller configuration is left to try: 190 MB was predicted, but a limit of 1.68 GB, 1.49 GB more, was not enough. Lower training.contextLength, or set resources.limits.memory");
}

#[test]
fn a_limit_below_every_fallback_is_not_retried() {
    let mut world = World::new(
        "  loraConfig: {}\n  training: {trainBatchSizePerDevice: 8}\n  resources: {limits: {memory: 24Mi}}\n",
    );
    world.pass_preflight();
    world.settle();
    world.end(Some(137), "");
    world.settle();
    assert_eq!(world.summary(), "False OutOfMemory");
    insta::assert_snapshot!(world.message(), @"the trainer was OOM-killed at its memory limit (25 MB), and no smaller configuration is left to try: at least 190 MB is needed, 164 MB above the limit of 25 MB. Lower training.contextLength, or set resources.limits.memory");
}
