//! The node: containerd, the kubelet and kube-proxy.

use std::{path::Path, process::Command};

use anyhow::{Context, Result};
use serde_json::json;

use crate::{
    cluster::{Cluster, cgroups, debian, network},
    fixtures::s3,
    images::oci::{self, Image},
    tools::shell,
};

/// The node's name.
pub(crate) const NODE_NAME: &str = "node0";
/// The components in the order of their start.
pub(crate) const NAMES: [&str; 3] = [CONTAINERD, KUBELET, PROXY];

const CONTAINERD: &str = "containerd";
const KUBELET: &str = "kubelet";
const PROXY: &str = "kube-proxy";

/// The image of the container that holds a pod's namespaces.
const PAUSE_IMAGE: &str = "localhost/pause:1";
/// Its program: nothing to do but wait, and reap those it inherits.
const PAUSE_C: &str = "\
#include <signal.h>
#include <unistd.h>
static void end(int number) { _exit(0); }
int main(void) {
  signal(SIGTERM, end);
  signal(SIGINT, end);
  signal(SIGCHLD, SIG_IGN);
  for (;;) pause();
}
";

/// Starts containerd, which needs nothing of the control plane.
pub(crate) fn start_runtime(cluster: &Cluster) -> Result<()> {
    let cni = cluster.path("etc/cni");
    std::fs::create_dir_all(&cni)?;
    std::fs::write(cni.join("10-bridge.conflist"), pod_network(cluster).to_string())?;
    let config = cluster.path("etc/containerd.toml");
    std::fs::write(&config, containerd(cluster)?)?;
    let program = cluster.binaries.containerd().join(CONTAINERD);
    cluster.processes().start(CONTAINERD, &program, &[format!("--config={}", config.display())])
}

/// Starts the rest and waits until the node is ready.
pub(crate) fn start(cluster: &Cluster) -> Result<()> {
    let processes = cluster.processes();
    processes.wait(CONTAINERD, || {
        let mut version = ctr(cluster);
        version.arg("version");
        version.output().is_ok_and(|output| output.status.success())
    })?;
    load_pause(cluster)?;

    cgroups::make(&cluster.namespace.name)?;
    let config = cluster.path("etc/kubelet.json");
    std::fs::write(&config, kubelet(cluster).to_string())?;
    let arguments = [
        format!("--config={}", config.display()),
        format!("--kubeconfig={}", cluster.path("pki/node.conf").display()),
        format!("--root-dir={}", cluster.path("data/kubelet").display()),
        format!("--hostname-override={NODE_NAME}"),
        format!("--node-ip={}", network::NODE),
    ];
    processes.start(KUBELET, &cluster.binaries.kubernetes(KUBELET), &arguments)?;
    processes.start(PROXY, &cluster.binaries.kubernetes(PROXY), &proxy(cluster))?;
    processes.wait(KUBELET, || is_ready(cluster))?;
    processes.wait(PROXY, || is_healthy(cluster, 10256))
}

/// Creates a command of containerd's client for the kubelet's images and containers.
pub(crate) fn ctr(cluster: &Cluster) -> Command {
    let mut command = Command::new(cluster.binaries.containerd().join("ctr"));
    command.arg("--address").arg(cluster.path("run/containerd.sock")).arg("--namespace=k8s.io");
    command
}

/// The node stays marked as ready for a while without its kubelet, so this one is asked first.
fn is_ready(cluster: &Cluster) -> bool {
    let status = r#"-o=jsonpath={.status.conditions[?(@.type=="Ready")].status}"#;
    let marked = || cluster.kubectl().args(["get", "node", NODE_NAME, status]).output();
    is_healthy(cluster, 10248) && marked().is_ok_and(|output| output.stdout == b"True")
}

fn is_healthy(cluster: &Cluster, port: u16) -> bool {
    let asked = cluster.namespace.enter(|| s3::status("127.0.0.1", port, "GET", "/healthz"));
    matches!(asked, Ok(Some(200)))
}

fn load_pause(cluster: &Cluster) -> Result<()> {
    let source = cluster.path("etc/pause.c");
    let root = cluster.path("etc/pause");
    std::fs::create_dir_all(&root)?;
    let archive = cluster.path("etc/pause.tar");
    std::fs::write(&source, PAUSE_C)?;
    let mut compiler = Command::new("cc");
    compiler.args(["-Os", "-static", "-s", "-o"]).arg(root.join("pause")).arg(&source);
    shell::run(&mut compiler).context("a C compiler with a static libc is needed")?;
    let config = json!({"Entrypoint": ["/pause"]});
    let image = Image { name: PAUSE_IMAGE, root: &root, config, is_compressed: false };
    oci::write(&image, &archive)?;
    cluster.load_image(&archive)
}

fn pod_network(cluster: &Cluster) -> serde_json::Value {
    json!({"cniVersion": "1.0.0", "name": cluster.namespace.name, "plugins": [{
        "type": "bridge",
        "bridge": network::BRIDGE,
        "isGateway": true,
        "ipMasq": false,
        "hairpinMode": true,
        "ipam": {
            "type": "host-local",
            "ranges": [[{"subnet": network::PODS, "gateway": network::NODE}]],
            "routes": [{"dst": "0.0.0.0/0"}],
            "dataDir": cluster.path("data/cni"),
        },
    }]})
}

fn containerd(cluster: &Cluster) -> Result<String> {
    let runc = debian::find("runc").context("runc is not there")?;
    let path = |below: &str| cluster.path(below);
    Ok(format!(
        r#"version = 3
root = {root:?}
state = {state:?}
[grpc]
  address = {socket:?}
[ttrpc]
  address = {ttrpc:?}
[plugins."io.containerd.internal.v1.opt"]
  path = {opt:?}
[plugins."io.containerd.nri.v1.nri"]
  disable = true
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "{PAUSE_IMAGE}"
[plugins."io.containerd.cri.v1.runtime"]
  # A machine may lack CAP_SYS_RESOURCE, which lower scores need.
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
[plugins."io.containerd.cri.v1.runtime".cni]
  bin_dirs = ["{plugins}"]
  conf_dir = {cni:?}
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
  # By name, the system's own would be found first.
  runtime_path = {shim:?}
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
  BinaryName = {runc:?}
  Root = {runc_root:?}
"#,
        root = path("data/containerd"),
        state = path("run/containerd"),
        socket = path("run/containerd.sock"),
        ttrpc = path("run/containerd.sock.ttrpc"),
        opt = path("data/opt"),
        shim = cluster.binaries.containerd().join("containerd-shim-runc-v2"),
        plugins = debian::CNI_PLUGINS,
        cni = path("etc/cni"),
        runc_root = path("run/runc"),
    ))
}

fn kubelet(cluster: &Cluster) -> serde_json::Value {
    let path = |below: &str| cluster.path(below);
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "failCgroupV1": false,
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": format!("/{}", cluster.namespace.name),
        "containerRuntimeEndpoint": unix(&path("run/containerd.sock")),
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": path("pki/ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": path("pki/node.crt"),
        "tlsPrivateKeyFile": path("pki/node.key"),
        "clusterDomain": "cluster.local",
        "clusterDNS": [network::NAME_SERVICE],
        "failSwapOn": false,
        "resolvConf": "",
        // Room left on a developer's disk is not the cluster's to judge.
        "evictionHard": {
            "memory.available": "100Mi",
            "nodefs.available": "1%",
            "nodefs.inodesFree": "1%",
            "imagefs.available": "1%",
        },
        // Nor are images removed for it, which nothing would load again: 100 switches that off.
        "imageGCHighThresholdPercent": 100,
        "podLogsDir": path("data/pod-logs"),
        "volumePluginDir": path("data/volume-plugins"),
    })
}

fn proxy(cluster: &Cluster) -> Vec<String> {
    vec![
        format!("--kubeconfig={}", cluster.kubeconfig().display()),
        "--proxy-mode=nftables".to_owned(),
        format!("--hostname-override={NODE_NAME}"),
        format!("--cluster-cidr={}", network::PODS),
        // Pods are on one bridge: without it, an answer takes the short way past the translation.
        "--masquerade-all=true".to_owned(),
        // Zero leaves the machine's own limits alone.
        "--conntrack-max-per-core=0".to_owned(),
        "--conntrack-tcp-timeout-established=0s".to_owned(),
        "--conntrack-tcp-timeout-close-wait=0s".to_owned(),
    ]
}

fn unix(path: &Path) -> String {
    format!("unix://{}", path.display())
}
