//! Jobs that an earlier release left in the cluster: `upgrade.json` holds FineTuneJobs with their
//! status and the Jobs of their attempts, as release b62728c wrote them.

use k8s_openapi::api::{
    batch::v1::Job,
    core::v1::{ContainerState, ContainerStateRunning, ContainerStatus, Pod, PodStatus},
};
use kube::ResourceExt;
use serde_json::{Value, json};

use crate::operator::job::{
    build::names::CONTAINER,
    conditions::Kind,
    observe::{Observed, observe_job, observe_pod},
    testing::World,
};

const STORED: &str = include_str!("upgrade.json");

/// Returns the world of a stored case, in which each Job's pods run.
fn world(case: &str) -> World {
    let stored: Value = serde_json::from_str(STORED).unwrap();
    let mut world = World::new("");
    world.job = serde_json::from_value(stored[case]["fineTuneJob"].clone()).unwrap();
    let jobs: Vec<Job> = serde_json::from_value(stored[case]["jobs"].clone()).unwrap();
    world.observed = Observed {
        pods: jobs.iter().flat_map(running_pods).map(|pod| observe_pod(&pod)).collect(),
        jobs: jobs.iter().map(observe_job).collect(),
        ..Observed::default()
    };
    world
}

/// Creates the pods of a Job as its controller and a kubelet do.
fn running_pods(job: &Job) -> Vec<Pod> {
    let spec = job.spec.as_ref().unwrap();
    let owner = json!([{
        "apiVersion": "batch/v1", "kind": "Job", "controller": true,
        "name": job.name_any(), "uid": job.uid().unwrap(),
    }]);
    let pod = |rank: i32| {
        let mut metadata = spec.template.metadata.clone().unwrap_or_default();
        metadata.name = Some(format!("{}-{rank}-abcde", job.name_any()));
        metadata.uid = Some(format!("pod-{rank}"));
        metadata.owner_references = serde_json::from_value(owner.clone()).unwrap();
        let index = ("batch.kubernetes.io/job-completion-index".to_owned(), rank.to_string());
        metadata.annotations.get_or_insert_default().extend([index]);
        let running = ContainerState {
            running: Some(ContainerStateRunning::default()),
            ..ContainerState::default()
        };
        let status = ContainerStatus {
            name: CONTAINER.to_owned(),
            state: Some(running),
            ..ContainerStatus::default()
        };
        let status = PodStatus { container_statuses: Some(vec![status]), ..PodStatus::default() };
        Pod { metadata, spec: spec.template.spec.clone(), status: Some(status) }
    };
    (0..spec.completions.unwrap_or(1)).map(pod).collect()
}

#[test]
fn a_preflight_of_an_earlier_release_is_taken_over() {
    let mut world = world("preflight");
    world.settle();
    assert_eq!((world.summary().as_str(), world.observed.jobs.len()), ("Unknown Preflight", 1));
    world.pass_preflight();
    world.settle();
    assert_eq!(world.summary(), "Unknown Starting");
    world.succeed();
    world.settle();
    assert_eq!(world.summary(), "True Succeeded");
}

#[test]
fn a_training_of_an_earlier_release_keeps_its_plan_and_its_pods() {
    for (case, ranks) in [("training", 1), ("two-ranks", 2)] {
        let mut world = world(case);
        let plan = world.job.status.as_ref().unwrap().plan.clone().unwrap();
        assert_eq!(world.observed.pods.len(), ranks, "{case}");
        world.settle();
        assert_eq!(world.condition(Kind::Planned), "True Planned", "{case}");
        assert_eq!(world.observed.jobs.len(), 1, "{case}: no second attempt runs");
        // It is resumed from the stored plan if its Job is deleted.
        let number = world.budgets().0;
        world.observed = Observed::default();
        world.settle();
        world.wait(600);
        world.settle();
        assert_eq!(world.budgets().0, number + 1, "{case}");
        assert_eq!(world.job.status.as_ref().unwrap().plan.as_ref(), Some(&plan), "{case}");
        if case == "training" {
            world.succeed();
            world.settle();
            assert_eq!(world.summary(), "True Succeeded");
        }
    }
}

#[test]
fn a_finished_job_of_an_earlier_release_stays_as_it_is() {
    let mut world = world("succeeded");
    let status = world.job.status.clone();
    let decision = world.settle();
    assert!(decision.actions.is_empty());
    assert_eq!(world.job.status, status);
}
