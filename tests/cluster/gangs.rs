//! A run over several pods gets nodes for all of them or for none.
//!
//! Kubernetes does it, not the operator: see the feature gates of the test cluster. The operator runs
//! in this process, and each pod asks for one of a made-up resource of which the node has too few.

use std::{sync::Arc, time::Duration};

use finetune_operator::operator::{
    job::controller::Operator, runtime::metrics::Metrics, settings::Settings,
};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api,
    api::{ApiResource, DynamicObject, GroupVersionKind, ListParams},
};
use serde_json::json;

use crate::test_namespace::{TestNamespace, real_model, variable};

const RESOURCE: &str = "finetune.dev/test-slot";
/// How often, and with what between, it is seen that nothing was placed: for longer than the
/// scheduler's first tries again.
const LOOKS: u32 = 10;
const BETWEEN_LOOKS: Duration = Duration::from_secs(1);

fn settings(namespace: &str) -> Settings {
    let image = variable("FINETUNE_TEST_TRAINER_IMAGE");
    let endpoint = variable("FINETUNE_TEST_S3_ENDPOINT");
    Settings::parse(&format!(
        "trainerImage: {image}\nimagePullPolicy: Never\nnamespaces: [{namespace}]\npreflight: {{cpu: 0.2, memoryGiB: 0.5, storageGiB: 1}}\naccelerators: [{{name: cpu, cpu: 0.3, memoryGiB: 2.5, bf16Tflops: 0.4, fp32Tflops: 0.2, hasBf16: true}}]\nenvironment: {{AWS_ENDPOINT_URL: '{endpoint}', AWS_ALLOW_HTTP: 'true', AWS_REGION: us-east-1}}\n"
    ))
    .unwrap()
}

/// Tells that the scheduler looked for a node for a pod and found none.
fn is_refused(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_deref());
    conditions
        .unwrap_or_default()
        .iter()
        .any(|condition| condition.type_ == "PodScheduled" && condition.status == "False")
}

fn has_node(pod: &Pod) -> bool {
    pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_some())
}

/// Lists how many pods must be placed together, by group of the namespace.
async fn gangs(test: &TestNamespace) -> Vec<Option<u64>> {
    let kind = GroupVersionKind::gvk("scheduling.k8s.io", "v1alpha2", "PodGroup");
    let groups: Api<DynamicObject> = Api::namespaced_with(
        test.client.clone(),
        &test.namespace,
        &ApiResource::from_gvk_with_plural(&kind, "podgroups"),
    );
    let groups = groups.list(&ListParams::default()).await.unwrap().items;
    let size = |group: &DynamicObject| {
        group.data.pointer("/spec/schedulingPolicy/gang/minCount")?.as_u64()
    };
    groups.iter().map(size).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_over_two_pods_gets_nodes_for_both_or_for_none() {
    let Some(test) = TestNamespace::new("gangs").await else { return };
    test.advertise(RESOURCE, 1).await;
    let scope = Some(test.namespace.clone());
    let metrics = Metrics::new().unwrap();
    let operator =
        Operator::new(test.client.clone(), settings(&test.namespace), metrics, "test", scope);
    let operator = tokio::spawn(Arc::new(operator.unwrap()).run(std::future::pending()));

    let mut job = test.job("gang");
    job["spec"].as_object_mut().unwrap().remove("loraConfig");
    job["spec"]["model"]["uri"] = json!(real_model());
    job["spec"]["training"] = json!({
        "maxSteps": 2, "contextLength": 64, "trainBatchSizePerDevice": 1,
        "gradientAccumulationSteps": 2,
    });
    job["spec"]["resources"] = json!({"limits": {RESOURCE: "1"}});
    test.apply(&job).await;
    test.until("the scheduler refused both pods", || async {
        let pods = test.training_pods("gang").await;
        (pods.len() == 2 && pods.iter().all(is_refused)).then_some(())
    })
    .await;
    test.wait("gang", "Unknown Unschedulable").await;
    assert_eq!(gangs(&test).await, [Some(2)]);
    // One of them would have a place.
    for _ in 0..LOOKS {
        let pods = test.training_pods("gang").await;
        assert_eq!(pods.len(), 2);
        assert!(!pods.iter().any(has_node), "{pods:#?}");
        assert_eq!(test.summary("gang").await, "Unknown Unschedulable");
        let message = test.message("gang", "Succeeded").await;
        assert!(message.starts_with("none of 2 pods has a node"), "{message}");
        assert!(message.contains(&format!("1 Insufficient {RESOURCE}")), "{message}");
        tokio::time::sleep(BETWEEN_LOOKS).await;
    }

    test.advertise(RESOURCE, 2).await;
    test.wait("gang", "True Succeeded").await;
    let attempt = test.status("gang").await.attempt.unwrap();
    assert_eq!((attempt.number, attempt.failures, attempt.disruptions), (0, 0, 0), "{attempt:?}");
    operator.abort();
}
