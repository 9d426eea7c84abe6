//! Jobs that are created again, and namesakes: each is a run of its own.

use finetune_api::FineTuneJob;
use kube::api::DeleteParams;
use serde_json::{Value, json};

use crate::test_namespace::{TestNamespace, rows};

/// Deletes a job and waits until it is gone.
async fn delete(test: &TestNamespace, name: &str) {
    test.jobs.delete(name, &DeleteParams::default()).await.unwrap();
    test.until("the job is gone", || async {
        test.jobs.get_opt(name).await.unwrap().is_none().then_some(())
    })
    .await;
}

async fn run_id(test: &TestNamespace, name: &str) -> String {
    test.status(name).await.plan.unwrap().run_id
}

#[tokio::test]
async fn the_same_job_again_on_the_same_rows_says_that_nothing_was_trained() {
    let Some(test) = TestNamespace::new("same").await else { return };
    let job = test.job("again");
    test.apply(&job).await;
    test.wait("again", "True Succeeded").await;
    let (first, result) =
        (run_id(&test, "again").await, test.status("again").await.result.unwrap());
    delete(&test, "again").await;
    test.apply(&job).await;
    test.wait("again", "True AlreadyPublished").await;
    assert!(test.training_pods("again").await.is_empty(), "no pod trains");
    let message = test.message("again", "Published").await;
    assert!(message.contains("nothing was trained") && message.contains(&first), "{message}");
    assert!(!message.contains("verified"), "{message}");
    assert_ne!(run_id(&test, "again").await, first);
    let after = test.status("again").await.result.unwrap();
    assert_eq!(after.manifest_sha256, result.manifest_sha256);
    test.verify("again");
}

#[tokio::test]
async fn the_same_job_again_on_other_rows_is_refused_or_trains() {
    let Some(test) = TestNamespace::new("refreshed").await else { return };
    let mut job = test.job("weekly");
    test.apply(&job).await;
    test.wait("weekly", "True Succeeded").await;
    let first = test.status("weekly").await.result.unwrap();
    test.put_text("train.jsonl", &rows(0..13));
    delete(&test, "weekly").await;
    test.apply(&job).await;
    test.wait("weekly", "False OutputExists").await;
    let message = test.message("weekly", "Succeeded").await;
    assert!(message.contains("the rows of dataset.train"), "{message}");

    job["spec"]["output"]["overwrite"] = json!(true);
    delete(&test, "weekly").await;
    test.apply(&job).await;
    test.wait("weekly", "True Succeeded").await;
    let second = test.status("weekly").await.result.unwrap();
    assert_ne!(second.manifest_sha256, first.manifest_sha256);
    test.verify("weekly");
}

#[tokio::test]
async fn a_job_that_failed_on_bad_rows_trains_once_they_are_mended() {
    let Some(test) = TestNamespace::new("mended").await else { return };
    let job = test.job("mended");
    test.put_text("train.jsonl", "{\"text\": 1\n");
    test.apply(&job).await;
    test.wait("mended", "False InvalidDataset").await;
    test.put_text("train.jsonl", &rows(0..12));
    delete(&test, "mended").await;
    test.apply(&job).await;
    test.wait("mended", "True Succeeded").await;
    test.verify("mended");
}

/// Returns a job with its result at another's place.
fn at_output_of(mut job: Value, other: &TestNamespace, name: &str) -> FineTuneJob {
    job["spec"]["output"]["uri"] = json!(other.uri(&format!("out/{name}")));
    serde_json::from_value(job).unwrap()
}

#[tokio::test]
async fn namesakes_in_two_namespaces_share_neither_checkpoints_nor_results() {
    let Some(first) = TestNamespace::new("namesake-a").await else { return };
    let second = TestNamespace::new("namesake-b").await.unwrap();
    // Other rows, one name, one output: told to replace, the second trains on its own.
    first.apply(&first.job("bot")).await;
    first.wait("bot", "True Succeeded").await;
    second.put_text("train.jsonl", &rows(20..32));
    let refused = at_output_of(second.job("bot"), &first, "bot");
    second.jobs.create(&kube::api::PostParams::default(), &refused).await.unwrap();
    second.wait("bot", "False OutputExists").await;
    delete(&second, "bot").await;
    second.apply(&second.job("bot")).await;
    second.wait("bot", "True Succeeded").await;
    assert_ne!(run_id(&first, "bot").await, run_id(&second, "bot").await);
    let (a, b) = (first.status("bot").await, second.status("bot").await);
    assert_ne!(a.result.unwrap().manifest_sha256, b.result.unwrap().manifest_sha256);
    first.verify("bot");
    second.verify("bot");
}

#[tokio::test]
async fn an_output_that_touches_an_input_makes_no_pod() {
    let Some(test) = TestNamespace::new("touching").await else { return };
    for (name, output) in [("equal", "model"), ("below", "model/out"), ("above", "")] {
        let mut job = test.job(name);
        job["spec"]["output"]["uri"] = json!(test.uri(output));
        job["spec"]["output"]["overwrite"] = json!(true);
        test.apply(&job).await;
        test.wait(name, "False InvalidSpec").await;
        let message = test.message(name, "Succeeded").await;
        assert!(message.contains("spec.model.uri"), "{message}");
    }
    let jobs = test.children.list(&kube::api::ListParams::default()).await.unwrap().items;
    assert!(jobs.is_empty());
}
