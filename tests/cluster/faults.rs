//! What happens to jobs at night: each ends as the design says, nothing is left, nothing is
//! published twice.

use finetune_api::FineTuneJob;
use k8s_openapi::{
    api::{batch::v1::Job, core::v1::Pod},
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, DynamicObject, EvictParams, ListParams, PostParams},
    core::ApiResource,
};
use serde_json::{Value, json};

use crate::test_namespace::TestNamespace;

/// Waits for success after one disruption, and proves what was published.
pub async fn goes_on(test: &TestNamespace, name: &str) {
    test.wait(name, "True Succeeded").await;
    let attempt = test.status(name).await.attempt.unwrap();
    assert_eq!((attempt.failures, attempt.disruptions), (0, 1), "{attempt:?}");
    assert_eq!(test.status(name).await.result.unwrap().steps, 1500);
    test.verify(name);
}

#[tokio::test]
async fn an_evicted_pod_goes_on_from_its_checkpoint() {
    let Some(test) = TestNamespace::new("evicted").await else { return };
    test.apply(&test.long_job("evicted")).await;
    let pod = test.wait_for_training("evicted").await;
    test.pods.evict(&pod.name_any(), &EvictParams::default()).await.unwrap();
    goes_on(&test, "evicted").await;
}

#[tokio::test]
async fn a_pod_killed_without_a_word_goes_on_from_its_checkpoint() {
    let Some(test) = TestNamespace::new("killed").await else { return };
    test.apply(&test.long_job("killed")).await;
    let pod = test.wait_for_training("killed").await;
    let at_once = DeleteParams::default().grace_period(0);
    test.pods.delete(&pod.name_any(), &at_once).await.unwrap();
    goes_on(&test, "killed").await;
}

#[tokio::test]
async fn a_job_deleted_by_hand_is_made_again() {
    let Some(test) = TestNamespace::new("by-hand").await else { return };
    test.apply(&test.long_job("by-hand")).await;
    test.wait_for_training("by-hand").await;
    // As `kubectl delete job --cascade=orphan` would: the pod lives on.
    let orphan = DeleteParams {
        propagation_policy: Some(kube::api::PropagationPolicy::Orphan),
        ..DeleteParams::default()
    };
    test.children.delete("by-hand-0", &orphan).await.unwrap();
    goes_on(&test, "by-hand").await;
}

#[tokio::test]
async fn the_operator_may_be_killed_at_any_time() {
    let Some(test) = TestNamespace::new("operator").await else { return };
    test.apply(&test.long_job("operator")).await;
    test.wait_for_training("operator").await;
    let operators: Api<Pod> = Api::namespaced(test.client.clone(), "finetune-system");
    let label = ListParams::default().labels("app.kubernetes.io/name=finetune-operator");
    for pod in operators.list(&label).await.unwrap() {
        let at_once = DeleteParams::default().grace_period(0);
        operators.delete(&pod.name_any(), &at_once).await.unwrap();
    }
    test.wait("operator", "True Succeeded").await;
    let attempt = test.status("operator").await.attempt.unwrap();
    assert_eq!((attempt.number, attempt.disruptions), (0, 0), "its pod was not touched");
    test.verify("operator");
}

#[tokio::test]
async fn micro_batches_that_do_not_fit_become_smaller_ones() {
    let Some(test) = TestNamespace::new("smaller").await else { return };
    let mut job = test.job("smaller");
    // Some 500 MB of activations, by a limit that holds half of them.
    job["spec"]["training"]["trainBatchSizePerDevice"] = json!(1024);
    job["spec"]["training"]["gradientAccumulationSteps"] = json!(1);
    let limit = json!({"memory": "300Mi"});
    job["spec"]["resources"] = json!({"requests": limit, "limits": limit});
    test.apply(&job).await;
    test.wait("smaller", "True Succeeded").await;
    let status = test.status("smaller").await;
    let attempt = status.attempt.unwrap();
    assert!(attempt.number > 0, "it fitted, and nothing was tested");
    assert_eq!((attempt.failures, attempt.disruptions), (0, 0), "{attempt:?}");
    let plan = status.plan.unwrap();
    let config: finetune_contract::RunConfig = finetune_contract::parse(&plan.run_config).unwrap();
    assert!(config.training.micro_batch_size <= 512, "{:?}", config.training);
    assert_eq!(config.global_batch_size(), 1024);
    let said = test.message("smaller", "Planned").await;
    assert!(said.contains("instead of 1024"), "{said}");
    assert!(plan.summary.contains("Adapted"), "{}", plan.summary);
    assert_eq!(status.result.unwrap().steps, 6);
    test.verify("smaller");
}

#[tokio::test]
async fn a_limit_that_is_too_low_is_said_with_what_to_change() {
    let Some(test) = TestNamespace::new("memory").await else { return };
    let mut job = test.long_job("memory");
    // Without a micro-batch of its own the plan would refuse the limit.
    job["spec"]["training"]["trainBatchSizePerDevice"] = json!(1);
    let little = json!({"memory": "24Mi"});
    job["spec"]["resources"] = json!({"requests": little, "limits": little});
    test.apply(&job).await;
    test.wait("memory", "False OutOfMemory").await;
    let message = test.message("memory", "Succeeded").await;
    assert!(message.contains("resources.limits.memory"), "{message}");
    assert_eq!(test.training_pods("memory").await.len(), 1, "it is not tried again blindly");
}

#[tokio::test]
async fn a_deleted_job_leaves_nothing_running() {
    let Some(test) = TestNamespace::new("deleted").await else { return };
    test.apply(&test.long_job("deleted")).await;
    test.wait_for_training("deleted").await;
    test.jobs.delete("deleted", &DeleteParams::default()).await.unwrap();
    test.until("everything is gone", || async {
        let all = ListParams::default();
        let jobs = test.children.list(&all).await.unwrap().items;
        let pods = test.pods.list(&all).await.unwrap().items;
        (jobs.is_empty() && pods.is_empty()).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_finished_job_goes_when_its_time_is_over_and_its_result_stays() {
    let Some(test) = TestNamespace::new("ttl").await else { return };
    let mut job = test.job("ttl");
    job["spec"]["ttlSecondsAfterFinished"] = json!(2);
    test.apply(&job).await;
    test.until("the job and its children are gone", || async {
        let jobs: Vec<Job> = test.children.list(&ListParams::default()).await.unwrap().items;
        (test.jobs.get_opt("ttl").await.unwrap().is_none() && jobs.is_empty()).then_some(())
    })
    .await;
    test.verify("ttl");
}

/// Replaces what the apiserver demands of a rank; returns what it demanded.
async fn demand_of_rank(client: &Client, schema: Value) -> Value {
    let crds: Api<CustomResourceDefinition> = Api::all(client.clone());
    let crd = crds.get("finetunejobs.finetune.dev").await.unwrap();
    let mut crd = serde_json::to_value(crd).unwrap();
    let place = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/loraConfig/properties/r";
    let before = std::mem::replace(crd.pointer_mut(place).unwrap(), schema);
    let crd = serde_json::from_value(crd).unwrap();
    crds.replace("finetunejobs.finetune.dev", &PostParams::default(), &crd).await.unwrap();
    before
}

#[tokio::test]
async fn a_job_that_cannot_be_read_stops_no_other() {
    let Some(test) = TestNamespace::new("unreadable").await else { return };
    let resource = ApiResource::erase::<FineTuneJob>(&());
    let objects: Api<DynamicObject> =
        Api::namespaced_with(test.client.clone(), &test.namespace, &resource);
    let lax = json!({"description": "Any.", "x-kubernetes-int-or-string": true});
    let strict = demand_of_rank(&test.client, lax).await;
    let mut job = test.job("unreadable");
    job["spec"]["loraConfig"]["r"] = json!("four");
    let unreadable: DynamicObject = serde_json::from_value(job).unwrap();
    test.until("the apiserver takes it", || async {
        objects.create(&PostParams::default(), &unreadable).await.ok()
    })
    .await;
    // What is stored stays as it is.
    demand_of_rank(&test.client, strict).await;
    test.apply(&test.job("readable")).await;
    test.wait("readable", "True Succeeded").await;
    let unreadable = objects.get("unreadable").await.unwrap();
    assert!(unreadable.data.get("status").is_none(), "nobody guesses what it means");
    objects.delete("unreadable", &DeleteParams::default()).await.unwrap();
}
