//! Runs whose rows, result and checkpoints are in a bucket.
//!
//! `FINETUNE_TEST_S3_ENDPOINT` names an S3 server and `FINETUNE_TEST_S3_BUCKET` a bucket there;
//! the keys come from `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`. Rows are brought there and
//! results from there with `curl`, so that both do not pass through the code under test.

use std::{path::Path, process::Command};

use serde_json::{Value, json};

use crate::sandbox::{Sandbox, needed, sha256};

/// A prefix of a bucket that no other test writes to.
struct Bucket {
    endpoint: String,
    prefix: String,
    keys: String,
}

impl Bucket {
    fn new(test: &str) -> Option<Self> {
        let [endpoint, bucket, id, secret] = [
            "FINETUNE_TEST_S3_ENDPOINT",
            "FINETUNE_TEST_S3_BUCKET",
            "AWS_ACCESS_KEY_ID",
            "AWS_SECRET_ACCESS_KEY",
        ]
        .map(|key| std::env::var(key).ok());
        let endpoint = needed(endpoint, "FINETUNE_TEST_S3_ENDPOINT is not set")?;
        let bucket = needed(bucket, "FINETUNE_TEST_S3_BUCKET is not set")?;
        let keys = needed(id.zip(secret), "the keys of the S3 server are not set")?;
        Some(Self {
            endpoint,
            prefix: format!("{bucket}/e2e-{test}-{}", std::process::id()),
            keys: format!("{}:{}", keys.0, keys.1),
        })
    }

    /// Returns a sandbox whose processes know the server.
    fn sandbox(&self) -> Option<Sandbox> {
        let mut sandbox = Sandbox::new()?;
        sandbox.set("AWS_ENDPOINT_URL", &self.endpoint);
        sandbox.set("AWS_REGION", "us-east-1");
        sandbox.set("FINETUNE_STORE_RETRIES", "1");
        Some(sandbox)
    }

    fn uri(&self, name: &str) -> String {
        format!("s3://{}/{name}", self.prefix)
    }

    fn put(&self, name: &str, from: &Path) {
        self.curl(name, &["--upload-file", from.to_str().unwrap()]);
    }

    fn get(&self, name: &str, to: &Path) {
        self.curl(name, &["--output", to.to_str().unwrap()]);
    }

    fn curl(&self, name: &str, arguments: &[&str]) {
        let url = format!("{}/{}/{name}", self.endpoint, self.prefix);
        let curl = ["--fail", "--silent", "--show-error", "--aws-sigv4", "aws:amz:us-east-1:s3"];
        let mut command = Command::new("curl");
        command.args(curl).args(["--user", &self.keys]).args(arguments).arg(url);
        assert!(command.status().unwrap().success());
    }
}

fn long_job(sandbox: &Sandbox, output: &str) -> Value {
    let mut job = sandbox.job("output");
    job["spec"]["output"]["uri"] = json!(output);
    job["spec"]["training"]["maxSteps"] = json!(30);
    job
}

#[test]
fn a_run_in_a_bucket_is_killed_goes_on_and_is_proven() {
    let Some(bucket) = Bucket::new("killed") else { return };
    let Some(sandbox) = bucket.sandbox() else { return };
    bucket.put("train.jsonl", &sandbox.path("train.jsonl"));
    let mut job = long_job(&sandbox, &bucket.uri("output"));
    job["spec"]["dataset"]["train"] = json!(bucket.uri("train.jsonl"));
    let mut started = sandbox.start(&job);
    started.wait_for_checkpoint(9);
    started.signal("-KILL");
    sandbox.run(&job).ok();
    assert!(sandbox.report(&job).resumed_from_step.is_some_and(|step| step >= 9));
    sandbox.finetune(&["verify", &bucket.uri("output")]).ok();
    let ran = sandbox.run(&job).ok();
    assert!(ran.stdout.contains("nothing was trained"), "{}", ran.stdout);

    // What is there is what a run on disk without interruption gives.
    sandbox.run(&long_job(&sandbox, &sandbox.uri("on-disk"))).ok();
    let fetched = sandbox.path("fetched.safetensors");
    bucket.get("output/adapter_model.safetensors", &fetched);
    assert_eq!(sha256(&fetched), sha256(&sandbox.path("on-disk/adapter_model.safetensors")));
}

#[test]
fn a_bucket_that_refuses_or_is_not_there_says_so() {
    let Some(bucket) = Bucket::new("refused") else { return };
    let Some(mut sandbox) = bucket.sandbox() else { return };
    // To be read: some servers make a bucket that is written to.
    let mut job = long_job(&sandbox, &bucket.uri("output"));
    job["spec"]["dataset"]["train"] = json!("s3://finetune-no-such-bucket/train.jsonl");
    let shown = without_server_words(&sandbox.shown(&sandbox.run(&job)));
    insta::assert_snapshot!(shown, @r"
exit 78
error: the run cannot start:
  spec.dataset.train: cannot list s3://finetune-no-such-bucket/train.jsonl: the bucket does not exist (…); create it or correct the URI
");

    sandbox.set("AWS_SECRET_ACCESS_KEY", "wrong");
    let job = long_job(&sandbox, &bucket.uri("output"));
    let shown = sandbox.shown(&sandbox.run(&job)).replace(&bucket.uri("output"), "OUTPUT");
    insta::assert_snapshot!(without_server_words(&shown), @r"
exit 77
error: the run cannot start:
  spec.output.uri: cannot write OUTPUT/PROBE: the store denies access (…): check the credentials of the Secret or environment and their permissions
");
}

/// Leaves out what differs from server to server, and the random name a preflight tries to write.
fn without_server_words(shown: &str) -> String {
    let shown = match shown.split_once(".finetune-probe-") {
        None => shown.to_owned(),
        Some((before, probe)) => {
            let is_random = |character: char| character.is_ascii_digit() || character == '-';
            format!("{before}PROBE{}", probe.trim_start_matches(is_random))
        }
    };
    match (shown.find(" ("), shown.rfind(')')) {
        (Some(start), Some(end)) => format!("{} (…{}", &shown[..start], &shown[end..]),
        _ => shown,
    }
}
