//! Keys, certificates and kubeconfigs.

use std::{path::Path, process::Command};

use anyhow::Result;
use serde_json::json;

use crate::{
    cluster::{network, node},
    tools::shell,
};

/// A day is too short for a cluster left up, a year is not.
const VALID_DAYS: &str = "365";

/// Creates `pki` in the state directory, if it is not there.
pub(crate) fn make(state_dir: &Path) -> Result<()> {
    let directory = state_dir.join("pki");
    if directory.exists() {
        return Ok(());
    }
    let partial = state_dir.join("pki.partial");
    let _ = std::fs::remove_dir_all(&partial);
    std::fs::create_dir_all(&partial)?;
    // Without a file of its own, openssl takes the system's, which adds extensions.
    std::fs::write(partial.join("openssl.cnf"), "[req]\ndistinguished_name = dn\n[dn]\n")?;

    authority(&partial)?;
    service_account_key(&partial)?;
    let apiserver = format!(
        "DNS:localhost,DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,\
         IP:127.0.0.1,IP:{},IP:{}",
        network::FIRST_SERVICE,
        network::NODE
    );
    certificate(&partial, "apiserver", "/CN=kube-apiserver", &apiserver)?;
    certificate(&partial, "admin", "/O=system:masters/CN=admin", "DNS:admin")?;
    for (node, address) in [(node::FIRST, network::NODE), (node::SECOND, network::SECOND_NODE)] {
        let subject = format!("/O=system:nodes/CN=system:node:{node}");
        let names = format!("DNS:{node},IP:{address},IP:127.0.0.1");
        certificate(&partial, node, &subject, &names)?;
    }
    for user in ["admin", node::FIRST, node::SECOND] {
        let config = kubeconfig(&directory, user).to_string();
        std::fs::write(partial.join(format!("{user}.conf")), config)?;
    }
    Ok(std::fs::rename(&partial, &directory)?)
}

fn openssl(directory: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new("openssl");
    command.current_dir(directory).args(arguments);
    command
}

/// A request for a new key and a certificate of it.
fn request(directory: &Path, name: &str, subject: &str) -> Command {
    let mut command = openssl(directory, &["req", "-x509", "-config", "openssl.cnf", "-noenc"]);
    command
        .args(["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-days", VALID_DAYS])
        .args(["-keyout", &format!("{name}.key"), "-out", &format!("{name}.crt")])
        .args(["-subj", subject]);
    command
}

fn authority(directory: &Path) -> Result<()> {
    let mut command = request(directory, "ca", "/CN=finetune-test-ca");
    command.args(["-addext", "basicConstraints=critical,CA:TRUE"]);
    command.args(["-addext", "keyUsage=critical,keyCertSign,cRLSign"]);
    shell::quietly(&mut command)
}

fn certificate(directory: &Path, name: &str, subject: &str, names: &str) -> Result<()> {
    let mut command = request(directory, name, subject);
    command.args(["-CA", "ca.crt", "-CAkey", "ca.key"]);
    command.args(["-addext", &format!("subjectAltName={names}")]);
    command.args(["-addext", "extendedKeyUsage=serverAuth,clientAuth"]);
    shell::quietly(&mut command)
}

fn service_account_key(directory: &Path) -> Result<()> {
    let curve = ["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"];
    shell::quietly(openssl(directory, &["genpkey", "-out", "sa.key"]).args(curve))?;
    shell::quietly(&mut openssl(directory, &["pkey", "-in", "sa.key", "-pubout", "-out", "sa.pub"]))
}

/// A kubeconfig is YAML, and so may be JSON.
fn kubeconfig(directory: &Path, user: &str) -> serde_json::Value {
    let file = |name: String| directory.join(name).display().to_string();
    json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": {
            "server": format!("https://{}:{}", network::NODE, network::APISERVER_PORT),
            "certificate-authority": file("ca.crt".to_owned()),
        }}],
        "users": [{"name": user, "user": {
            "client-certificate": file(format!("{user}.crt")),
            "client-key": file(format!("{user}.key")),
        }}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": user}}],
        "current-context": "test",
    })
}
