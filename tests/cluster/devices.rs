//! Runs on devices, as far as a cluster without one can tell: where they are placed, what their pods
//! ask for, and what is said when a pod finds no device it can use.
//!
//! The node advertises two of a made-up resource. The operator runs in this process.

use std::sync::Arc;

use finetune_operator::operator::{
    job::controller::Operator, runtime::metrics::Metrics, settings::Settings,
};
use k8s_openapi::api::core::v1::Pod;
use serde_json::json;

use crate::test_namespace::{TestNamespace, real_model, variable};

const RESOURCE: &str = "finetune.dev/test-gpu";

/// One device holds adapters of the real model, but only two hold all of it as it is trained whole.
fn settings(namespace: &str) -> Settings {
    let image = variable("FINETUNE_TEST_TRAINER_IMAGE");
    let endpoint = variable("FINETUNE_TEST_S3_ENDPOINT");
    Settings::parse(&format!(
        "trainerImage: {image}\nimagePullPolicy: Never\nnamespaces: [{namespace}]\nretries: 0\npreflight: {{cpu: 0.2, memoryGiB: 0.5, storageGiB: 1}}\naccelerators: [{{name: test-gpu, resourceName: {RESOURCE}, image: '{image}', gpusPerNode: 2, cpu: 0.1, memoryGiB: 4, bf16Tflops: 1, fp32Tflops: 1, hasBf16: true}}]\nenvironment: {{AWS_ENDPOINT_URL: '{endpoint}', AWS_ALLOW_HTTP: 'true', AWS_REGION: us-east-1}}\n"
    ))
    .unwrap()
}

/// Returns how many devices a pod asks for.
fn devices(pod: &Pod) -> Option<&str> {
    let resources = pod.spec.as_ref()?.containers[0].resources.as_ref()?;
    resources.limits.as_ref()?.get(RESOURCE).map(|count| count.0.as_str())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_for_devices_gets_them_and_says_when_they_do_not_work() {
    let Some(test) = TestNamespace::new("devices").await else { return };
    test.advertise(RESOURCE, 2).await;
    let scope = Some(test.namespace.clone());
    let metrics = Metrics::new().unwrap();
    let operator =
        Operator::new(test.client.clone(), settings(&test.namespace), metrics, "test", scope);
    let operator = tokio::spawn(Arc::new(operator.unwrap()).run(std::future::pending()));

    let model = json!(real_model());
    for (name, is_lora, count, words) in [
        ("one", true, "1", "on one test-gpu"),
        ("two", false, "2", "over 2 ranks, each on one test-gpu"),
    ] {
        let mut job = test.job(name);
        job["spec"]["model"]["uri"] = model.clone();
        job["spec"]["training"] = json!({"maxSteps": 2, "contextLength": 64});
        if !is_lora {
            job["spec"].as_object_mut().unwrap().remove("loraConfig");
        }
        test.apply(&job).await;
        test.wait(name, "False DeviceUnavailable").await;
        let message = test.message(name, "Succeeded").await;
        assert!(message.contains("built without CUDA"), "{message}");
        let planned = test.message(name, "Planned").await;
        assert!(planned.contains(words), "{planned}");
        // The ranks of a node share a pod.
        let pods = test.training_pods(name).await;
        assert_eq!(pods.len(), 1, "{planned}");
        assert_eq!(devices(&pods[0]), Some(count), "{planned}");
    }
    operator.abort();
}
