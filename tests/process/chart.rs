//! The Helm chart: what it renders is what Kubernetes and the operator read, and no more rights
//! than the operator uses.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use finetune_operator::operator::settings::Settings;
use k8s_openapi::{
    api::{
        apps::v1::Deployment,
        core::v1::{ConfigMap, Service, ServiceAccount},
        networking::v1::NetworkPolicy,
        policy::v1::PodDisruptionBudget,
        rbac::v1::{
            ClusterRole, ClusterRoleBinding, PolicyRule, Role, RoleBinding, RoleRef, Subject,
        },
    },
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::needs;

const CHART: &str = "charts/finetune-operator";
const RELEASE_NAMESPACE: &str = "finetune-system";
/// Kinds of the Prometheus operator, whose types are not Kubernetes' own.
const FOREIGN_GROUP: &str = "monitoring.coreos.com/";

/// What the operator asks of the apiserver where jobs are: verb, group, resource. The apiserver's
/// version, which it reads first, is everybody's to read.
const USES: [(&str, &str, &str); 17] = [
    // `Operator::watch` of FineTuneJobs.
    ("list", "finetune.dev", "finetunejobs"),
    ("watch", "finetune.dev", "finetunejobs"),
    // `Action::DeleteSelf`: ttlSecondsAfterFinished has passed.
    ("delete", "finetune.dev", "finetunejobs"),
    // `reconcile::write_status` replaces the status.
    ("update", "finetune.dev", "finetunejobs/status"),
    // `Action::CreateJob`, and whose it is if the name was taken.
    ("create", "batch", "jobs"),
    ("get", "batch", "jobs"),
    // `Operator::watch` of Jobs.
    ("list", "batch", "jobs"),
    ("watch", "batch", "jobs"),
    // `Action::DeleteJob`.
    ("delete", "batch", "jobs"),
    // `Operator::watch` of pods, and `late_pods::read`.
    ("list", "", "pods"),
    ("watch", "", "pods"),
    // `Action::DeletePod`: a pod without a Job, or a rank that waits for a lost one.
    ("delete", "", "pods"),
    // `Action::CreateService`, and whose it is if the name was taken.
    ("create", "", "services"),
    ("get", "", "services"),
    // `pod_refusals::newest`: why a Job's pods are refused.
    ("list", "", "events"),
    // `events::emit`: kube's Recorder creates an event, and patches it when it is repeated.
    ("create", "events.k8s.io", "events"),
    ("patch", "events.k8s.io", "events"),
];

/// What it asks besides where trainers are confined: `Action::CreateNetworkPolicy`.
const CONFINED_USES: [(&str, &str, &str); 2] = [
    ("create", "networking.k8s.io", "networkpolicies"),
    ("get", "networking.k8s.io", "networkpolicies"),
];

/// What it asks in its own namespace.
const LEASE_USES: [(&str, &str, &str); 3] = [
    // `Candidate::try_hold` and `release`.
    ("get", "coordination.k8s.io", "leases"),
    ("create", "coordination.k8s.io", "leases"),
    ("update", "coordination.k8s.io", "leases"),
];

/// Helm, with the chart in the directory it runs in.
struct Helm(PathBuf);

impl Helm {
    fn find() -> Option<Self> {
        needs::program("chart", "FINETUNE_TEST_HELM", None).map(Self)
    }

    fn run(&self, arguments: &[&str], values: &Path) -> Output {
        let mut command = Command::new(&self.0);
        command.current_dir(env!("CARGO_MANIFEST_DIR")).args(arguments);
        command.arg("--values").arg(values).output().unwrap()
    }

    fn template(&self, values: &Path) -> Output {
        let template = ["template", "finetune-operator", CHART, "--namespace", RELEASE_NAMESPACE];
        self.run(&[&template[..], &["--kube-version", "1.34.0"]].concat(), values)
    }

    fn render(&self, name: &str) -> Rendered {
        let output = self.template(&directory("").join(format!("{name}.values.yaml")));
        assert!(output.status.success(), "{name}: {}", text(&output.stderr));
        let documents: Vec<Value> = serde_saphyr::from_multiple(&text(&output.stdout)).unwrap();
        Rendered(documents.into_iter().filter(|document| !document.is_null()).collect())
    }
}

/// What one file of values becomes.
struct Rendered(Vec<Value>);

impl Rendered {
    fn all<T: DeserializeOwned>(&self, kind: &str) -> Vec<T> {
        let of_kind = self.0.iter().filter(|object| object["kind"] == kind);
        of_kind.map(|object| serde_json::from_value(object.clone()).unwrap()).collect()
    }

    fn deployment(&self) -> Deployment {
        self.all("Deployment").remove(0)
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn directory(below: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/chart").join(below)
}

/// Lists the files of values in a directory.
fn values(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<PathBuf> =
        entries.filter(|path| path.to_string_lossy().ends_with(".values.yaml")).collect();
    files.sort();
    assert!(!files.is_empty(), "{} has no values", directory.display());
    files
}

/// Lists what the chart is rendered with, by name.
fn names() -> Vec<String> {
    let name = |path: &PathBuf| path.file_name().unwrap().to_string_lossy().into_owned();
    values(&directory("")).iter().map(name).map(|name| name.replace(".values.yaml", "")).collect()
}

#[test]
fn passes_helms_own_checks() {
    let Some(helm) = Helm::find() else { return };
    for values in values(&directory("")) {
        let output = helm.run(&["lint", "--strict", CHART, "--kube-version", "1.34.0"], &values);
        assert!(output.status.success(), "{}: {}", values.display(), text(&output.stdout));
    }
}

#[test]
fn renders_what_kubernetes_reads() {
    let Some(helm) = Helm::find() else { return };
    for name in names() {
        for object in helm.render(&name).0 {
            if let Err(fault) = decode(&object) {
                panic!("{name}: {} {}: {fault}", object["kind"], object["metadata"]["name"]);
            }
        }
    }
}

/// Reads an object as its kind; fails for a field that kind does not have.
fn decode(object: &Value) -> Result<(), String> {
    let version = object["apiVersion"].as_str().ok_or("has no apiVersion")?;
    match (version, object["kind"].as_str().ok_or("has no kind")?) {
        ("v1", "ConfigMap") => read::<ConfigMap>(object),
        ("v1", "Service") => read::<Service>(object),
        ("v1", "ServiceAccount") => read::<ServiceAccount>(object),
        ("apps/v1", "Deployment") => read::<Deployment>(object),
        ("policy/v1", "PodDisruptionBudget") => read::<PodDisruptionBudget>(object),
        ("networking.k8s.io/v1", "NetworkPolicy") => read::<NetworkPolicy>(object),
        ("rbac.authorization.k8s.io/v1", "Role") => read::<Role>(object),
        ("rbac.authorization.k8s.io/v1", "RoleBinding") => read::<RoleBinding>(object),
        ("rbac.authorization.k8s.io/v1", "ClusterRole") => read::<ClusterRole>(object),
        ("rbac.authorization.k8s.io/v1", "ClusterRoleBinding") => {
            read::<ClusterRoleBinding>(object)
        }
        ("apiextensions.k8s.io/v1", "CustomResourceDefinition") => {
            read::<CustomResourceDefinition>(object)
        }
        (version, _) if version.starts_with(FOREIGN_GROUP) => Ok(()),
        (version, kind) => Err(format!("nobody said how {kind} of {version} is read")),
    }
}

fn read<T: DeserializeOwned + Serialize>(object: &Value) -> Result<(), String> {
    let typed: T = serde_json::from_value(object.clone()).map_err(|error| error.to_string())?;
    // The types ignore what they do not know: it is missing when they are written again.
    lost("", object, &serde_json::to_value(typed).unwrap()).map_or(Ok(()), Err)
}

/// Finds what `read` lacks of `written`.
fn lost(path: &str, written: &Value, read: &Value) -> Option<String> {
    match (written, read) {
        (Value::Object(written), Value::Object(read)) => written.iter().find_map(|(key, value)| {
            let read = read.get(key).unwrap_or(&Value::Null);
            lost(&format!("{path}.{key}"), value, read)
        }),
        (Value::Array(written), Value::Array(read)) if written.len() == read.len() => {
            let pairs = written.iter().zip(read).enumerate();
            pairs
                .into_iter()
                .find_map(|(n, (written, read))| lost(&format!("{path}[{n}]"), written, read))
        }
        (written, Value::Null) if is_empty(written) => None,
        (Value::Number(written), Value::Number(read)) => (written.as_f64() != read.as_f64())
            .then(|| format!("{path} is {written}, read as {read}")),
        (written, read) => {
            (written != read).then(|| format!("{path} is {written}, read as {read}"))
        }
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::Bool(_) | Value::Number(_) | Value::String(_) => false,
    }
}

#[test]
fn a_field_that_a_kind_does_not_have_is_found() {
    let object = serde_json::json!({"apiVersion": "v1", "kind": "Service", "spec": {"port": 1}});
    assert_eq!(decode(&object), Err(".spec.port is 1, read as null".to_owned()));
}

#[test]
fn refuses_wrong_values_and_says_which() {
    let Some(helm) = Helm::find() else { return };
    for values in values(&directory("refused")) {
        let file = values.display();
        let content = std::fs::read_to_string(&values).unwrap();
        let expected = content.lines().next().and_then(|line| line.strip_prefix("# expected: "));
        let expected = expected.unwrap_or_else(|| panic!("{file} does not say what is expected"));
        let output = helm.template(&values);
        assert!(!output.status.success(), "{file} is accepted");
        let message = text(&output.stderr);
        assert!(message.contains(expected), "{file}: {expected:?} is not in {message}");
    }
}

#[test]
fn renders_settings_that_the_operator_accepts() {
    let Some(helm) = Helm::find() else { return };
    for name in names() {
        let rendered = helm.render(&name);
        let pod = rendered.deployment().spec.unwrap().template.spec.unwrap();
        let mounted = pod.volumes.unwrap()[0].config_map.as_ref().unwrap().name.clone();
        let maps = rendered.all::<ConfigMap>("ConfigMap");
        let map =
            maps.into_iter().find(|map| map.metadata.name.as_ref() == Some(&mounted)).unwrap();
        let written = &map.data.unwrap()["settings.yaml"];
        let settings = Settings::parse(written).unwrap_or_else(|error| panic!("{name}: {error}"));
        if name == "everything" {
            let is_kept = settings.namespaces == ["team-a"]
                && settings.confined_namespaces == ["team-a"]
                && settings.disruptions == 100
                && settings.image_pull_secrets == ["trainer-pull"]
                && settings.preflight.memory_gi_b.to_bits() == 4.0_f64.to_bits();
            assert!(is_kept, "values are lost on their way: {settings:?}");
        }
    }
}

/// The level's rules for what a Deployment of Linux can have:
/// <https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted>
#[test]
fn the_operators_pod_satisfies_the_level_restricted() {
    let Some(helm) = Helm::find() else { return };
    for name in names() {
        let pod = helm.render(&name).deployment().spec.unwrap().template.spec.unwrap();
        for is_shared in [pod.host_network, pod.host_pid, pod.host_ipc] {
            assert!(!is_shared.unwrap_or(false), "{name}: a namespace of the host");
        }
        for volume in pod.volumes.unwrap_or_default() {
            let allowed = volume.config_map.is_some()
                || volume.empty_dir.is_some()
                || volume.secret.is_some()
                || volume.projected.is_some();
            assert!(allowed, "{name}: the volume {:?} is of a forbidden kind", volume.name);
        }
        let of_pod = pod.security_context.unwrap();
        assert_eq!(of_pod.run_as_non_root, Some(true), "{name}");
        assert!(of_pod.run_as_user != Some(0), "{name}");
        assert_eq!(of_pod.seccomp_profile.unwrap().type_, "RuntimeDefault", "{name}");
        assert!(of_pod.sysctls.is_none(), "{name}");
        let containers = pod.init_containers.unwrap_or_default().into_iter().chain(pod.containers);
        for container in containers {
            let of_container = container.security_context.unwrap();
            assert_eq!(of_container.allow_privilege_escalation, Some(false), "{name}");
            assert!(of_container.privileged != Some(true), "{name}");
            assert!(of_container.run_as_non_root != Some(false), "{name}");
            assert!(of_container.run_as_user != Some(0), "{name}");
            assert!(of_container.seccomp_profile.is_none(), "{name}: the pod's is replaced");
            assert!(of_container.proc_mount.is_none(), "{name}");
            let capabilities = of_container.capabilities.unwrap();
            assert_eq!(capabilities.drop.unwrap(), ["ALL"], "{name}");
            assert!(capabilities.add.unwrap_or_default().is_empty(), "{name}");
            assert!(container.ports.unwrap().iter().all(|port| port.host_port.is_none()), "{name}");
            // More than the level asks for.
            assert_eq!(of_container.read_only_root_filesystem, Some(true), "{name}");
        }
    }
}

/// A right: verb, group, resource.
type Right = (String, String, String);

fn rights(uses: &[(&str, &str, &str)]) -> BTreeSet<Right> {
    let own = |(verb, group, resource): &(&str, &str, &str)| {
        ((*verb).to_owned(), (*group).to_owned(), (*resource).to_owned())
    };
    uses.iter().map(own).collect()
}

fn granted(rules: Vec<PolicyRule>) -> BTreeSet<Right> {
    let mut granted = BTreeSet::new();
    for rule in rules {
        assert!(rule.non_resource_urls.is_none(), "{rule:?}");
        for group in rule.api_groups.iter().flatten() {
            for resource in rule.resources.iter().flatten() {
                for verb in &rule.verbs {
                    granted.insert((verb.clone(), group.clone(), resource.clone()));
                }
            }
        }
    }
    granted
}

/// The namespace of rights (none: everywhere) and the rights that the operator's account has.
fn bound(rendered: &Rendered) -> Vec<(Option<String>, BTreeSet<Right>)> {
    let account = rendered.deployment().spec.unwrap().template.spec.unwrap().service_account_name;
    let is_ours = |subjects: &Option<Vec<Subject>>, role: &RoleRef, kind: &str| {
        assert_eq!(role.kind, kind);
        subjects.iter().flatten().any(|subject| {
            subject.kind == "ServiceAccount"
                && Some(&subject.name) == account.as_ref()
                && subject.namespace.as_deref() == Some(RELEASE_NAMESPACE)
        })
    };
    let mut bound = Vec::new();
    let roles: Vec<Role> = rendered.all("Role");
    for binding in rendered.all::<RoleBinding>("RoleBinding") {
        assert!(is_ours(&binding.subjects, &binding.role_ref, "Role"), "{binding:?}");
        let role = roles.iter().find(|role| {
            role.metadata.name.as_ref() == Some(&binding.role_ref.name)
                && role.metadata.namespace == binding.metadata.namespace
        });
        let rules = role.unwrap().rules.clone().unwrap();
        bound.push((binding.metadata.namespace, granted(rules)));
    }
    let roles: Vec<ClusterRole> = rendered.all("ClusterRole");
    for binding in rendered.all::<ClusterRoleBinding>("ClusterRoleBinding") {
        assert!(is_ours(&binding.subjects, &binding.role_ref, "ClusterRole"), "{binding:?}");
        let name = Some(&binding.role_ref.name);
        let role = roles.iter().find(|role| role.metadata.name.as_ref() == name).unwrap();
        bound.push((None, granted(role.rules.clone().unwrap())));
    }
    bound
}

#[test]
fn grants_what_the_operator_uses_and_no_more() {
    let Some(helm) = Helm::find() else { return };
    let leases = (Some(RELEASE_NAMESPACE.to_owned()), rights(&LEASE_USES));
    for (name, namespaces, is_confined) in
        [("minimal", vec![None], false), ("namespaced", vec![Some("team-a"), Some("team-b")], true)]
    {
        let confined = if is_confined { rights(&CONFINED_USES) } else { BTreeSet::new() };
        let uses: BTreeSet<Right> = rights(&USES).union(&confined).cloned().collect();
        let mut expected: Vec<_> = namespaces
            .into_iter()
            .map(|namespace| (namespace.map(str::to_owned), uses.clone()))
            .collect();
        expected.push(leases.clone());
        expected.sort();
        let mut bound = bound(&helm.render(name));
        bound.sort();
        assert_eq!(bound, expected, "{name}");
    }
}

#[test]
fn the_lease_is_one_by_name() {
    let Some(helm) = Helm::find() else { return };
    let roles: Vec<Role> = helm.render("minimal").all("Role");
    let rules = roles.into_iter().flat_map(|role| role.rules.unwrap());
    for rule in rules.filter(|rule| rule.verbs != ["create"]) {
        assert_eq!(
            rule.resource_names.unwrap(),
            [finetune_operator::operator::runtime::leader::LEASE]
        );
    }
}

#[test]
fn no_role_reads_secrets_or_configmaps() {
    let Some(helm) = Helm::find() else { return };
    for name in names() {
        let rendered = helm.render(&name);
        let roles = rendered.all::<Role>("Role").into_iter().map(|role| role.rules);
        let cluster_roles = rendered.all::<ClusterRole>("ClusterRole");
        let rules = roles.chain(cluster_roles.into_iter().map(|role| role.rules)).flatten();
        for (verb, _, resource) in rules.flat_map(granted) {
            let is_narrow = !["secrets", "configmaps", "*"].contains(&resource.as_str());
            assert!(is_narrow && verb != "*", "{name}: {verb} {resource}");
        }
    }
}

#[test]
fn a_kept_crd_outlives_the_release() {
    let Some(helm) = Helm::find() else { return };
    let policy = |name: &str| {
        let crds: Vec<CustomResourceDefinition> = helm.render(name).all("CustomResourceDefinition");
        let annotations = crds.into_iter().next()?.metadata.annotations;
        annotations?.get("helm.sh/resource-policy").cloned()
    };
    assert_eq!(policy("minimal").as_deref(), Some("keep"));
    assert_eq!(policy("crd-not-kept"), None);
}
