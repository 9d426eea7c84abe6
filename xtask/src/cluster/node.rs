//! A node: containerd, the kubelet and kube-proxy.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use serde_json::json;

use crate::{
    cluster::{
        Cluster, cgroups, debian,
        network::{self, Namespace},
        processes::Processes,
    },
    fixtures::s3,
    images::oci::{self, Image},
    tools::shell,
};

/// The first node's name; the control plane and the S3 server are on it too.
pub(crate) const FIRST: &str = "node0";
/// The second node's name, also that of its directory.
pub(crate) const SECOND: &str = "node1";
/// The components in the order of their start.
pub(crate) const NAMES: [&str; 3] = [CONTAINERD, KUBELET, PROXY];
/// What a pod has to tolerate to be placed on the second node, which is there for some tests only.
const SECOND_TAINT: &str = "finetune.dev/second-node";
/// For how long a lease is valid; a kubelet renews it four times within that.
const LEASE_SECONDS: u32 = 8;

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

/// A node, running or not.
pub(crate) struct Node<'a> {
    cluster: &'a Cluster,
    pub(crate) name: &'static str,
    /// The node's address, and its pods' gateway.
    pub(crate) address: &'static str,
    /// The addresses of its pods.
    pods: &'static str,
    /// Where everything of it is.
    pub(crate) directory: PathBuf,
    /// Its network; its pods' cgroup has the same name.
    pub(crate) namespace: Namespace,
}

impl<'a> Node<'a> {
    /// Describes the node that every cluster with pods has.
    pub(crate) fn first(cluster: &'a Cluster) -> Self {
        Self {
            cluster,
            name: FIRST,
            address: network::NODE,
            pods: network::PODS,
            directory: cluster.state_dir.clone(),
            namespace: cluster.namespace.clone(),
        }
    }

    /// Describes the node that is there for some tests only.
    pub(crate) fn second(cluster: &'a Cluster) -> Self {
        Self {
            cluster,
            name: SECOND,
            address: network::SECOND_NODE,
            pods: network::SECOND_PODS,
            directory: cluster.path(SECOND),
            namespace: cluster.namespace.second(),
        }
    }

    /// Starts containerd, which needs nothing of the control plane.
    pub(crate) fn start_runtime(&self) -> Result<()> {
        let cni = self.path("etc/cni");
        std::fs::create_dir_all(&cni)?;
        std::fs::write(cni.join("10-bridge.conflist"), self.pod_network().to_string())?;
        let config = self.path("etc/containerd.toml");
        std::fs::write(&config, self.containerd()?)?;
        let program = self.cluster.binaries.containerd().join(CONTAINERD);
        let arguments = [format!("--config={}", config.display())];
        self.processes().start(CONTAINERD, &program, &arguments)
    }

    /// Waits until containerd can be used.
    pub(crate) fn wait_for_runtime(&self) -> Result<()> {
        self.processes().wait(CONTAINERD, || {
            let mut version = self.ctr();
            version.arg("version");
            version.output().is_ok_and(|output| output.status.success())
        })
    }

    /// Starts the rest and waits until the node is ready.
    pub(crate) fn start(&self) -> Result<()> {
        let Self { cluster, name, .. } = self;
        let processes = self.processes();
        cgroups::make(&self.namespace.name)?;
        let config = self.path("etc/kubelet.json");
        std::fs::write(&config, self.kubelet().to_string())?;
        let kubeconfig = cluster.path("pki").join(format!("{name}.conf"));
        let arguments = [
            format!("--config={}", config.display()),
            format!("--kubeconfig={}", kubeconfig.display()),
            format!("--root-dir={}", self.path("data/kubelet").display()),
            format!("--hostname-override={name}"),
            format!("--node-ip={}", self.address),
        ];
        processes.start(KUBELET, &cluster.binaries.kubernetes(KUBELET), &arguments)?;
        processes.start(PROXY, &cluster.binaries.kubernetes(PROXY), &self.proxy())?;
        processes.wait(KUBELET, || self.is_ready())?;
        processes.wait(PROXY, || self.is_healthy(10256))
    }

    /// Creates a command of containerd's client for the kubelet's images and containers.
    pub(crate) fn ctr(&self) -> Command {
        let mut command = Command::new(self.cluster.binaries.containerd().join("ctr"));
        command.arg("--address").arg(self.path("run/containerd.sock")).arg("--namespace=k8s.io");
        command
    }

    /// Loads an image from an OCI archive.
    pub(crate) fn load_image(&self, archive: &Path) -> Result<()> {
        shell::quietly(self.ctr().args(["images", "import"]).arg(archive))
            .with_context(|| format!("cannot load the image {}", archive.display()))
    }

    /// Makes the image of the container that holds a pod's namespaces, and loads it.
    pub(crate) fn load_pause(&self) -> Result<()> {
        let source = self.path("etc/pause.c");
        let root = self.path("etc/pause");
        std::fs::create_dir_all(&root)?;
        let archive = self.path("etc/pause.tar");
        std::fs::write(&source, PAUSE_C)?;
        let mut compiler = Command::new("cc");
        compiler.args(["-Os", "-static", "-s", "-o"]).arg(root.join("pause")).arg(&source);
        shell::run(&mut compiler).context("a C compiler with a static libc is needed")?;
        let config = json!({"Entrypoint": ["/pause"]});
        let image = Image { name: PAUSE_IMAGE, root: &root, config, is_compressed: false };
        oci::write(&image, &archive)?;
        self.load_image(&archive)
    }

    /// Returns its recorded processes.
    pub(crate) fn processes(&self) -> Processes<'_> {
        Processes { state_dir: &self.directory, namespace: &self.namespace }
    }

    /// The node stays marked as ready for a while without its kubelet, so this one is asked first.
    fn is_ready(&self) -> bool {
        let status = r#"-o=jsonpath={.status.conditions[?(@.type=="Ready")].status}"#;
        let marked = || self.cluster.kubectl().args(["get", "node", self.name, status]).output();
        self.is_healthy(10248) && marked().is_ok_and(|output| output.stdout == b"True")
    }

    fn is_healthy(&self, port: u16) -> bool {
        let asked = self.namespace.enter(|| s3::status("127.0.0.1", port, "GET", "/healthz"));
        matches!(asked, Ok(Some(200)))
    }

    fn path(&self, below: &str) -> PathBuf {
        self.directory.join(below)
    }

    fn pod_network(&self) -> serde_json::Value {
        json!({"cniVersion": "1.0.0", "name": self.namespace.name, "plugins": [{
            "type": "bridge",
            "bridge": network::BRIDGE,
            "isGateway": true,
            "ipMasq": false,
            "hairpinMode": true,
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": self.pods, "gateway": self.address}]],
                "routes": [{"dst": "0.0.0.0/0"}],
                "dataDir": self.path("data/cni"),
            },
        }]})
    }

    fn containerd(&self) -> Result<String> {
        let runc = debian::find("runc").context("runc is not there")?;
        let path = |below: &str| self.path(below);
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
            shim = self.cluster.binaries.containerd().join("containerd-shim-runc-v2"),
            plugins = debian::CNI_PLUGINS,
            cni = path("etc/cni"),
            runc_root = path("run/runc"),
        ))
    }

    fn kubelet(&self) -> serde_json::Value {
        let path = |below: &str| self.path(below);
        let pki = |name: &str| self.cluster.path("pki").join(name);
        let taints = match self.name {
            SECOND => json!([{"key": SECOND_TAINT, "effect": "NoSchedule"}]),
            _ => json!([]),
        };
        json!({
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "failCgroupV1": false,
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": format!("/{}", self.namespace.name),
            "containerRuntimeEndpoint": unix(&path("run/containerd.sock")),
            "authentication": {
                "anonymous": {"enabled": false},
                "webhook": {"enabled": true},
                "x509": {"clientCAFile": pki("ca.crt")},
            },
            "authorization": {"mode": "Webhook"},
            "tlsCertFile": pki(&format!("{}.crt", self.name)),
            "tlsPrivateKeyFile": pki(&format!("{}.key", self.name)),
            "nodeLeaseDurationSeconds": LEASE_SECONDS,
            "registerWithTaints": taints,
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

    fn proxy(&self) -> Vec<String> {
        vec![
            format!("--kubeconfig={}", self.cluster.kubeconfig().display()),
            "--proxy-mode=nftables".to_owned(),
            format!("--hostname-override={}", self.name),
            format!("--cluster-cidr={}", self.pods),
            // Pods are on one bridge: without it, an answer takes the short way past the translation.
            "--masquerade-all=true".to_owned(),
            // Zero leaves the machine's own limits alone.
            "--conntrack-max-per-core=0".to_owned(),
            "--conntrack-tcp-timeout-established=0s".to_owned(),
            "--conntrack-tcp-timeout-close-wait=0s".to_owned(),
        ]
    }
}

fn unix(path: &Path) -> String {
    format!("unix://{}", path.display())
}
