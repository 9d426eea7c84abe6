//! A run over several pods: a model that no pod could train alone, and one pod of two lost on the way.
//!
//! The operator runs in this process; the pods' limit is too small for the run.

use std::{collections::BTreeSet, net::IpAddr, process::Command, sync::Arc};

use finetune_contract::{Progress, RunReport};
use finetune_operator::operator::{
    job::controller::Operator, runtime::metrics::Metrics, settings::Settings,
};
use k8s_openapi::api::{
    core::v1::{Pod, Service},
    networking::v1::NetworkPolicy,
};
use kube::{Api, ResourceExt, api::DeleteParams};
use serde_json::json;

use crate::{
    policies::{End, is_allowed, strict},
    sockets::Watcher,
    test_namespace::{TestNamespace, real_model, variable},
};

const STEPS: i64 = 12;
/// What a pod of this test may take: enough for one of two ranks.
const LIMIT_BYTES: u64 = 2000 << 20;
/// What one process was measured to take of memory for the whole of this model.
const MEASURED: &str = include_str!("../../docs/memory.csv");

fn settings(namespace: &str) -> Settings {
    let image = variable("FINETUNE_TEST_TRAINER_IMAGE");
    let endpoint = variable("FINETUNE_TEST_S3_ENDPOINT");
    Settings::parse(&format!(
        "trainerImage: {image}\nimagePullPolicy: Never\nnamespaces: [{namespace}]\nconfinedNamespaces: [{namespace}]\npreflight: {{cpu: 0.2, memoryGiB: 0.5, storageGiB: 1}}\nterminationGracePeriodSeconds: 10\naccelerators: [{{name: cpu, cpu: 0.3, memoryGiB: 8, bf16Tflops: 0.4, fp32Tflops: 0.2, hasBf16: true}}]\nenvironment: {{AWS_ENDPOINT_URL: '{endpoint}', AWS_ALLOW_HTTP: 'true', AWS_REGION: us-east-1}}\n"
    ))
    .unwrap()
}

/// Returns the pods of an attempt by rank.
async fn ranks(test: &TestNamespace, name: &str, number: i32) -> Vec<Pod> {
    let job = format!("{name}-{number}");
    let mut pods = test.training_pods(name).await;
    pods.retain(|pod| pod.labels().get("batch.kubernetes.io/job-name") == Some(&job));
    let rank = |pod: &Pod| pod.labels()["batch.kubernetes.io/job-completion-index"].clone();
    pods.sort_by_key(rank);
    pods
}

fn address(pod: &Pod) -> Option<String> {
    pod.status.as_ref()?.pod_ip.clone()
}

/// Asks rank 0 itself, which knows more than the status and sooner.
async fn progress(test: &TestNamespace, name: &str) -> Option<Progress> {
    let ranks = ranks(test, name, 0).await;
    let url = format!("http://{}:9464/progress", address(ranks.first()?)?);
    let answer = Command::new("curl").args(["--silent", "--max-time", "2", &url]).output().unwrap();
    finetune_contract::parse(&String::from_utf8_lossy(&answer.stdout)).ok()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_that_no_pod_holds_is_trained_over_two_and_outlives_one() {
    let Some(test) = TestNamespace::new("ranks").await else { return };
    let scope = Some(test.namespace.clone());
    let metrics = Metrics::new().unwrap();
    let operator =
        Operator::new(test.client.clone(), settings(&test.namespace), metrics, "test", scope);
    let operator = tokio::spawn(Arc::new(operator.unwrap()).run(std::future::pending()));

    let mut job = test.job("ranks");
    job["spec"].as_object_mut().unwrap().remove("loraConfig");
    job["spec"]["model"]["uri"] = json!(real_model());
    job["spec"]["training"] = json!({
        "maxSteps": STEPS, "contextLength": 64, "trainBatchSizePerDevice": 1,
        "gradientAccumulationSteps": 2, "checkpointSteps": 3,
    });
    job["spec"]["resources"] = json!({"limits": {"memory": format!("{}Mi", LIMIT_BYTES >> 20)}});
    let alone = MEASURED.lines().filter(|line| line.starts_with("full,"));
    let alone = alone.map(|line| line.rsplit(',').next().unwrap().parse::<u64>().unwrap()).min();
    assert!(alone.unwrap() > LIMIT_BYTES, "one rank could live in {LIMIT_BYTES}: {alone:?}");
    let watcher = Watcher::start();
    test.apply(&job).await;
    test.until("a checkpoint is there, and steps are left", || async {
        let summary = test.summary("ranks").await;
        let is_over = summary.starts_with("True") || summary.starts_with("False");
        assert!(!is_over, "{summary}: {}", test.message("ranks", "Succeeded").await);
        progress(&test, "ranks").await?.checkpoint_step.filter(|step| *step > 0)
    })
    .await;

    let plan = test.status("ranks").await.plan.unwrap();
    assert!(plan.summary.contains("zero3"), "{}", plan.summary);
    let pods = ranks(&test, "ranks", 0).await;
    assert_eq!(pods.len(), 2);
    for pod in &pods {
        let resources = pod.spec.as_ref().unwrap().containers[0].resources.as_ref().unwrap();
        assert_eq!(resources.limits.as_ref().unwrap()["memory"].0, "2000Mi");
    }
    let at_once = DeleteParams::default().grace_period(0);
    test.pods.delete(&pods[1].name_any(), &at_once).await.unwrap();

    test.wait("ranks", "True Succeeded").await;
    let status = test.status("ranks").await;
    let attempt = status.attempt.unwrap();
    assert_eq!((attempt.number, attempt.failures, attempt.disruptions), (1, 0, 1), "{attempt:?}");
    assert_eq!(status.result.unwrap().steps, STEPS);
    let again = ranks(&test, "ranks", 1).await;
    assert_eq!(again.len(), 2);
    let statuses = again[0].status.as_ref().unwrap().container_statuses.as_ref().unwrap();
    let ended = statuses[0].state.as_ref().unwrap().terminated.as_ref().unwrap();
    let report: RunReport = finetune_contract::parse(ended.message.as_ref().unwrap()).unwrap();
    assert!(report.resumed_from_step >= Some(3), "{report:?}");
    test.verify("ranks");

    // What the ranks said to each other is what the policies of a confined namespace let through.
    let services: Api<Service> = Api::namespaced(test.client.clone(), &test.namespace);
    assert!(services.get("ranks-ranks").await.unwrap().spec.unwrap().selector.is_some());
    let own: Api<NetworkPolicy> = Api::namespaced(test.client.clone(), &test.namespace);
    let mut policies = strict(&test.namespace);
    policies.push(own.get("ranks-ranks").await.unwrap());
    let ends: Vec<End> = pods.iter().chain(&again).filter_map(End::of).collect();
    let find = |address: IpAddr| ends.iter().find(|end| end.address == address);
    let mut ports = BTreeSet::new();
    for flow in watcher.stop() {
        let (Some(from), Some(to)) = (find(flow.from), find(flow.to)) else { continue };
        let is_open = is_allowed(&policies, from, to, flow.protocol, flow.port);
        assert!(is_open, "closed: {flow:?}");
        assert!(!is_allowed(&policies[..2], from, to, flow.protocol, flow.port), "{flow:?}");
        ports.insert(flow.port);
    }
    assert!(ports.contains(&29500), "the ranks were not seen to meet: {ports:?}");
    operator.abort();
}
