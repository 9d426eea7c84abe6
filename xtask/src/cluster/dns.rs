//! Names: CoreDNS as a process of the node, and the S3 server as a Service.

use std::{
    io::Write,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::{
    cluster::{Cluster, network, storage},
    fixtures::s3,
};

/// The component's name.
pub(crate) const NAME: &str = "coredns";
/// Where it listens: the usual port is for root's own servers.
const PORT: u16 = 5353;
const HEALTH_PORT: u16 = 8089;
/// The S3 server's Service.
const S3_SERVICE: (&str, &str) = ("s3", "default");

/// Starts the server and makes the Services it is found by.
pub(crate) fn start(cluster: &Cluster) -> Result<()> {
    let file = cluster.path("etc/Corefile");
    std::fs::write(&file, corefile(cluster))?;
    let arguments = [format!("-conf={}", file.display())];
    cluster.processes().start(NAME, &cluster.binaries.coredns(), &arguments)?;
    let names = json!([{"name": "dns", "port": 53, "targetPort": PORT, "protocol": "UDP"},
        {"name": "dns-tcp", "port": 53, "targetPort": PORT, "protocol": "TCP"}]);
    let s3_port = json!([{"name": "s3", "port": storage::PORT, "protocol": "TCP"}]);
    let objects = json!({"apiVersion": "v1", "kind": "List", "items": [
        service("kube-dns", "kube-system", Some(network::NAME_SERVICE), &names),
        endpoints("kube-dns", "kube-system", &names),
        service(S3_SERVICE.0, S3_SERVICE.1, None, &s3_port),
        endpoints(S3_SERVICE.0, S3_SERVICE.1, &s3_port),
    ]});
    apply(cluster.kubectl(), &objects)
}

/// Waits until it answers with what the apiserver has.
pub(crate) fn wait(cluster: &Cluster) -> Result<()> {
    cluster.processes().wait(NAME, || {
        let asked =
            cluster.namespace.enter(|| s3::status(network::NODE, HEALTH_PORT, "GET", "/health"));
        matches!(asked, Ok(Some(200)))
    })
}

/// Returns the S3 server's address for pods.
pub(crate) fn s3_endpoint() -> String {
    let (name, namespace) = S3_SERVICE;
    format!("http://{name}.{namespace}.svc.cluster.local:{}", storage::PORT)
}

/// Names of the cluster and no others: there is no way out to ask.
fn corefile(cluster: &Cluster) -> String {
    format!(
        ".:{PORT} {{
  bind {node}
  errors
  health {node}:{HEALTH_PORT}
  kubernetes cluster.local in-addr.arpa {{
    kubeconfig {kubeconfig}
    ttl 5
  }}
}}
",
        node = network::NODE,
        kubeconfig = cluster.kubeconfig().display(),
    )
}

/// A Service without a selector: what serves is no pod.
fn service(name: &str, namespace: &str, address: Option<&str>, ports: &Value) -> Value {
    let mut service = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"ports": ports},
    });
    if let Some(address) = address {
        service["spec"]["clusterIP"] = json!(address);
    }
    service
}

fn endpoints(name: &str, namespace: &str, ports: &Value) -> Value {
    let port = |port: &Value| {
        let number = port.get("targetPort").unwrap_or(&port["port"]);
        json!({"name": port["name"], "port": number, "protocol": port["protocol"]})
    };
    let ports: Vec<Value> = ports.as_array().into_iter().flatten().map(port).collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": format!("{name}-node"), "namespace": namespace,
            "labels": {"kubernetes.io/service-name": name},
        },
        "addressType": "IPv4",
        "ports": ports,
        "endpoints": [{"addresses": [network::NODE], "conditions": {"ready": true}}],
    })
}

fn apply(mut kubectl: Command, objects: &Value) -> Result<()> {
    kubectl.args(["apply", "--server-side", "--force-conflicts", "--filename=-"]);
    kubectl.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = kubectl.spawn().context("cannot start kubectl")?;
    let mut input = child.stdin.take().context("kubectl has no input")?;
    input.write_all(objects.to_string().as_bytes())?;
    drop(input);
    let output = child.wait_with_output()?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "the Services of names cannot be made: {complaint}");
    Ok(())
}
