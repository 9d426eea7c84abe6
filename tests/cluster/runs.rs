//! Jobs on a real model, from `kubectl apply` to a verified result.

use serde_json::json;

use crate::test_namespace::{TestNamespace, real_model};

/// SmolLM2 for a few steps: long enough to see all, short enough to wait for.
fn real_job(test: &TestNamespace, name: &str, steps: u32) -> serde_json::Value {
    let mut job = test.job(name);
    job["spec"]["model"]["uri"] = json!(real_model());
    job["spec"]["training"] =
        json!({"maxSteps": steps, "contextLength": 64, "trainBatchSizePerDevice": 2});
    job
}

#[tokio::test]
async fn an_adapter_of_a_real_model_is_published_and_proven() {
    let Some(test) = TestNamespace::new("lora").await else { return };
    test.apply(&real_job(&test, "lora", 3)).await;
    test.wait("lora", "True Succeeded").await;
    let status = test.status("lora").await;
    let plan = status.plan.unwrap();
    assert_eq!((plan.method.as_str(), plan.accelerator.as_str()), ("LoRA", "cpu"));
    assert!(plan.summary.contains("1221120 trained parameters"), "{}", plan.summary);
    let result = status.result.unwrap();
    assert_eq!((result.kind.as_str(), result.steps), ("Adapter", 3));
    assert_eq!(result.uri, test.uri("out/lora"));
    assert!(result.measured_peak_bytes < plan.pod.memory_bytes);
    let published = test.message("lora", "Published").await;
    assert!(published.contains("read back and verified"), "{published}");
    assert!(status.start_time.is_some() && status.completion_time.is_some());
    test.verify("lora");
}

#[tokio::test]
async fn a_whole_real_model_is_trained_and_published() {
    let Some(test) = TestNamespace::new("full").await else { return };
    let mut job = real_job(&test, "full", 2);
    job["spec"].as_object_mut().unwrap().remove("loraConfig");
    test.apply(&job).await;
    test.wait("full", "True Succeeded").await;
    let status = test.status("full").await;
    assert_eq!(status.plan.unwrap().method, "Full");
    assert_eq!(status.result.unwrap().kind, "FullModel");
    test.verify("full");
}

#[tokio::test]
async fn approval_and_suspension_wait_for_a_person() {
    let Some(test) = TestNamespace::new("wishes").await else { return };
    let mut job = test.long_job("approved");
    job["spec"]["approval"] = json!("Manual");
    test.apply(&job).await;
    test.wait("approved", "Unknown AwaitingApproval").await;
    assert!(test.training_pods("approved").await.is_empty());
    patch(&test, "approved", &json!({"approval": "Auto"})).await;
    test.wait_for_training("approved").await;
    patch(&test, "approved", &json!({"suspend": true})).await;
    test.wait("approved", "Unknown Suspended").await;
    assert!(test.training_pods("approved").await.is_empty(), "a suspended job holds no pod");
    patch(&test, "approved", &json!({"suspend": false})).await;
    test.wait("approved", "True Succeeded").await;
    let attempt = test.status("approved").await.attempt.unwrap();
    assert_eq!((attempt.failures, attempt.disruptions), (0, 0));
    assert!(attempt.number > 0, "it continued as a new attempt");
    test.verify("approved");
}

async fn patch(test: &TestNamespace, name: &str, spec: &serde_json::Value) {
    let patch = kube::api::Patch::Merge(json!({"spec": spec}));
    test.jobs.patch(name, &kube::api::PatchParams::default(), &patch).await.unwrap();
}
