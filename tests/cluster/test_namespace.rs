//! Where a test works: a namespace and a prefix of the bucket of its own.

use std::{
    path::Path,
    process::Command,
    sync::LazyLock,
    time::{Duration, Instant},
};

use finetune_api::{FineTuneJob, FineTuneJobStatus};
use k8s_openapi::api::{
    batch::v1::Job,
    core::v1::{Namespace, Node, Pod, Secret},
};
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::tiny_model;

/// How long anything may take that a test waits for.
const PATIENCE: Duration = Duration::from_mins(5);
const POLL: Duration = Duration::from_millis(300);

/// A place to work in.
pub struct TestNamespace {
    pub client: Client,
    pub namespace: String,
    pub jobs: Api<FineTuneJob>,
    pub pods: Api<Pod>,
    pub children: Api<Job>,
    prefix: String,
    directory: TempDir,
}

pub fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set; run `cargo xtask e2e`"))
}

/// Returns what CI and `cargo xtask e2e` set, or says that the test is skipped.
pub fn is_there() -> bool {
    let is_there = std::env::var_os("FINETUNE_TEST_CLUSTER").is_some();
    if !is_there {
        let test = std::thread::current().name().unwrap_or_default().to_owned();
        // Whoever runs the other tests runs these separately, inside the cluster's network.
        eprintln!("{test}: needs a cluster, see `cargo xtask e2e`");
    }
    is_there
}

/// Brings the real model into the bucket, once for all tests, and returns its URI.
pub fn real_model() -> String {
    static KEY: LazyLock<String> = LazyLock::new(|| {
        let key = format!("{}/smollm2-{}", variable("FINETUNE_TEST_S3_BUCKET"), std::process::id());
        put_all(&key, variable("FINETUNE_TEST_MODEL").as_ref());
        key
    });
    format!("s3://{}/", *KEY)
}

/// Stores the files of a directory under a key.
fn put_all(key: &str, directory: &Path) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        put_at(&format!("{key}/{}", path.file_name().unwrap().to_string_lossy()), &path);
    }
}

/// Stores a file in the bucket under a key that begins with the bucket.
fn put_at(key: &str, file: &Path) {
    let url = format!("{}/{key}", variable("FINETUNE_TEST_S3_ENDPOINT"));
    let keys = format!("{}:{}", variable("AWS_ACCESS_KEY_ID"), variable("AWS_SECRET_ACCESS_KEY"));
    let mut curl = Command::new("curl");
    curl.args(["--fail", "--silent", "--show-error", "--aws-sigv4", "aws:amz:us-east-1:s3"]);
    curl.args(["--user", &keys]).arg("--upload-file").arg(file).arg(url);
    assert!(curl.status().unwrap().success(), "{key} could not be stored");
}

impl TestNamespace {
    /// Creates a namespace under Pod Security `restricted`, with a tiny model and twelve rows in the
    /// bucket.
    pub async fn new(name: &str) -> Option<Self> {
        if !is_there() {
            return None;
        }
        let client = Client::try_default().await.unwrap();
        let namespace = format!("e2e-{name}");
        let test = Self {
            jobs: Api::namespaced(client.clone(), &namespace),
            pods: Api::namespaced(client.clone(), &namespace),
            children: Api::namespaced(client.clone(), &namespace),
            prefix: format!(
                "{}/{name}-{}",
                variable("FINETUNE_TEST_S3_BUCKET"),
                std::process::id()
            ),
            directory: tempfile::tempdir().unwrap(),
            client,
            namespace,
        };
        test.make_namespace().await;
        let model = test.directory.path().join("model");
        tiny_model::write(&model);
        put_all(&format!("{}/model", test.prefix), &model);
        test.put_text("train.jsonl", &rows(0..12));
        Some(test)
    }

    async fn make_namespace(&self) {
        let namespace: Namespace = serde_json::from_value(json!({
            "metadata": {
                "name": self.namespace,
                "labels": {"pod-security.kubernetes.io/enforce": "restricted"},
            },
        }))
        .unwrap();
        let namespaces: Api<Namespace> = Api::all(self.client.clone());
        // Left by an earlier run on the same cluster.
        if namespaces.get_opt(&self.namespace).await.unwrap().is_some() {
            namespaces.delete(&self.namespace, &DeleteParams::default()).await.unwrap();
            self.until("the old namespace is gone", || async {
                namespaces.get_opt(&self.namespace).await.unwrap().is_none().then_some(())
            })
            .await;
        }
        namespaces.create(&PostParams::default(), &namespace).await.unwrap();
        for (name, secret) in
            [("bucket", variable("AWS_SECRET_ACCESS_KEY")), ("wrong-keys", "wrong".to_owned())]
        {
            let secret: Secret = serde_json::from_value(json!({
                "metadata": {"name": name},
                "stringData": {
                    "AWS_ACCESS_KEY_ID": variable("AWS_ACCESS_KEY_ID"),
                    "AWS_SECRET_ACCESS_KEY": secret,
                },
            }))
            .unwrap();
            let secrets: Api<Secret> = Api::namespaced(self.client.clone(), &self.namespace);
            secrets.create(&PostParams::default(), &secret).await.unwrap();
        }
        let elsewhere: Secret = serde_json::from_value(json!({
            "metadata": {"name": "elsewhere"},
            "stringData": {"AWS_ENDPOINT_URL": "http://169.254.169.254"},
        }))
        .unwrap();
        let secrets: Api<Secret> = Api::namespaced(self.client.clone(), &self.namespace);
        secrets.create(&PostParams::default(), &elsewhere).await.unwrap();
    }

    pub fn uri(&self, name: &str) -> String {
        format!("s3://{}/{name}", self.prefix)
    }

    pub fn put(&self, name: &str, file: &Path) {
        put_at(&format!("{}/{name}", self.prefix), file);
    }

    pub fn put_text(&self, name: &str, text: &str) {
        let file = self.directory.path().join(name);
        std::fs::write(&file, text).unwrap();
        self.put(name, &file);
    }

    /// Returns a LoRA job of a few steps on the tiny model, with its result under its name.
    pub fn job(&self, name: &str) -> Value {
        let secret = json!({"name": "bucket"});
        json!({
            "apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob",
            "metadata": {"name": name, "namespace": self.namespace},
            "spec": {
                "model": {"uri": self.uri("model/"), "secretRef": secret},
                "dataset": {"train": self.uri("train.jsonl"), "secretRef": secret},
                "loraConfig": {"r": 4},
                "training": {
                    "contextLength": 128, "maxSteps": 6, "learningRate": 1e-2, "dtype": "fp32",
                    "trainBatchSizePerDevice": 2, "gradientAccumulationSteps": 2, "checkpointSteps": 3,
                },
                "output": {"uri": self.uri(&format!("out/{name}")), "secretRef": secret},
            },
        })
    }

    /// Returns the same with so many steps, on so little of a CPU, that there is time to
    /// disturb it on any machine.
    pub fn long_job(&self, name: &str) -> Value {
        let mut job = self.job(name);
        job["spec"]["resources"] = json!({"limits": {"cpu": "300m"}});
        job["spec"]["training"]["maxSteps"] = json!(1500);
        job["spec"]["training"]["checkpointSteps"] = json!(100);
        job
    }

    /// Makes the node say that it has `count` of a resource that it does not have.
    pub async fn advertise(&self, resource: &str, count: u32) {
        let nodes: Api<Node> = Api::all(self.client.clone());
        let node = nodes.list(&ListParams::default()).await.unwrap().items.remove(0).name_any();
        // What can be allocated would follow from the capacity, but not before the kubelet's next
        // report: until then, what an earlier run on the same cluster said would hold.
        let said = json!({resource: count.to_string()});
        let patch = Patch::Strategic(json!({"status": {"capacity": said, "allocatable": said}}));
        nodes.patch_status(&node, &PatchParams::default(), &patch).await.unwrap();
    }

    pub async fn apply(&self, job: &Value) -> FineTuneJob {
        let job: FineTuneJob = serde_json::from_value(job.clone()).unwrap();
        self.jobs.create(&PostParams::default(), &job).await.unwrap()
    }

    pub async fn status(&self, name: &str) -> FineTuneJobStatus {
        self.jobs.get(name).await.unwrap().status.unwrap_or_default()
    }

    /// Returns the summary, such as `True Succeeded`.
    pub async fn summary(&self, name: &str) -> String {
        let status = self.status(name).await;
        let summary = status.conditions.iter().find(|condition| condition.type_ == "Succeeded");
        summary.map_or_else(String::new, |summary| format!("{} {}", summary.status, summary.reason))
    }

    pub async fn message(&self, name: &str, kind: &str) -> String {
        let status = self.status(name).await;
        let condition = status.conditions.iter().find(|condition| condition.type_ == kind);
        condition.map(|condition| condition.message.clone()).unwrap_or_default()
    }

    /// Waits until a job's summary is as expected; fails if it ends otherwise.
    pub async fn wait(&self, name: &str, expected: &str) {
        self.until(&format!("{name} is {expected}"), || async {
            let summary = self.summary(name).await;
            if summary == expected {
                return Some(());
            }
            let is_over = summary.starts_with("True") || summary.starts_with("False");
            assert!(!is_over, "{name}: {summary}: {}", self.message(name, "Succeeded").await);
            None
        })
        .await;
    }

    /// Waits until a job's trainer has done some steps; returns its pod.
    pub async fn wait_for_training(&self, name: &str) -> Pod {
        self.until(&format!("{name} trains"), || async {
            let status = self.status(name).await;
            let summary = self.summary(name).await;
            assert!(!summary.starts_with("False"), "{}", self.message(name, "Succeeded").await);
            assert!(!summary.starts_with("True"), "it was over before it could be disturbed");
            (status.progress?.step > 0).then_some(())
        })
        .await;
        self.training_pods(name).await.into_iter().next().unwrap()
    }

    pub async fn training_pods(&self, name: &str) -> Vec<Pod> {
        let label = format!("finetune.dev/job={name},finetune.dev/step=training");
        self.pods.list(&ListParams::default().labels(&label)).await.unwrap().items
    }

    pub async fn until<T, F>(&self, what: &str, mut look: impl FnMut() -> F) -> T
    where
        F: Future<Output = Option<T>>,
    {
        let started = Instant::now();
        loop {
            if let Some(found) = look().await {
                return found;
            }
            assert!(started.elapsed() < PATIENCE, "waited too long until {what}");
            tokio::time::sleep(POLL).await;
        }
    }

    /// Proves a published result with the command line.
    pub fn verify(&self, name: &str) {
        let verified = Command::new(env!("CARGO_BIN_EXE_finetune"))
            .args(["verify", &self.uri(&format!("out/{name}"))])
            .env("AWS_ENDPOINT_URL", variable("FINETUNE_TEST_S3_ENDPOINT"))
            .env("AWS_ALLOW_HTTP", "true")
            .env("OMP_NUM_THREADS", "1")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&verified.stderr);
        assert!(verified.status.success(), "{name}: {said}");
    }
}

/// Short rows, each of its own number.
pub fn rows(numbers: std::ops::Range<u32>) -> String {
    numbers
        .map(|number| {
            let row = json!({"messages": [
                {"role": "user", "content": format!("What is {number} and {number}?")},
                {"role": "assistant", "content": format!("It is {}.", 2 * number)},
            ]});
            format!("{row}\n")
        })
        .collect()
}
