//! What the preflight and the spec itself refuse.

use finetune_contract::{PreflightReport, Problem, ProblemReason, render};
use finetune_plan::testing;

use crate::operator::job::{conditions::Kind, testing::World};

#[test]
fn a_uri_that_cannot_be_parsed_is_refused_before_any_pod() {
    let mut world = World::new("");
    world.job.spec.dataset.train = Some("s3://bucket/../rows.jsonl".to_owned());
    world.settle();
    assert_eq!(world.summary(), "False InvalidSpec");
    insta::assert_snapshot!(world.message(), @r#"spec.dataset.train: "s3://bucket/../rows.jsonl" contains a relative path segment (`.` or `..`), which an object URI cannot have"#);
    assert!(world.observed.jobs.is_empty());
}

#[test]
fn problems_of_the_preflight_end_the_job_before_training() {
    let mut world = World::new("");
    world.settle();
    let mut report = testing::report(testing::smollm2(), 1);
    report.problems = vec![Problem {
        reason: ProblemReason::InvalidDataset,
        location: "train.jsonl:3".to_owned(),
        message: "is not JSON".to_owned(),
    }];
    report.problems_total = 7;
    world.end(Some(65), &render(&report));
    world.settle();
    assert_eq!(world.summary(), "False InvalidDataset");
    assert_eq!(world.condition(Kind::Accepted), "False InvalidDataset");
    assert_eq!(world.message(), "train.jsonl:3: is not JSON\nand 6 more");
    assert_eq!(world.observed.jobs.len(), 1);
}

#[test]
fn a_store_that_does_not_answer_is_retried_with_backoff() {
    let mut world = World::new("");
    world.settle();
    let mut report = testing::report(testing::smollm2(), 1);
    report.problems = vec![Problem {
        reason: ProblemReason::Unavailable,
        location: "s3://b".to_owned(),
        message: "timed out".to_owned(),
    }];
    for (failures, wait) in [(1, 10), (2, 20)] {
        world.end(Some(69), &render(&report));
        let decision = world.settle();
        assert_eq!(world.summary(), "Unknown Retrying");
        assert_eq!(world.budgets(), (failures, failures, 0));
        assert_eq!(decision.requeue_after.map(|wait| wait.as_secs()), Some(wait));
        world.wait(wait as i64);
        world.settle();
        assert_eq!(world.summary(), "Unknown Preflight");
    }
    world.end(Some(69), &render(&report));
    world.settle();
    assert_eq!(world.summary(), "False StoreUnavailable");
    assert!(world.message().contains("after 3 failed attempts"), "{}", world.message());
}

#[test]
fn a_run_that_is_too_large_waits_or_fails_by_what_would_help() {
    let large = |lines: &str, accelerators: usize| {
        let mut world = World::new(lines);
        world.settings.accelerators.truncate(accelerators);
        world.settle();
        let report = testing::report(testing::llama_8b(), 1);
        world.end(Some(0), &render(&report));
        world.settle();
        world.summary()
    };
    assert_eq!(large("", 2), "Unknown TrainerImageMissing");
    assert_eq!(large("", 1), "False NoAcceleratorFits");
    assert_eq!(large("  loraConfig: {}\n", 2), "Unknown TrainerImageMissing");
    assert_eq!(large("  loraConfig: {}\n", 1), "False NoAcceleratorFits");
}

#[test]
fn a_report_of_another_release_says_so() {
    let mut world = World::new("");
    world.settle();
    world.end(Some(0), "{\"version\": 2}");
    world.settle();
    assert_eq!(world.summary(), "False TrainerFailed");
    assert!(world.message().contains("same release"), "{}", world.message());
}

#[test]
fn local_files_are_refused_before_any_pod() {
    let mut world = World::new("");
    world.job.spec.dataset.train = Some("file:///data/train.jsonl".to_owned());
    world.settle();
    assert_eq!(world.summary(), "False InvalidSpec");
    assert!(world.message().contains("spec.dataset.train"), "{}", world.message());
    assert!(world.observed.jobs.is_empty());
}

#[test]
fn the_report_fits_what_a_preflight_really_writes() {
    let report: PreflightReport = testing::report(testing::llama_8b(), 1);
    assert!(render(&report.fit()).len() <= finetune_contract::TERMINATION_MESSAGE_LIMIT);
}

#[test]
fn an_output_that_overlaps_an_input_starts_no_pod() {
    for (output, overwrite) in [
        ("s3://data", false),
        ("s3://data/train.jsonl", true),
        ("s3://data/train.jsonl/out/", true),
    ] {
        let mut world = World::new("");
        world.job.spec.output.uri = output.to_owned();
        world.job.spec.output.overwrite = Some(overwrite);
        world.settle();
        assert_eq!(world.summary(), "False InvalidSpec", "{output}");
        assert!(world.observed.jobs.is_empty());
        assert!(world.message().contains("spec.dataset.train"), "{}", world.message());
    }
}
