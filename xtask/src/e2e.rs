//! The tests on a real Kubernetes: images, cluster, chart, and `tests/cluster` inside its network.

use std::{
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context, Result};
use serde_json::json;

use crate::{
    build::{self, Binaries},
    cluster::{self, Cluster, Extent},
    fixtures::model,
    images,
    tools::shell,
};

const NAMESPACE: &str = "finetune-system";
const RELEASE: &str = "finetune";
/// Tests with operators of their own, of some namespaces: they must not meet one of all.
const WITHOUT_CHART: [&str; 5] = ["crashes::", "devices::", "gangs::", "namespaces::", "ranks::"];
/// Tests at once: more would wait for the node's two cores.
const AT_ONCE: u32 = 4;

/// A cluster with the product's images; it is ended when this is dropped, unless it was there before.
pub(crate) struct Prepared {
    cluster: Cluster,
    model: PathBuf,
    was_up: bool,
}

/// Brings up the cluster and runs the tests on it, with the runner's own words: all, or those whose
/// names contain one of `only`; each begins with its module, which tells the half it is in.
pub(crate) fn run(only: &[String]) -> Result<ExitCode> {
    let binaries = build::run()?;
    let model = model::directory(&binaries)?;
    let prepared = prepare(&binaries, &model)?;
    let mut code = ExitCode::SUCCESS;
    for phase in [Phase::WithoutChart, Phase::WithChart] {
        let tests: Vec<&str> =
            only.iter().map(String::as_str).filter(|test| phase.has(test)).collect();
        if tests.is_empty() && !only.is_empty() {
            continue;
        }
        if !prepared.command(phase, &tests)?.status()?.success() {
            code = ExitCode::FAILURE;
        }
    }
    Ok(code)
}

/// Which half of the tests.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Only the CRD is there.
    WithoutChart,
    /// The chart is installed.
    WithChart,
}

impl Phase {
    /// Returns whether a test is in this half.
    fn has(self, test: &str) -> bool {
        let is_without_chart = WITHOUT_CHART.iter().any(|module| test.starts_with(module));
        is_without_chart == (self == Self::WithoutChart)
    }
}

/// Brings up the cluster with the images in it.
pub(crate) fn prepare(binaries: &Binaries, model: &Path) -> Result<Prepared> {
    let archives = images::write(binaries)?;
    let was_up = Cluster::existing().is_ok_and(|cluster| cluster.is_running());
    let cluster = cluster::up(Extent::Whole)?;
    let prepared = Prepared { cluster, model: model.to_owned(), was_up };
    for archive in [&archives.operator, &archives.trainer, &images::write_probe()?] {
        prepared.cluster.load_image(archive)?;
    }
    std::fs::write(values_file(), chart_values()?.to_string())?;
    Ok(prepared)
}

impl Prepared {
    /// Returns the command that runs one half of the tests inside the cluster's network, or some of it.
    pub(crate) fn command(&self, phase: Phase, tests: &[&str]) -> Result<Command> {
        match phase {
            Phase::WithoutChart => {
                // Left by an earlier run on the same cluster, its operator would act too.
                let mut helm = self.cluster.helm();
                helm.args(["uninstall", RELEASE, "--namespace", NAMESPACE]);
                shell::quietly(helm.args(["--ignore-not-found", "--wait"]))?;
                self.apply_crd()?;
            }
            Phase::WithChart => self.install()?,
        }
        let mut command = self.cluster.inside(env!("CARGO"));
        command.args(["test", "--release", "--workspace", "--test", "cluster", "--no-fail-fast"]);
        command.args(["--", "--show-output", &format!("--test-threads={AT_ONCE}")]);
        match phase {
            Phase::WithoutChart if tests.is_empty() => command.args(WITHOUT_CHART),
            Phase::WithoutChart => command.args(tests),
            Phase::WithChart => {
                command.args(tests).args(WITHOUT_CHART.iter().flat_map(|test| ["--skip", test]))
            }
        };
        command.current_dir(shell::root());
        shell::remove_package_variables(&mut command);
        command.env("LIBTORCH", crate::tools::libtorch::directory()?);
        command.env("KUBECONFIG", self.cluster.kubeconfig());
        command.env("FINETUNE_TEST_CLUSTER", "1");
        command.env("FINETUNE_TEST_MODEL", &self.model);
        command.env("FINETUNE_TEST_TRAINER_IMAGE", images::TRAINER);
        command.env("FINETUNE_TEST_PROBE_IMAGE", images::PROBE);
        command.env("FINETUNE_TEST_VALUES", values_file());
        command.env("FINETUNE_TEST_KUBECTL", self.cluster.kubectl_program());
        command.env("FINETUNE_TEST_HELM", cluster::binaries::helm()?);
        command.env("FINETUNE_TEST_PROMETHEUS", cluster::binaries::prometheus()?);
        command.envs(cluster::s3_environment());
        Ok(command)
    }

    fn apply_crd(&self) -> Result<()> {
        let crd = shell::root().join("crds/finetunejobs.finetune.dev.yaml");
        let mut apply = self.cluster.kubectl();
        apply.args(["apply", "--server-side", "--force-conflicts", "-f"]).arg(crd);
        shell::run(&mut apply)
    }

    /// Installs the chart as an administrator would, with values for this cluster.
    fn install(&self) -> Result<()> {
        // The CRD was applied by hand, as for the other half: the chart may have it.
        self.apply_crd()?;
        let mut label = self.cluster.kubectl();
        label.args(["annotate", "--overwrite", "crd", "finetunejobs.finetune.dev"]);
        label.arg(format!("meta.helm.sh/release-name={RELEASE}"));
        label.arg(format!("meta.helm.sh/release-namespace={NAMESPACE}"));
        shell::quietly(&mut label)?;
        let mut label = self.cluster.kubectl();
        label.args(["label", "--overwrite", "crd", "finetunejobs.finetune.dev"]);
        label.arg("app.kubernetes.io/managed-by=Helm");
        shell::quietly(&mut label)?;

        let mut helm = self.cluster.helm();
        helm.args(["upgrade", "--install", RELEASE]);
        helm.arg(shell::root().join("charts/finetune-operator"));
        helm.args(["--namespace", NAMESPACE, "--create-namespace", "--wait", "--timeout=2m"]);
        helm.arg("--values").arg(values_file());
        shell::quietly(&mut helm).context("the chart cannot be installed")
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        if !self.was_up
            && let Err(error) = cluster::down()
        {
            eprintln!("the cluster could not be ended: {error:#}");
        }
    }
}

/// What the chart is installed with here.
fn values_file() -> PathBuf {
    shell::root().join("target/e2e-values.json")
}

fn chart_values() -> Result<serde_json::Value> {
    let image = |name: &str| {
        let (repository, tag) = name.rsplit_once(':').context("an image has a tag")?;
        Ok::<_, anyhow::Error>(json!({"repository": repository, "tag": tag, "pullPolicy": "Never"}))
    };
    // By name: every pod of a job asks CoreDNS for it.
    let endpoint = cluster::s3_endpoint_of_pods();
    Ok(json!({
        "image": {"operator": image(images::OPERATOR)?, "trainer": image(images::TRAINER)?},
        "settings": {
            "accelerators": [{
                // Small shares, so that several pods fit on two cores.
                "name": "cpu", "cpu": 0.3, "memoryGiB": 8, "bf16Tflops": 0.4, "fp32Tflops": 0.2,
                "hasBf16": true,
            }],
            "preflight": {"cpu": 0.1, "memoryGiB": 0.5, "storageGiB": 2},
            "terminationGracePeriodSeconds": 20,
            // Only the cluster's own: a Secret that names another is refused.
            "allowedEndpoints": [endpoint.trim_start_matches("http://")],
            "environment": {
                "AWS_ENDPOINT_URL": endpoint, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1",
            },
        },
    }))
}
