//! What an administrator and the scheduler do to a node: jobs go on, and it costs them no retry.

use std::process::{Command, Stdio};

use k8s_openapi::api::{
    core::v1::{Node, Pod},
    scheduling::v1::PriorityClass,
};
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, Patch, PatchParams, PostParams},
};
use serde_json::json;
use tokio::sync::Mutex;

use crate::{
    faults::goes_on,
    test_namespace::{TestNamespace, variable},
};

const NODE: &str = "node0";
/// A resource that only the two pods of one test want, so that no other is preempted.
const SEAT: &str = "e2e.finetune.dev/seat";
/// Held by whoever decides about the node: a pod that may not be placed has not been preempted.
static NODE_IS_OURS: Mutex<()> = Mutex::const_new(());

fn kubectl(arguments: &[&str]) {
    let mut command = Command::new(variable("FINETUNE_TEST_KUBECTL"));
    let output = command.args(arguments).stdin(Stdio::null()).output().unwrap();
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "kubectl {arguments:?}: {complaint}");
}

/// A node that takes no pods, until this is dropped.
struct Cordon;

impl Drop for Cordon {
    fn drop(&mut self) {
        kubectl(&["uncordon", NODE]);
    }
}

#[tokio::test]
async fn a_drained_node_ends_a_try_and_no_job() {
    let Some(test) = TestNamespace::new("drained").await else { return };
    let _ours = NODE_IS_OURS.lock().await;
    test.apply(&test.long_job("drained")).await;
    test.wait_for_training("drained").await;
    let cordon = Cordon;
    // Of this test's pods only: the others are in other tests.
    let ours = "--pod-selector=finetune.dev/job=drained,finetune.dev/step=training";
    kubectl(&["drain", NODE, ours, "--delete-emptydir-data", "--timeout=90s"]);
    test.wait("drained", "Unknown Unschedulable").await;
    let message = test.message("drained", "Succeeded").await;
    assert!(message.contains("unschedulable"), "the scheduler's own words: {message}");
    drop(cordon);
    goes_on(&test, "drained").await;
}

#[tokio::test]
async fn a_preempted_pod_goes_on_when_there_is_room_again() {
    let Some(test) = TestNamespace::new("preempted").await else { return };
    let _ours = NODE_IS_OURS.lock().await;
    let nodes: Api<Node> = Api::all(test.client.clone());
    let seat = json!({"status": {"capacity": {SEAT: "1"}, "allocatable": {SEAT: "1"}}});
    nodes.patch_status(NODE, &PatchParams::default(), &Patch::Merge(seat)).await.unwrap();
    let class: PriorityClass = serde_json::from_value(json!({
        "metadata": {"name": "e2e-urgent"}, "value": 1_000_000, "preemptionPolicy": "PreemptLowerPriority",
    }))
    .unwrap();
    let classes: Api<PriorityClass> = Api::all(test.client.clone());
    if classes.get_opt("e2e-urgent").await.unwrap().is_none() {
        classes.create(&PostParams::default(), &class).await.unwrap();
    }

    let mut job = test.long_job("preempted");
    job["spec"]["resources"]["limits"][SEAT] = json!("1");
    test.apply(&job).await;
    let victim = test.wait_for_training("preempted").await;
    let urgent: Pod = serde_json::from_value(json!({
        "metadata": {"name": "urgent"},
        "spec": {
            "priorityClassName": "e2e-urgent",
            "terminationGracePeriodSeconds": 0,
            "securityContext": {
                "runAsNonRoot": true, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [{
                "name": "urgent", "image": variable("FINETUNE_TEST_PROBE_IMAGE"),
                "imagePullPolicy": "Never", "command": ["sleep", "600"],
                "resources": {"limits": {SEAT: "1"}},
                "securityContext": {
                    "allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]},
                },
            }],
        },
    }))
    .unwrap();
    test.pods.create(&PostParams::default(), &urgent).await.unwrap();
    test.until("the urgent pod runs", || async {
        let phase = test.pods.get("urgent").await.unwrap().status?.phase?;
        (phase == "Running").then_some(())
    })
    .await;
    test.wait("preempted", "Unknown Unschedulable").await;
    let attempt = test.status("preempted").await.attempt.unwrap();
    assert_eq!((attempt.failures, attempt.disruptions), (0, 1), "{attempt:?}");
    let next = test.training_pods("preempted").await;
    assert!(next.iter().all(
        |pod| pod.name_any() != victim.name_any() || pod.metadata.deletion_timestamp.is_none()
    ));
    test.pods.delete("urgent", &DeleteParams::default()).await.unwrap();
    goes_on(&test, "preempted").await;
}
