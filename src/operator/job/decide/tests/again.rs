//! Jobs that are created again, and results that are already published.

use std::collections::BTreeSet;

use finetune_contract::{
    ArtifactKind, Outcome, OutputState, PreflightReport, Problem, ProblemReason, RunConfig, RunId,
    parse,
};

use crate::operator::job::{conditions::Kind, decide::Action, observe::Observed, testing::World};

#[test]
fn a_job_created_again_on_the_same_inputs_says_that_nothing_was_trained() {
    let mut world = World::new("  loraConfig: {}\n  ttlSecondsAfterFinished: 60\n");
    world.pass_preflight();
    world.settle();
    let first = world.run_id();
    let published = world.published();
    world.succeed();
    world.settle();
    assert_eq!(world.summary(), "True Succeeded");
    world.wait(61);
    assert!(world.decide().actions.contains(&Action::DeleteSelf));

    // However often it is created again: no training pod, and no claim of a proof.
    for uid in ["second", "third"] {
        world.create_again(uid);
        world.pass_preflight_with(|report| {
            report.output = Some(OutputState::SameInputs);
            report.published = Some(published.clone());
        });
        assert_eq!(world.summary(), "True AlreadyPublished");
        assert_eq!(world.condition(Kind::Published), "True AlreadyPublished");
        assert_eq!(world.observed.jobs.len(), 1, "only the preflight's");
        assert_ne!(world.run_id(), first, "it is another run");
        let message = world.message();
        assert!(message.contains("nothing was trained") && message.contains(&first), "{message}");
        assert!(!message.contains("verified"), "{message}");
        let result = world.job.status.as_ref().unwrap().result.clone().unwrap();
        assert_eq!((result.steps, result.uri.as_str()), (10, "s3://data/minimal"));
    }
}

#[test]
fn a_job_created_again_on_refreshed_rows_is_refused_or_replaces_the_result_and_never_claims_it() {
    let other = |report: &mut PreflightReport| report.output = Some(OutputState::OtherInputs);
    let mut world = World::new("  loraConfig: {}\n");
    world.pass_preflight_with(other);
    assert_eq!(world.summary(), "False OutputExists");
    assert_eq!(world.observed.jobs.len(), 1);

    // Every week on a new file.
    world.job.spec.output.overwrite = Some(true);
    let mut runs = BTreeSet::new();
    for uid in ["week-1", "week-2", "week-3"] {
        world.create_again(uid);
        world.pass_preflight_with(other);
        assert_eq!(world.summary(), "Unknown Starting", "it trains");
        runs.insert(world.run_id());
        world.succeed();
        world.settle();
        assert_eq!(world.summary(), "True Succeeded");
        assert_eq!(world.condition(Kind::Published), "True Proven");
    }
    assert_eq!(runs.len(), 3, "each with checkpoints of its own");
}

#[test]
fn a_job_created_again_with_other_settings_does_not_claim_the_result() {
    let mut world = World::new("  loraConfig: {}\n");
    world.pass_preflight();
    world.settle();
    let published = world.published();
    let same_rows = |report: &mut PreflightReport| {
        report.output = Some(OutputState::SameInputs);
        report.published = Some(published.clone());
    };
    world.create_again("second");
    world.job.spec.training = Some(serde_json::from_value(serde_json::json!({"seed": 7})).unwrap());
    world.pass_preflight_with(same_rows);
    assert_eq!(world.summary(), "False OutputExists");
    insta::assert_snapshot!(world.message().replace(&published.run_id.0, "RUN"), @"spec.output.uri: s3://data/minimal holds a result of the same rows and model, made with other settings (by run RUN; they are in its finetune-manifest.json): choose another uri, or set output.overwrite: true to replace it");
    world.create_again("third");
    world.job.spec.output.overwrite = Some(true);
    world.pass_preflight_with(same_rows);
    assert_eq!(world.summary(), "Unknown Starting");
}

#[test]
fn a_job_that_failed_on_bad_rows_trains_when_it_is_created_again() {
    let mut world = World::new("  loraConfig: {}\n");
    world.pass_preflight_with(|report| {
        report.problems = vec![Problem {
            reason: ProblemReason::InvalidDataset,
            location: "train.jsonl:3".to_owned(),
            message: "is not JSON".to_owned(),
        }];
    });
    assert_eq!(world.summary(), "False InvalidDataset");
    world.create_again("second");
    world.pass_preflight();
    world.settle();
    assert_eq!(world.summary(), "Unknown Starting");
}

#[test]
fn a_trainer_that_finds_its_inputs_published_ends_the_run_without_a_proof() {
    let mut world = World::new("  loraConfig: {}\n");
    world.pass_preflight();
    world.settle();
    let report = world.report(Outcome::AlreadyPublished {
        kind: ArtifactKind::Adapter,
        uri: world.output(),
        manifest_sha256: "0".repeat(64),
        by: RunId("other-1".to_owned()),
    });
    world.end(Some(0), &report);
    world.settle();
    assert_eq!(world.summary(), "True AlreadyPublished");
    insta::assert_snapshot!(world.message(), @"the same inputs are already published at s3://data/minimal (by run other-1); nothing was trained");
}

#[test]
fn a_run_that_an_earlier_release_planned_keeps_its_id() {
    let mut world = World::new("  loraConfig: {}\n");
    world.pass_preflight();
    world.settle();
    // As it stored it: the id by name and manifest.
    let plan = world.job.status.as_mut().unwrap().plan.as_mut().unwrap();
    let stored = plan.run_config.replace(&plan.run_id, "minimal-813dde86");
    assert_ne!(stored, plan.run_config);
    (plan.run_id, plan.run_config) = ("minimal-813dde86".to_owned(), stored);
    world.observed = Observed::default();
    world.settle();
    // A new attempt, of the new release, resumes from the checkpoints of the run.
    assert_eq!(world.run_id(), "minimal-813dde86");
    let config_text = world.job.status.as_ref().unwrap().plan.as_ref().unwrap().run_config.clone();
    let config: RunConfig = parse(&config_text).unwrap();
    assert_eq!(config.run_id.0, "minimal-813dde86");
    assert!(config.checkpoints_uri.path.ends_with(".checkpoints/minimal-813dde86"));
    world.wait(3);
    world.settle();
    world.succeed();
    world.settle();
    assert_eq!(world.summary(), "True Succeeded");
}
