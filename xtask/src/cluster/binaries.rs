//! The programs of a cluster, built with Go from their public modules.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use anyhow::{Context, Result, bail};

use crate::tools::{cache, shell};

const KUBERNETES: Module = Module {
    entry: "kubernetes-1.36.3",
    path: "k8s.io/kubernetes",
    version: "v1.36.3",
    packages: &[
        "cmd/kube-apiserver",
        "cmd/kube-controller-manager",
        "cmd/kube-scheduler",
        "cmd/kubectl",
        "cmd/kubelet",
        "cmd/kube-proxy",
    ],
    tags: "",
    variables: &[
        ("k8s.io/component-base/version.gitVersion", "v1.36.3"),
        ("k8s.io/component-base/version.gitMajor", "1"),
        ("k8s.io/component-base/version.gitMinor", "36"),
    ],
    // The modules that kubernetes keeps in its own repository are released as v0.
    replaced: Some("v0.36.3"),
};

const ETCD: Module = Module {
    entry: "etcd-3.6.16",
    path: "go.etcd.io/etcd/server/v3",
    version: "v3.6.16",
    packages: &[""],
    tags: "",
    variables: &[],
    replaced: None,
};

const CONTAINERD: Module = Module {
    entry: "containerd-2.3.7",
    path: "github.com/containerd/containerd/v2",
    version: "v2.3.7",
    packages: &["cmd/containerd", "cmd/containerd-shim-runc-v2", "cmd/ctr"],
    tags: "no_btrfs,no_devmapper",
    variables: &[("github.com/containerd/containerd/v2/version.Version", "v2.3.7")],
    replaced: None,
};

const HELM: Module = Module {
    entry: "helm-3.22.0",
    path: "helm.sh/helm/v3",
    version: "v3.22.0",
    packages: &["cmd/helm"],
    tags: "",
    variables: &[
        ("helm.sh/helm/v3/internal/version.version", "v3.22.0"),
        // What `helm template` and `helm lint` take the cluster to be.
        ("helm.sh/helm/v3/pkg/chartutil.k8sVersionMajor", "1"),
        ("helm.sh/helm/v3/pkg/chartutil.k8sVersionMinor", "36"),
        ("helm.sh/helm/v3/pkg/lint/rules.k8sVersionMajor", "1"),
        ("helm.sh/helm/v3/pkg/lint/rules.k8sVersionMinor", "36"),
    ],
    replaced: None,
};

const COREDNS: Module = Module {
    entry: "coredns-1.14.7",
    path: "github.com/coredns/coredns",
    version: "v1.14.7",
    packages: &[""],
    tags: "",
    variables: &[],
    replaced: None,
};

// Debian's has no service discovery of Kubernetes.
const PROMETHEUS: Module = Module {
    entry: "prometheus-3.5.0",
    path: "github.com/prometheus/prometheus",
    // Its third major version, under the number that Go's modules allow it.
    version: "v0.305.0",
    packages: &["cmd/prometheus"],
    tags: "",
    variables: &[],
    replaced: None,
};

/// A Go module and what is built of it.
struct Module {
    entry: &'static str,
    path: &'static str,
    version: &'static str,
    /// Main packages, below the module's path.
    packages: &'static [&'static str],
    tags: &'static str,
    /// String variables that the linker sets.
    variables: &'static [(&'static str, &'static str)],
    /// The version of the modules that its go.mod replaces by directories.
    replaced: Option<&'static str>,
}

/// Builds helm if it is not in the cache, and nothing else.
pub(crate) fn helm() -> Result<PathBuf> {
    Ok(HELM.build()?.join("helm"))
}

/// Builds Prometheus if it is not in the cache.
pub(crate) fn prometheus() -> Result<PathBuf> {
    Ok(PROMETHEUS.build()?.join("prometheus"))
}

/// Directories of built programs.
pub(crate) struct Binaries {
    kubernetes: PathBuf,
    etcd: PathBuf,
    containerd: PathBuf,
    coredns: PathBuf,
    helm: PathBuf,
}

impl Binaries {
    /// Describes where programs are once they are built.
    pub(crate) fn expected() -> Self {
        let directory = |module: &Module| cache::directory().join(module.entry);
        Self {
            kubernetes: directory(&KUBERNETES),
            etcd: directory(&ETCD),
            containerd: directory(&CONTAINERD),
            coredns: directory(&COREDNS),
            helm: directory(&HELM),
        }
    }

    /// Builds the programs that are not in the cache.
    pub(crate) fn build() -> Result<Self> {
        // One after the other: each build uses all cores.
        Ok(Self {
            kubernetes: KUBERNETES.build()?,
            etcd: ETCD.build()?,
            containerd: CONTAINERD.build()?,
            coredns: COREDNS.build()?,
            helm: HELM.build()?,
        })
    }

    /// Returns a program of Kubernetes.
    pub(crate) fn kubernetes(&self, name: &str) -> PathBuf {
        self.kubernetes.join(name)
    }

    /// Returns etcd.
    pub(crate) fn etcd(&self) -> PathBuf {
        // Go names a program after the last part of its path that is no version.
        self.etcd.join("server")
    }

    /// Returns the directory of containerd, its shim and its client.
    pub(crate) fn containerd(&self) -> &Path {
        &self.containerd
    }

    /// Returns the server of names.
    pub(crate) fn coredns(&self) -> PathBuf {
        self.coredns.join("coredns")
    }

    /// Returns helm.
    pub(crate) fn helm(&self) -> PathBuf {
        self.helm.join("helm")
    }
}

impl Module {
    fn build(&self) -> Result<PathBuf> {
        cache::entry(self.entry, |to| {
            if !shell::has("go", "version") {
                bail!("Go is needed to build the programs of a cluster (https://go.dev/dl)");
            }
            println!("building {} (once; this takes minutes)", self.entry);
            let started = Instant::now();
            let source = to.join(".source");
            std::fs::create_dir_all(&source)?;
            std::fs::write(source.join("go.mod"), self.go_mod(&source)?)?;
            shell::run(go(&source).args(self.arguments(to)))?;
            std::fs::remove_dir_all(&source)?;
            println!("built {} in {:.0} s", self.entry, started.elapsed().as_secs_f64());
            Ok(())
        })
    }

    fn arguments(&self, to: &Path) -> Vec<String> {
        let variables = self.variables.iter().map(|(name, value)| format!(" -X {name}={value}"));
        let mut arguments: Vec<String> = ["build", "-mod=mod", "-trimpath"].map(Into::into).into();
        arguments.push(format!("-ldflags=-s -w{}", variables.collect::<String>()));
        arguments.push(format!("-tags={}", self.tags));
        arguments.push(format!("-o={}/", to.display()));
        arguments.extend(self.packages.iter().map(|package| match *package {
            "" => self.path.to_owned(),
            package => format!("{}/{package}", self.path),
        }));
        arguments
    }

    /// Returns the go.mod of a module that needs this one and nothing else.
    fn go_mod(&self, source: &Path) -> Result<String> {
        let Self { path, version, .. } = self;
        let mut text = format!("module cluster\n\ngo 1.26.0\n\nrequire {path} {version}\n");
        let Some(replaced) = self.replaced else { return Ok(text) };
        // `go mod download` looks for a go.mod of its own.
        std::fs::write(source.join("go.mod"), &text)?;
        let module = format!("{path}@{version}");
        let json = shell::output(go(source).args(["mod", "download", "-json", &module]))?;
        let downloaded: serde_json::Value = serde_json::from_str(&json)?;
        let theirs = downloaded["GoMod"].as_str().context("go does not say where go.mod is")?;
        for name in local_replacements(&std::fs::read_to_string(theirs)?) {
            text.push_str(&format!("replace {name} => {name} {replaced}\n"));
        }
        Ok(text)
    }
}

fn go(directory: &Path) -> Command {
    let mut command = Command::new("go");
    command.current_dir(directory).env("GOTOOLCHAIN", "local").env("CGO_ENABLED", "0");
    command
}

/// Returns the modules that a go.mod replaces by directories: `name => ./directory`.
fn local_replacements(go_mod: &str) -> Vec<&str> {
    let lines = go_mod.lines().map(|line| line.trim().trim_start_matches("replace "));
    let replaced = lines.filter_map(|line| line.split_once(" => "));
    replaced.filter(|(_, to)| to.starts_with("./")).map(|(name, _)| name.trim()).collect()
}

#[cfg(test)]
mod tests {
    use super::local_replacements;

    #[test]
    fn reads_what_a_go_mod_replaces_by_directories() {
        let go_mod = "require a v1\n\nreplace b => ./b\n\nreplace (\n\tk8s.io/api => ./staging/api\n\tc => d v1\n)\n";
        assert_eq!(local_replacements(go_mod), ["b", "k8s.io/api"]);
    }
}
