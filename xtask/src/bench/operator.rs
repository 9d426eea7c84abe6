//! How fast and how small the operator is: many FineTuneJobs at once, on a real apiserver.
//!
//! There is no kubelet, so that what is measured is the operator and the control plane. The jobs
//! are made before the operator starts: their making is not part of the figures.

use std::{
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::{
    build,
    cluster::{self, Cluster, Extent},
    tools::shell,
};

const LISTEN: &str = "127.0.0.1:18080";
/// How long all children may take.
const PATIENCE: Duration = Duration::from_mins(10);
/// After how long without work memory is looked at again.
const REST: Duration = Duration::from_secs(15);
/// Jobs of one call of kubectl.
const CHUNK: usize = 500;

/// A running operator; it is ended when this is dropped.
struct Operator(Child);

impl Drop for Operator {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Measures.
pub(crate) fn run(jobs: usize) -> Result<()> {
    let binaries = build::run()?;
    let cluster = cluster::up_beside("bench-cluster", Extent::ControlPlane)?;
    let measured = measure(&cluster, &binaries.finetune, jobs);
    cluster.end()?;
    measured
}

fn measure(cluster: &Cluster, finetune: &Path, jobs: usize) -> Result<()> {
    let directory = shell::root().join("target/bench-operator");
    std::fs::create_dir_all(&directory)?;
    let crd = shell::root().join("crds/finetunejobs.finetune.dev.yaml");
    shell::quietly(cluster.kubectl().args(["apply", "--server-side", "-f"]).arg(crd))?;
    shell::quietly(cluster.kubectl().args([
        "wait",
        "--for=condition=Established",
        "crd/finetunejobs.finetune.dev",
    ]))?;
    let settings = directory.join("settings.yaml");
    std::fs::write(
        &settings,
        "trainerImage: none\naccelerators: [{name: cpu, memoryGiB: 8, bf16Tflops: 1, fp32Tflops: 1, hasBf16: true}]\n",
    )?;

    let operator = start(cluster, finetune, &settings)?;
    std::thread::sleep(REST);
    println!("idle:            {:>7.1} MB", resident(&operator, "VmRSS")?);
    drop(operator);

    let started = Instant::now();
    for (chunk, first) in (0..jobs).step_by(CHUNK).enumerate() {
        let items: Vec<_> = (first..jobs.min(first + CHUNK)).map(job).collect();
        let file = directory.join(format!("jobs-{chunk}.json"));
        let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
        std::fs::write(&file, list.to_string())?;
        shell::quietly(cluster.kubectl().args(["create", "-f"]).arg(&file))?;
    }
    println!("{jobs} FineTuneJobs made in {:.0} s", started.elapsed().as_secs_f64());

    let operator = start(cluster, finetune, &settings)?;
    let started = Instant::now();
    let mut first = None;
    let seconds = loop {
        let made = sum(
            &metrics(cluster)?,
            "finetune_operator_api_requests_total",
            &["POST", "\"jobs\"", "\"201\""],
        );
        if made > 0.0 && first.is_none() {
            first = Some((Instant::now(), made));
        }
        if made as usize >= jobs {
            let (since, before) = first.context("nothing was made")?;
            println!(
                "children made:   {:>7.1} a second",
                (made - before) / since.elapsed().as_secs_f64()
            );
            break started.elapsed().as_secs_f64();
        }
        if started.elapsed() > PATIENCE {
            bail!("{made} of {jobs} children after {} s", PATIENCE.as_secs());
        }
        std::thread::sleep(Duration::from_millis(200));
    };
    println!("all of them:     {seconds:>7.1} s after its start");
    std::thread::sleep(REST);
    let metrics = metrics(cluster)?;
    // The Lease is written once in a while, whatever there is to do.
    let without_lease: String = metrics
        .lines()
        .filter(|line| !line.contains("\"leases\""))
        .flat_map(|line| [line, "\n"])
        .collect();
    let writes: f64 = ["POST", "PUT", "PATCH", "DELETE"]
        .iter()
        .map(|method| sum(&without_lease, "finetune_operator_api_requests_total", &[method]))
        .sum();
    println!("writes a job:    {:>7.2} until its preflight runs", writes / jobs as f64);
    println!("p99 of reconcile:{:>7} s", quantile(&metrics, 0.99));
    println!("peak:            {:>7.1} MB", resident(&operator, "VmHWM")?);
    println!("at rest:         {:>7.1} MB", resident(&operator, "VmRSS")?);
    Ok(())
}

fn start(cluster: &Cluster, finetune: &Path, settings: &Path) -> Result<Operator> {
    let mut command = cluster.inside(finetune);
    command.args(["operator", "--listen", LISTEN, "--settings"]).arg(settings);
    command.env("KUBECONFIG", cluster.kubeconfig()).env("FINETUNE_LOG", "warn");
    Ok(Operator(command.stdin(Stdio::null()).spawn().context("the operator cannot start")?))
}

fn job(number: usize) -> serde_json::Value {
    json!({
        "apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob",
        "metadata": {"name": format!("job-{number}"), "namespace": "default"},
        "spec": {
            "model": {"uri": "s3://models/smollm2/", "secretRef": {"name": "bucket"}},
            "dataset": {"train": "s3://data/train.jsonl", "secretRef": {"name": "bucket"}},
            "loraConfig": {"r": 8},
            "output": {"uri": format!("s3://out/job-{number}"), "secretRef": {"name": "bucket"}},
        },
    })
}

/// Asks the operator; it may not listen yet.
fn metrics(cluster: &Cluster) -> Result<String> {
    let mut curl: Command = cluster.inside("curl");
    curl.args(["--silent", "--retry", "20", "--retry-connrefused", "--retry-delay", "1"]);
    shell::output(curl.arg(format!("http://{LISTEN}/metrics")))
}

/// Adds up the samples of a metric whose labels contain all of `words`.
fn sum(metrics: &str, name: &str, words: &[&str]) -> f64 {
    metrics
        .lines()
        .filter(|line| line.starts_with(name) && words.iter().all(|word| line.contains(word)))
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .sum()
}

/// Returns the bound of the bucket in which a share of all reconciliations lies.
fn quantile(metrics: &str, share: f64) -> String {
    let name = "finetune_operator_reconcile_time_seconds";
    let all = sum(metrics, &format!("{name}_count"), &[]);
    metrics
        .lines()
        .filter_map(|line| line.strip_prefix(&format!("{name}_bucket{{le=\"")))
        .filter_map(|rest| {
            let (bound, count) = rest.split_once("\"} ")?;
            Some((bound, count.parse::<f64>().ok()?))
        })
        .find(|(_, count)| *count >= share * all)
        .map_or_else(|| "unknown".to_owned(), |(bound, _)| format!("≤{bound}"))
}

/// Reads a line of the process's status, in megabytes.
fn resident(operator: &Operator, name: &str) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", operator.0.id()))?;
    let line = status.lines().find(|line| line.starts_with(name)).context("no such line")?;
    let kibibytes: f64 = line.split_whitespace().nth(1).context("no number")?.parse()?;
    Ok(kibibytes * 1024.0 / 1e6)
}
