//! etcd, the apiserver, the controller manager and the scheduler.

use std::process::Stdio;

use anyhow::Result;

use crate::{
    cluster::{Cluster, network},
    fixtures::s3,
};

/// The components in the order of their start.
pub(crate) const NAMES: [&str; 4] = [ETCD, APISERVER, CONTROLLER_MANAGER, SCHEDULER];

const ETCD: &str = "etcd";
const APISERVER: &str = "kube-apiserver";
const CONTROLLER_MANAGER: &str = "kube-controller-manager";
const SCHEDULER: &str = "kube-scheduler";

/// Places all pods of a Job of ranks or none, which Kubernetes 1.36 has but does not do unasked: the
/// Job controller makes a group of pods of each such Job, and the scheduler minds it.
const GANGS: &str = "--feature-gates=GenericWorkload=true,GangScheduling=true,WorkloadWithJob=true";

/// Starts everything and waits until it is ready.
pub(crate) fn start(cluster: &Cluster) -> Result<()> {
    let processes = cluster.processes();
    processes.start(ETCD, &cluster.binaries.etcd(), &etcd(cluster))?;
    processes.wait(ETCD, || {
        let asked = cluster.namespace.enter(|| s3::status("127.0.0.1", 2379, "GET", "/health"));
        matches!(asked, Ok(Some(200)))
    })?;
    processes.start(APISERVER, &cluster.binaries.kubernetes(APISERVER), &apiserver(cluster))?;
    processes.wait(APISERVER, || is_ready(cluster))?;

    let program = cluster.binaries.kubernetes(CONTROLLER_MANAGER);
    processes.start(CONTROLLER_MANAGER, &program, &controller_manager(cluster))?;
    processes.start(SCHEDULER, &cluster.binaries.kubernetes(SCHEDULER), &scheduler(cluster))?;
    // No pod is accepted before its account is there.
    let account = ["get", "serviceaccount", "--namespace=default", "default"];
    processes.wait(CONTROLLER_MANAGER, || succeeds(cluster, &account))?;
    let server = "--server=https://127.0.0.1:10259";
    let healthy = ["get", "--raw=/healthz", server, "--insecure-skip-tls-verify"];
    processes.wait(SCHEDULER, || succeeds(cluster, &healthy))
}

/// Returns whether the apiserver is ready.
pub(crate) fn is_ready(cluster: &Cluster) -> bool {
    succeeds(cluster, &["get", "--raw=/readyz"])
}

fn succeeds(cluster: &Cluster, arguments: &[&str]) -> bool {
    let mut command = cluster.kubectl();
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

fn etcd(cluster: &Cluster) -> Vec<String> {
    vec![
        format!("--data-dir={}", cluster.path("data/etcd").display()),
        "--listen-client-urls=http://127.0.0.1:2379".to_owned(),
        "--advertise-client-urls=http://127.0.0.1:2379".to_owned(),
        "--listen-peer-urls=http://127.0.0.1:2380".to_owned(),
        // What a power cut would take is not worth the wait for the disk.
        "--unsafe-no-fsync".to_owned(),
    ]
}

fn apiserver(cluster: &Cluster) -> Vec<String> {
    let pki = |name: &str| cluster.path("pki").join(name).display().to_string();
    vec![
        "--etcd-servers=http://127.0.0.1:2379".to_owned(),
        format!("--secure-port={}", network::APISERVER_PORT),
        format!("--advertise-address={}", network::NODE),
        format!("--tls-cert-file={}", pki("apiserver.crt")),
        format!("--tls-private-key-file={}", pki("apiserver.key")),
        format!("--client-ca-file={}", pki("ca.crt")),
        format!("--service-account-key-file={}", pki("sa.pub")),
        format!("--service-account-signing-key-file={}", pki("sa.key")),
        "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
        format!("--service-cluster-ip-range={}", network::SERVICES),
        "--authorization-mode=Node,RBAC".to_owned(),
        GANGS.to_owned(),
        // Where such groups are kept.
        "--runtime-config=scheduling.k8s.io/v1alpha2=true".to_owned(),
        "--enable-admission-plugins=NodeRestriction".to_owned(),
        "--allow-privileged=true".to_owned(),
        format!("--kubelet-client-certificate={}", pki("admin.crt")),
        format!("--kubelet-client-key={}", pki("admin.key")),
        format!("--kubelet-certificate-authority={}", pki("ca.crt")),
        // Nothing resolves the node's name.
        "--kubelet-preferred-address-types=InternalIP".to_owned(),
    ]
}

fn controller_manager(cluster: &Cluster) -> Vec<String> {
    let pki = |name: &str| cluster.path("pki").join(name).display().to_string();
    vec![
        format!("--kubeconfig={}", cluster.kubeconfig().display()),
        format!("--service-account-private-key-file={}", pki("sa.key")),
        format!("--root-ca-file={}", pki("ca.crt")),
        format!("--cluster-signing-cert-file={}", pki("ca.crt")),
        format!("--cluster-signing-key-file={}", pki("ca.key")),
        "--use-service-account-credentials=true".to_owned(),
        "--leader-elect=false".to_owned(),
        // Tests wait until a node that has stopped renewing its lease counts as lost. Kubelets renew
        // several times within this period, see `node::LEASE_SECONDS`.
        "--node-monitor-grace-period=20s".to_owned(),
        GANGS.to_owned(),
    ]
}

fn scheduler(cluster: &Cluster) -> Vec<String> {
    vec![
        format!("--kubeconfig={}", cluster.kubeconfig().display()),
        "--leader-elect=false".to_owned(),
        GANGS.to_owned(),
    ]
}
