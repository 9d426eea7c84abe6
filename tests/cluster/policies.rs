//! NetworkPolicies by their meaning: the test cluster's network enforces none, so what the chart
//! renders is evaluated, on what a run is seen to do and on what it must not be able to do.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr},
};

use finetune_operator::operator::job::build;
use k8s_openapi::{
    api::{
        core::v1::Pod,
        networking::v1::{
            IPBlock, NetworkPolicy, NetworkPolicyPeer, NetworkPolicyPort, NetworkPolicySpec,
        },
    },
    apimachinery::pkg::{apis::meta::v1::LabelSelector, util::intstr::IntOrString},
};
use kube::{Api, ResourceExt, api::ListParams};
use serde_json::json;

use crate::{
    helm,
    sockets::{Flow, Watcher},
    test_namespace::TestNamespace,
};

const OPERATORS_NAMESPACE: &str = "finetune-system";
const NODE: &str = "10.88.0.1";
const PODS: &str = "10.88.0.0/24";

/// One end of a connection: an address, and the pod that has it, if one does.
#[derive(Debug, Clone)]
pub struct End {
    pub address: IpAddr,
    pod: Option<(String, std::collections::BTreeMap<String, String>)>,
}

impl End {
    fn at(address: &str) -> Self {
        Self { address: address.parse().unwrap(), pod: None }
    }

    fn pod(namespace: &str, address: &str, labels: &[(&str, &str)]) -> Self {
        let labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        Self { pod: Some((namespace.to_owned(), labels.collect())), ..Self::at(address) }
    }

    pub fn of(pod: &Pod) -> Option<Self> {
        let address = pod.status.as_ref()?.pod_ip.as_ref()?.parse().ok()?;
        let labels = pod.metadata.labels.clone().unwrap_or_default();
        Some(Self { address, pod: Some((pod.namespace()?, labels)) })
    }

    fn role(&self) -> &str {
        match &self.pod {
            Some((_, labels)) => labels.get("app.kubernetes.io/name").map_or("pod", String::as_str),
            None if self.address.to_string() == NODE => "node",
            None => "elsewhere",
        }
    }
}

/// Returns whether policies let a connection through, as the API says they mean.
///
/// Source: <https://kubernetes.io/docs/concepts/services-networking/network-policies/>
pub fn is_allowed(
    policies: &[NetworkPolicy],
    from: &End,
    to: &End,
    protocol: &str,
    port: u16,
) -> bool {
    leaves(policies, from, to, protocol, port) && enters(policies, from, to, protocol, port)
}

fn leaves(policies: &[NetworkPolicy], from: &End, to: &End, protocol: &str, port: u16) -> bool {
    let specs = selecting(policies, from, "Egress");
    specs.is_empty()
        || specs.iter().any(|(namespace, spec)| {
            spec.egress.iter().flatten().any(|rule| {
                has_port(rule.ports.as_deref(), protocol, port)
                    && has_peer(rule.to.as_deref(), namespace, to)
            })
        })
}

fn enters(policies: &[NetworkPolicy], from: &End, to: &End, protocol: &str, port: u16) -> bool {
    let specs = selecting(policies, to, "Ingress");
    // A pod's own node reaches it always: its kubelet probes.
    specs.is_empty()
        || from.address.to_string() == NODE
        || specs.iter().any(|(namespace, spec)| {
            spec.ingress.iter().flatten().any(|rule| {
                has_port(rule.ports.as_deref(), protocol, port)
                    && has_peer(rule.from.as_deref(), namespace, from)
            })
        })
}

/// Lists the policies of one direction that select a pod.
fn selecting<'a>(
    policies: &'a [NetworkPolicy],
    end: &End,
    direction: &str,
) -> Vec<(String, &'a NetworkPolicySpec)> {
    let Some((namespace, labels)) = &end.pod else { return Vec::new() };
    policies
        .iter()
        .filter(|policy| policy.namespace().as_ref() == Some(namespace))
        .filter_map(|policy| Some((namespace.clone(), policy.spec.as_ref()?)))
        .filter(|(_, spec)| spec.policy_types.iter().flatten().any(|kind| kind == direction))
        .filter(|(_, spec)| spec.pod_selector.as_ref().is_none_or(|pods| selects(pods, labels)))
        .collect()
}

fn selects(selector: &LabelSelector, labels: &std::collections::BTreeMap<String, String>) -> bool {
    assert!(selector.match_expressions.is_none(), "nothing here reads expressions");
    selector.match_labels.iter().flatten().all(|(key, value)| labels.get(key) == Some(value))
}

fn has_port(ports: Option<&[NetworkPolicyPort]>, protocol: &str, port: u16) -> bool {
    let Some(ports) = ports.filter(|ports| !ports.is_empty()) else { return true };
    ports.iter().any(|allowed| {
        assert!(allowed.end_port.is_none(), "nothing here reads ranges of ports");
        let is_number = match &allowed.port {
            None => true,
            Some(IntOrString::Int(number)) => *number == i32::from(port),
            Some(IntOrString::String(name)) => panic!("nothing here reads the port's name {name}"),
        };
        is_number && allowed.protocol.as_deref().unwrap_or("TCP") == protocol
    })
}

fn has_peer(peers: Option<&[NetworkPolicyPeer]>, namespace: &str, end: &End) -> bool {
    let Some(peers) = peers.filter(|peers| !peers.is_empty()) else { return true };
    peers.iter().any(|peer| {
        if let Some(block) = &peer.ip_block {
            return holds(block, end.address);
        }
        let Some((own, labels)) = &end.pod else { return false };
        // A namespace's name is a label of it; the test's namespaces are selected by no other.
        let of_namespace =
            [("kubernetes.io/metadata.name".to_owned(), own.clone())].into_iter().collect();
        let is_namespace = match &peer.namespace_selector {
            Some(selector) => selects(selector, &of_namespace),
            None => own == namespace,
        };
        is_namespace && peer.pod_selector.as_ref().is_none_or(|pods| selects(pods, labels))
    })
}

fn holds(block: &IPBlock, address: IpAddr) -> bool {
    is_within(&block.cidr, address)
        && !block.except.iter().flatten().any(|cidr| is_within(cidr, address))
}

fn is_within(cidr: &str, address: IpAddr) -> bool {
    let (network, bits) = cidr.split_once('/').unwrap();
    let bits: u32 = bits.parse().unwrap();
    match (network.parse().unwrap(), address) {
        (IpAddr::V4(network), IpAddr::V4(address)) => {
            let mask = u32::MAX.checked_shl(32 - bits).unwrap_or(0);
            network.to_bits() & mask == address.to_bits() & mask
        }
        (IpAddr::V6(network), IpAddr::V6(address)) => {
            let mask = u128::MAX.checked_shl(128 - bits).unwrap_or(0);
            network.to_bits() & mask == address.to_bits() & mask
        }
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => false,
    }
}

/// Renders the chart's policies for the trainers of a namespace.
fn policies(namespace: &str, more: &[&str]) -> Vec<NetworkPolicy> {
    let namespaces = format!("networkPolicies.trainers.namespaces={{{namespace}}}");
    let arguments = [&["--set", namespaces.as_str()], more].concat();
    let objects = helm::template(&arguments);
    let of_kind = objects.into_iter().filter(|object| object["kind"] == "NetworkPolicy");
    of_kind.map(|object| serde_json::from_value(object).unwrap()).collect()
}

/// The strict one: the bucket, the apiserver and who scrapes are named by the administrator.
pub fn strict(namespace: &str) -> Vec<NetworkPolicy> {
    let bucket = json!([{"cidr": "10.88.0.1/32", "ports": [8333]}]);
    let scraper = json!([{
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}},
    }]);
    policies(
        namespace,
        &[
            "--set-json",
            &format!("networkPolicies.trainers.allowedEgress={bucket}"),
            "--set-json",
            &format!("networkPolicies.trainers.metricsFrom={scraper}"),
            "--set-json",
            &format!("networkPolicies.operator.metricsFrom={scraper}"),
            "--set-json",
            r#"networkPolicies.operator.apiServer.cidrs=["10.88.0.1/32"]"#,
        ],
    )
}

async fn pods(test: &TestNamespace) -> Vec<End> {
    let operators: Api<Pod> = Api::namespaced(test.client.clone(), OPERATORS_NAMESPACE);
    let of_operator = operators.list(&ListParams::default()).await.unwrap().items;
    let of_job = test.pods.list(&ListParams::default()).await.unwrap().items;
    of_operator.iter().chain(&of_job).filter_map(End::of).collect()
}

#[tokio::test]
async fn what_a_run_is_seen_to_do_is_what_policies_allow() {
    let Some(test) = TestNamespace::new("policies").await else { return };
    let watcher = Watcher::start();
    let mut ends = pods(&test).await;
    test.apply(&test.long_job("watched")).await;
    test.wait_for_training("watched").await;
    ends.extend(pods(&test).await);
    test.wait("watched", "True Succeeded").await;
    ends.extend(pods(&test).await);
    let find = |address: IpAddr| {
        let pod = ends.iter().find(|end| end.address == address);
        pod.cloned().unwrap_or(End { address, pod: None })
    };

    let mut seen = BTreeSet::new();
    let (default, strict) = (policies(&test.namespace, &[]), strict(&test.namespace));
    assert_eq!((default.len(), strict.len()), (2, 2), "one of the operator, one of trainers");
    for Flow { protocol, from, to, port } in watcher.stop() {
        let [from, to] = [from, to].map(find);
        // Pods of other tests are on the same node, and the same operator serves them.
        let is_other = |end: &End| end.role() == "elsewhere" && is_within(PODS, end.address);
        if is_other(&from) || is_other(&to) || (from.pod.is_none() && to.pod.is_none()) {
            continue;
        }
        let words = format!("{} → {} {protocol} {port}", from.role(), to.role());
        for policies in [&default, &strict] {
            assert!(is_allowed(policies, &from, &to, protocol, port), "closed: {words}");
        }
        seen.insert(words);
    }
    eprintln!("seen: {seen:#?}");
    let expected = [
        "finetune-operator → finetune-trainer TCP 9464",
        "finetune-operator → node TCP 6443",
        "finetune-trainer → node TCP 8333",
        // The node's server of names; of most clusters it is 53.
        "finetune-trainer → node UDP 5353",
        "node → finetune-operator TCP 8080",
    ];
    for words in expected {
        assert!(seen.remove(words), "not seen: {words}; {seen:?}");
    }
    // A Prometheus of another test is on the node, and a name may be asked for by TCP.
    let possible = ["node → finetune-trainer TCP 9464", "finetune-trainer → node TCP 5353"];
    seen.retain(|words| !possible.contains(&words.as_str()));
    assert!(seen.is_empty(), "connections that nobody has thought of: {seen:?}");
}

#[test]
fn what_nobody_has_asked_for_is_closed() {
    if !crate::test_namespace::is_there() {
        return;
    }
    let trainer_labels = [
        ("app.kubernetes.io/name", "finetune-trainer"),
        ("app.kubernetes.io/managed-by", "finetune-operator"),
    ];
    let trainer = End::pod("team", "10.88.0.20", &trainer_labels);
    let neighbour = End::pod("team", "10.88.0.21", &trainer_labels);
    let foreign = End::pod("team", "10.88.0.22", &[("app", "web")]);
    let instance = [
        ("app.kubernetes.io/name", "finetune-operator"),
        ("app.kubernetes.io/instance", "finetune"),
        ("app.kubernetes.io/component", "operator"),
    ];
    let operator = End::pod(OPERATORS_NAMESPACE, "10.88.0.30", &instance);
    let scraper = End::pod("monitoring", "10.88.0.40", &[]);
    let [apiserver, service, bucket, metadata, internet] =
        [NODE, "10.96.0.1", NODE, "169.254.169.254", "203.0.113.7"].map(End::at);
    let strict = strict("team");
    let check = |policies: &[NetworkPolicy], from: &End, to: &End, port: u16, expected: bool| {
        let allowed = is_allowed(policies, from, to, "TCP", port);
        assert_eq!(allowed, expected, "{from:?} → {to:?} {port}");
    };
    for (from, to, port, expected) in [
        // A trainer: its bucket and names, nothing else.
        (&trainer, &bucket, 8333, true),
        (&trainer, &apiserver, 53, true),
        (&trainer, &apiserver, 6443, false),
        (&trainer, &service, 443, false),
        (&trainer, &neighbour, 9464, false),
        (&trainer, &foreign, 80, false),
        (&trainer, &operator, 8080, false),
        (&trainer, &metadata, 80, false),
        (&trainer, &internet, 443, false),
        // To a trainer: progress and metrics, of those who are named.
        (&operator, &trainer, 9464, true),
        (&scraper, &trainer, 9464, true),
        (&foreign, &trainer, 9464, false),
        (&operator, &trainer, 22, false),
        // The operator: scrapes and probes in, apiserver and trainers out.
        (&scraper, &operator, 8080, true),
        (&foreign, &operator, 8080, false),
        (&scraper, &operator, 9999, false),
        (&operator, &apiserver, 6443, true),
        (&operator, &bucket, 8333, false),
        (&operator, &internet, 443, false),
        (&operator, &foreign, 9464, false),
    ] {
        check(&strict, from, to, port, expected);
    }
    // Without a list, all is open but what clouds tell a node, and what is blocked by hand.
    let default = policies("team", &[]);
    check(&default, &trainer, &metadata, 80, false);
    check(&default, &trainer, &internet, 443, true);
    check(&default, &trainer, &apiserver, 6443, true);
    check(&default, &foreign, &trainer, 9464, false);
    let blocked = policies(
        "team",
        &[
            "--set-json",
            r#"networkPolicies.trainers.blockedEgress=["10.88.0.0/24","10.96.0.0/16"]"#,
        ],
    );
    for to in [&apiserver, &service, &neighbour, &operator, &metadata] {
        check(&blocked, &trainer, to, 443, false);
    }
    check(&blocked, &trainer, &internet, 443, true);
    check(&blocked, &trainer, &apiserver, 53, true);
}

#[test]
fn ranks_of_one_run_reach_each_other_and_nobody_else_reaches_them() {
    if !crate::test_namespace::is_there() {
        return;
    }
    let rank = |namespace: &str, address: &str, job: &str, step: &str| {
        let labels = [
            ("app.kubernetes.io/name", "finetune-trainer"),
            ("app.kubernetes.io/managed-by", "finetune-operator"),
            ("finetune.dev/job", job),
            ("finetune.dev/step", step),
        ];
        End::pod(namespace, address, &labels)
    };
    let of_run = |name: &str| {
        let job = json!({
            "apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob",
            "metadata": {"name": name, "namespace": "team", "uid": "u"},
            "spec": {
                "model": {"uri": "s3://b/m"}, "dataset": {"train": "s3://b/t.jsonl"},
                "output": {"uri": "s3://b/o"},
            },
        });
        build::ranks::policy(&serde_json::from_value(job).unwrap())
    };
    let first = rank("team", "10.88.0.20", "a", "training");
    let second = rank("team", "10.88.0.21", "a", "training");
    let other = rank("team", "10.88.0.22", "b", "training");
    let preflight = rank("team", "10.88.0.23", "a", "preflight");
    let namesake = rank("elsewhere", "10.88.0.24", "a", "training");
    let foreign = End::pod("team", "10.88.0.25", &[("finetune.dev/job", "a")]);
    let blocked = r#"networkPolicies.trainers.blockedEgress=["10.88.0.0/16"]"#;
    for mut policies in [strict("team"), policies("team", &["--set-json", blocked])] {
        policies.extend([of_run("a"), of_run("b")]);
        for (from, to, expected) in [
            (&first, &second, true),
            (&second, &first, true),
            (&other, &first, false),
            (&first, &other, false),
            (&preflight, &first, false),
            (&first, &preflight, false),
            (&namesake, &first, false),
            (&first, &namesake, false),
            (&foreign, &first, false),
            (&first, &foreign, false),
        ] {
            for port in [29500, 41234] {
                let is_open = is_allowed(&policies, from, to, "TCP", port);
                assert_eq!(is_open, expected, "{from:?} → {to:?} {port}");
            }
        }
    }
}

#[test]
fn an_address_is_within_a_network_by_its_first_bits() {
    let address = IpAddr::V4(Ipv4Addr::new(10, 88, 1, 2));
    for (cidr, expected) in
        [("10.88.0.0/16", true), ("10.88.0.0/24", false), ("0.0.0.0/0", true), ("::/0", false)]
    {
        assert_eq!(is_within(cidr, address), expected, "{cidr}");
    }
}
