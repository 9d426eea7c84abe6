//! What users of a namespace do to the operator's objects in it.

use finetune_api::{FineTuneJob, Step};
use finetune_contract::Parallelism;
use finetune_operator::operator::{
    job::build::{self, Attempt, digest},
    settings::Settings,
};
use k8s_openapi::api::batch::v1::Job;
use kube::{
    ResourceExt,
    api::{Patch, PatchParams, PostParams},
};
use serde_json::json;

use crate::test_namespace::{TestNamespace, variable};

#[tokio::test]
async fn a_job_that_somebody_else_creates_for_an_attempt_is_deleted() {
    let Some(test) = TestNamespace::new("squatted").await else { return };
    let mut job = test.job("squatted");
    job["spec"]["approval"] = json!("Manual");
    let parent = test.apply(&job).await;
    test.wait("squatted", "Unknown AwaitingApproval").await;
    // Everything by which the operator finds its Jobs, and another program.
    let foreign: Job = serde_json::from_value(json!({
        "metadata": {
            "name": "squatted-0",
            "labels": {
                "app.kubernetes.io/managed-by": "finetune-operator",
                "finetune.dev/job": "squatted", "finetune.dev/step": "training",
            },
            "ownerReferences": [{
                "apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "controller": true,
                "name": "squatted", "uid": parent.uid(),
            }],
        },
        "spec": {
            "backoffLimit": 0,
            "template": {"spec": {
                "restartPolicy": "Never", "automountServiceAccountToken": false,
                "securityContext": {
                    "runAsNonRoot": true, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"},
                },
                "containers": [{
                    "name": "trainer", "image": variable("FINETUNE_TEST_PROBE_IMAGE"),
                    "imagePullPolicy": "Never", "command": ["bash", "-c", "sleep 600"],
                    "securityContext": {
                        "allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]},
                    },
                }],
            }},
        },
    }))
    .unwrap();
    let foreign = test.children.create(&PostParams::default(), &foreign).await.unwrap().uid();
    let approval = Patch::Merge(json!({"spec": {"approval": "Auto"}}));
    test.jobs.patch("squatted", &PatchParams::default(), &approval).await.unwrap();
    test.wait("squatted", "True Succeeded").await;
    let attempt = test.status("squatted").await.attempt.unwrap();
    assert_eq!(attempt.number, 0, "it cost no attempt");
    assert_ne!(attempt.job_uid, foreign);
    test.verify("squatted");
}

#[tokio::test]
async fn the_apiserver_changes_nothing_that_tells_a_job_from_others() {
    let Some(test) = TestNamespace::new("digest").await else { return };
    let settings = "trainerImage: trainer:1\naccelerators: [{name: cpu, cpu: 2, memoryGiB: 4, bf16Tflops: 0.5, fp32Tflops: 0.2, hasBf16: true}]\nenvironment: {EMPTY: ''}\n";
    let settings = Settings::parse(settings).unwrap();
    let mut parent: FineTuneJob = serde_json::from_value(test.job("digest")).unwrap();
    parent.metadata.uid = Some("0a1b2c3d-0000-0000-0000-000000000000".to_owned());
    for step in [Step::Preflight, Step::Training] {
        let parallelism = Parallelism::SINGLE;
        let attempt = Attempt { step, number: 0, config: "{}", place: None, parallelism };
        let job = build::job(&parent, &settings, &attempt);
        let dry_run = PostParams { dry_run: true, ..PostParams::default() };
        let stored = test.children.create(&dry_run, &job).await.unwrap();
        assert_ne!(stored.spec, job.spec, "it fills in what is left out");
        assert_eq!(digest::of_pods(&stored), digest::of_pods(&job), "{step:?}");
    }
}
