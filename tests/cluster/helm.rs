//! The chart, rendered and installed by tests.

use std::process::Command;

use serde_json::Value;

use crate::test_namespace::variable;

const CHART: &str = "charts/finetune-operator";

/// Runs helm on the chart with the values of `cargo xtask e2e`; returns what it printed.
pub fn run(arguments: &[&str]) -> String {
    let mut command = Command::new(variable("FINETUNE_TEST_HELM"));
    let output = command.current_dir(env!("CARGO_MANIFEST_DIR")).args(arguments).output().unwrap();
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "helm {arguments:?}: {complaint}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Renders the release that is installed, with more values.
pub fn template(more: &[&str]) -> Vec<Value> {
    let values = variable("FINETUNE_TEST_VALUES");
    let fixed = ["template", "finetune", CHART, "--namespace=finetune-system", "--values", &values];
    let text = run(&[&fixed[..], more].concat());
    let objects: Vec<Value> = serde_saphyr::from_multiple(&text).unwrap();
    objects.into_iter().filter(|object| !object.is_null()).collect()
}

/// Installs a release of its own beside the usual one.
pub fn install(release: &str, namespace: &str, more: &[&str]) {
    let values = variable("FINETUNE_TEST_VALUES");
    let fixed = ["upgrade", "--install", release, CHART, "--namespace", namespace];
    let waits = ["--create-namespace", "--wait", "--timeout=2m", "--values", &values];
    run(&[&fixed[..], &waits, more].concat());
}
