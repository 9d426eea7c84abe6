//! Names of pods: what ranks of one run find each other by.

use k8s_openapi::api::{
    batch::v1::Job,
    core::v1::{Pod, Service},
};
use kube::{
    Api, ResourceExt,
    api::{ListParams, LogParams, PostParams},
};
use serde_json::json;

use crate::test_namespace::{TestNamespace, variable};

/// The first pod waits to be found, the second asks for it until it is.
const SCRIPT: &str = "if [ $JOB_COMPLETION_INDEX = 0 ]; then exec sleep 600; fi; \
    until getent ahostsv4 $FIRST; do sleep 0.5; done";

#[tokio::test]
async fn a_pod_of_an_indexed_job_finds_another_by_its_name() {
    let Some(test) = TestNamespace::new("names").await else { return };
    let services: Api<Service> = Api::namespaced(test.client.clone(), &test.namespace);
    // As for ranks, which must meet before any is ready.
    let service = serde_json::from_value(json!({
        "metadata": {"name": "ranks"},
        "spec": {
            "clusterIP": "None", "publishNotReadyAddresses": true, "selector": {"job-name": "ranks"},
        },
    }))
    .unwrap();
    services.create(&PostParams::default(), &service).await.unwrap();
    let name = format!("ranks-0.ranks.{}.svc.cluster.local", test.namespace);
    let job: Job = serde_json::from_value(json!({
        "metadata": {"name": "ranks"},
        "spec": {
            "completionMode": "Indexed", "completions": 2, "parallelism": 2, "backoffLimit": 0,
            "template": {"spec": {
                "subdomain": "ranks", "restartPolicy": "Never", "terminationGracePeriodSeconds": 0,
                "automountServiceAccountToken": false,
                "securityContext": {
                    "runAsNonRoot": true, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"},
                },
                "containers": [{
                    "name": "rank", "image": variable("FINETUNE_TEST_PROBE_IMAGE"),
                    "imagePullPolicy": "Never", "command": ["bash", "-c", SCRIPT],
                    "env": [{"name": "FIRST", "value": name}],
                    "securityContext": {
                        "allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]},
                    },
                }],
            }},
        },
    }))
    .unwrap();
    test.children.create(&PostParams::default(), &job).await.unwrap();
    let index = |pod: &Pod, index: &str| {
        pod.labels().get("batch.kubernetes.io/job-completion-index").is_some_and(|own| own == index)
    };
    let (first, second) = test
        .until("the second has found the first", || async {
            let pods = test.pods.list(&ListParams::default()).await.unwrap().items;
            let first = pods.iter().find(|pod| index(pod, "0"))?;
            let second = pods.iter().find(|pod| index(pod, "1"))?;
            let phase = second.status.as_ref()?.phase.as_deref()?;
            (phase == "Succeeded").then(|| (first.clone(), second.name_any()))
        })
        .await;
    let said = test.pods.logs(&second, &LogParams::default()).await.unwrap();
    let address = first.status.unwrap().pod_ip.unwrap();
    assert!(said.starts_with(&format!("{address} ")), "{said} is not {address}");
}
