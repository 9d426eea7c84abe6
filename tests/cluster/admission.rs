//! What the apiserver itself accepts and refuses, by schema and CEL.

use finetune_api::FineTuneJob;
use kube::{
    Api,
    api::{DynamicObject, Patch, PatchParams, PostParams},
    core::ApiResource,
};
use serde_json::{Value, json};

use crate::test_namespace::TestNamespace;

#[tokio::test]
async fn a_real_apiserver_accepts_and_refuses_by_the_schema() {
    let Some(test) = TestNamespace::new("admission").await else { return };
    let resource = ApiResource::erase::<FineTuneJob>(&());
    let api: Api<DynamicObject> =
        Api::namespaced_with(test.client.clone(), &test.namespace, &resource);
    let dry = PostParams { dry_run: true, ..PostParams::default() };
    let whole = json!({"name": "bucket"});
    let accepted = [
        ("/spec/loraConfig", json!({})),
        ("/spec/loraConfig/targetModules", json!(["q_proj", "v_proj"])),
        ("/spec/loraConfig/targetModules", json!("all-linear")),
        ("/spec/loraConfig/excludeModules", json!(".*down_proj")),
        ("/spec/loraConfig/layersToTransform", json!([0, 1])),
        ("/spec/initialAdapter", json!({"uri": "s3://a/adapter"})),
        ("/spec/initialCheckpoint", json!({"uri": "s3://a/checkpoints/run/step-00000600"})),
        ("/spec/training/learningRate", json!(1e-4)),
        ("/spec/training/maxTimeSeconds", json!(3600)),
        ("/spec/training/optimizer", json!("adamw8bit")),
        ("/spec/output/secretRef", whole),
        (
            "/spec/podTemplate",
            json!({"env": [{"name": "A", "secretKeyRef": {"name": "s", "key": "k"}}]}),
        ),
        ("/spec/resources", json!({"limits": {"memory": "1Gi"}})),
        ("/spec/approval", json!("Manual")),
    ];
    let refused = [
        ("/spec/model/uri", json!("ftp://a/b"), "must be an object URI"),
        ("/spec/model/revision", json!("main"), "revision names a hub's branch"),
        ("/spec/model/addedTokens", json!([]), "should have at least 1 items"),
        ("/spec/model/addedTokens", json!(["<|a|>", "<|a|>"]), "Duplicate value"),
        ("/spec/loraConfig/r", json!(0), "greater than or equal to 1"),
        ("/spec/loraConfig/r", json!("8"), "must be of type integer"),
        ("/spec/loraConfig/loraDropout", json!(1.0), "less than or equal to 0.9"),
        (
            "/spec/loraConfig/targetModules",
            json!({"names": ["q_proj"]}),
            "must have at most 0 items",
        ),
        ("/spec/loraConfig/layersToTransform", json!([-1]), "greater than or equal to 0"),
        ("/spec/training/numEpochs", json!(2), "both set the length"),
        ("/spec/training/learningRate", json!(0), "must be above 0"),
        ("/spec/loraConfig/loraAlpha", json!(0), "must be above 0"),
        ("/spec/initialAdapter", json!({"uri": "ftp://a/b"}), "must be an object URI"),
        ("/spec/initialCheckpoint", json!({"uri": "hf://a/b"}), "must be an object URI"),
        ("/spec/training/maxTimeSeconds", json!(0), "greater than or equal to 1"),
        ("/spec/training/dtype", json!("fp8"), "Unsupported value"),
        ("/spec/output", json!({}), "spec.output.uri: Required"),
        ("/spec/approval", json!("auto"), "Unsupported value"),
        ("/spec/activeDeadlineSeconds", json!(0), "greater than or equal to 1"),
        (
            "/spec/podTemplate",
            json!({"env": [{"name": "LD_PRELOAD", "value": "x"}]}),
            "which are the operator's",
        ),
        ("/spec/podTemplate", json!({"env": [{"name": "A"}]}), "exactly one of"),
        ("/metadata/name", json!("a".repeat(53)), "at most 52 characters"),
    ];
    for (place, value) in accepted {
        let job = changed(&test.job("good"), place, &value);
        let object = serde_json::from_value(job).unwrap();
        if let Err(error) = api.create(&dry, &object).await {
            panic!("{place}: {value} was refused: {error}");
        }
    }
    for (place, value, words) in refused {
        let job = changed(&test.job("bad"), place, &value);
        let object = serde_json::from_value(job).unwrap();
        let error = api.create(&dry, &object).await.expect_err(place).to_string();
        assert!(error.contains(words), "{place}: {value}: {error}");
    }
}

fn changed(job: &Value, place: &str, value: &Value) -> Value {
    let mut job = job.clone();
    let (parent, field) = place.rsplit_once('/').unwrap();
    job.pointer_mut(parent).unwrap()[field] = value.clone();
    job
}

#[tokio::test]
async fn what_decides_a_run_cannot_be_changed() {
    let Some(test) = TestNamespace::new("immutable").await else { return };
    // Suspended, so that no pod of it takes another test's place.
    let mut job = test.job("fixed");
    job["spec"]["suspend"] = json!(true);
    job["spec"]["loraConfig"]["targetModules"] = json!("all-linear");
    test.apply(&job).await;
    for (place, value) in [
        ("/spec/loraConfig/targetModules", json!(["q_proj"])),
        ("/spec/loraConfig/targetModules", json!(".*_proj")),
        ("/spec/loraConfig/excludeModules", json!(["down_proj"])),
        ("/spec/loraConfig/r", json!(8)),
        ("/spec/training/learningRate", json!(1e-3)),
        ("/spec/dataset/trainOn", json!("lastTurn")),
    ] {
        let patch = changed(&job, place, &value);
        let error = test
            .jobs
            .patch("fixed", &PatchParams::default(), &Patch::Merge(patch))
            .await
            .expect_err(place)
            .to_string();
        assert!(error.contains("is immutable"), "{place}: {error}");
    }
    let same = json!({"metadata": {"labels": {"a": "b"}}, "spec": job["spec"]});
    test.jobs.patch("fixed", &PatchParams::default(), &Patch::Merge(same)).await.unwrap();
}
