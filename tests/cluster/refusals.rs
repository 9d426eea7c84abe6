//! What cannot work ends with its reason in seconds, and never has a training pod.

use k8s_openapi::api::core::v1::ResourceQuota;
use kube::{
    Api,
    api::{DeleteParams, PostParams},
};
use serde_json::{Value, json};

use crate::test_namespace::{TestNamespace, real_model};

#[tokio::test]
async fn what_cannot_work_says_why_and_takes_no_training_pod() {
    let Some(test) = TestNamespace::new("refused").await else { return };
    test.put_text("bad.jsonl", "{\"messages\": []}\nnot json\n");
    let wrong = json!({"name": "wrong-keys"});
    let real = real_model();
    let elsewhere = json!({"name": "elsewhere"});
    let cases: [(&str, &str, Value, &str, &str); 11] = [
        ("rows", "/dataset/train", json!(test.uri("bad.jsonl")), "InvalidDataset", "bad.jsonl:2"),
        ("model", "/model/uri", json!(test.uri("no-model/")), "NotFound", "no-model"),
        (
            "bucket",
            "/dataset/train",
            json!("s3://no-such-bucket/a.jsonl"),
            "NotFound",
            "no-such-bucket",
        ),
        ("keys", "/output/secretRef", wrong, "PermissionDenied", "check the credentials"),
        ("server", "/output/secretRef", elsewhere, "InvalidSpec", "does not allow"),
        ("rank", "/loraConfig/r", json!(512), "InvalidSpec", "spec.loraConfig.r"),
        ("module", "/loraConfig/targetModules", json!(["q_prj"]), "InvalidSpec", "q_prj"),
        (
            "names",
            "/loraConfig/targetModules",
            json!(["all-linear", "q_proj"]),
            "InvalidSpec",
            "name it alone",
        ),
        ("number", "/loraConfig/targetModules", json!(3), "InvalidSpec", "must be a list of names"),
        ("file", "/dataset/train", json!("file:///home/me/a.jsonl"), "InvalidSpec", "finetune run"),
        ("large", "/model/uri", json!(real), "NoAcceleratorFits", " short"),
    ];
    for (name, place, value, _, _) in &cases {
        let mut job = test.job(name);
        if *name == "large" {
            job["spec"].as_object_mut().unwrap().remove("loraConfig");
            job["spec"]["training"] = json!({"contextLength": 1024});
            job["spec"]["resources"] = json!({"limits": {"memory": "256Mi"}});
        }
        let (parent, field) = place.rsplit_once('/').unwrap();
        job["spec"].pointer_mut(parent).unwrap()[field] = value.clone();
        test.apply(&job).await;
    }
    for (name, _, _, reason, words) in &cases {
        test.wait(name, &format!("False {reason}")).await;
        let message = test.message(name, "Succeeded").await;
        assert!(message.contains(words), "{name}: {message}");
        assert!(test.training_pods(name).await.is_empty(), "{name} had a training pod");
        assert!(test.children.get_opt(&format!("{name}-0")).await.unwrap().is_none());
    }
}

#[tokio::test]
async fn pods_that_a_quota_refuses_are_reported_and_start_when_it_is_raised() {
    let Some(test) = TestNamespace::new("refused-pods").await else { return };
    let quotas: Api<ResourceQuota> = Api::namespaced(test.client.clone(), &test.namespace);
    let quota = serde_json::from_value(
        json!({"metadata": {"name": "none"}, "spec": {"hard": {"pods": "0"}}}),
    )
    .unwrap();
    quotas.create(&PostParams::default(), &quota).await.unwrap();
    test.until("the quota is counted", || async {
        quotas.get("none").await.unwrap().status?.hard.map(|_| ())
    })
    .await;
    test.apply(&test.job("quota")).await;
    test.wait("quota", "Unknown PodsRefused").await;
    let message = test.message("quota", "Succeeded").await;
    assert!(message.contains("exceeded quota: none"), "{message}");
    quotas.delete("none", &DeleteParams::default()).await.unwrap();
    test.wait("quota", "True Succeeded").await;
}

#[tokio::test]
async fn a_volume_claim_that_does_not_exist_is_named() {
    let Some(test) = TestNamespace::new("claim").await else { return };
    let mut job = test.job("claim");
    job["spec"]["dataset"]["train"] = json!("pvc://no-such-claim/train.jsonl");
    test.apply(&job).await;
    test.wait("claim", "Unknown VolumeClaimMissing").await;
    let message = test.message("claim", "Succeeded").await;
    assert!(message.contains("no-such-claim"), "{message}");
}

#[tokio::test]
async fn a_secret_that_is_not_there_is_named() {
    let Some(test) = TestNamespace::new("secret").await else { return };
    let mut job = test.job("secret");
    job["spec"]["output"]["secretRef"] = json!({"name": "no-such-secret"});
    test.apply(&job).await;
    test.wait("secret", "Unknown SecretOrConfigMapMissing").await;
    let message = test.message("secret", "Succeeded").await;
    assert!(message.contains("no-such-secret"), "{message}");
}
