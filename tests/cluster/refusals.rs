//! What cannot work ends with its reason in seconds, and never has a training pod.

use serde_json::{Value, json};

use crate::bed::{Bed, real_model};

#[tokio::test]
async fn what_cannot_work_says_why_and_takes_no_training_pod() {
    let Some(bed) = Bed::new("refused").await else { return };
    bed.put_text("bad.jsonl", "{\"messages\": []}\nnot json\n");
    let wrong = json!({"name": "wrong-keys"});
    let real = real_model();
    let elsewhere = json!({"name": "elsewhere"});
    let cases: [(&str, &str, Value, &str, &str); 11] = [
        ("rows", "/dataset/train", json!(bed.uri("bad.jsonl")), "InvalidDataset", "bad.jsonl:2"),
        ("model", "/model/uri", json!(bed.uri("no-model/")), "NotFound", "no-model"),
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
        ("large", "/model/uri", json!(real), "NoAcceleratorFits", "too little"),
    ];
    for (name, place, value, _, _) in &cases {
        let mut job = bed.job(name);
        if *name == "large" {
            job["spec"].as_object_mut().unwrap().remove("loraConfig");
            job["spec"]["training"] = json!({"contextLength": 1024});
            job["spec"]["resources"] = json!({"limits": {"memory": "256Mi"}});
        }
        let (parent, field) = place.rsplit_once('/').unwrap();
        job["spec"].pointer_mut(parent).unwrap()[field] = value.clone();
        bed.apply(&job).await;
    }
    for (name, _, _, reason, words) in &cases {
        bed.wait(name, &format!("False {reason}")).await;
        let message = bed.message(name, "Succeeded").await;
        assert!(message.contains(words), "{name}: {message}");
        assert!(bed.training_pods(name).await.is_empty(), "{name} had a training pod");
        assert!(bed.children.get_opt(&format!("{name}-0")).await.unwrap().is_none());
    }
}

#[tokio::test]
async fn a_secret_that_is_not_there_is_named() {
    let Some(bed) = Bed::new("secret").await else { return };
    let mut job = bed.job("secret");
    job["spec"]["output"]["secretRef"] = json!({"name": "no-such-secret"});
    bed.apply(&job).await;
    bed.wait("secret", "Unknown SecretOrConfigMapMissing").await;
    let message = bed.message("secret", "Succeeded").await;
    assert!(message.contains("no-such-secret"), "{message}");
}
