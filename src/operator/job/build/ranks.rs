//! What the ranks of a job share, in all its attempts: names that can be resolved, and a way to each
//! other.

use std::collections::BTreeMap;

use finetune_api::{FineTuneJob, Step};
use k8s_openapi::{
    api::{
        core::v1::{Service, ServiceSpec},
        networking::v1::{
            NetworkPolicy, NetworkPolicyIngressRule, NetworkPolicyPeer, NetworkPolicySpec,
        },
    },
    apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta},
};

use super::names::{own_labels, owner, ranks_name};

/// Builds the headless Service that gives the pods of a job's ranks names that can be resolved.
pub fn service(job: &FineTuneJob) -> Service {
    Service {
        spec: Some(ServiceSpec {
            cluster_ip: Some("None".to_owned()),
            // Ranks meet before any is ready.
            publish_not_ready_addresses: Some(true),
            selector: Some(selector(job)),
            ..ServiceSpec::default()
        }),
        metadata: metadata(job),
        status: None,
    }
}

/// Builds the policy that lets the ranks of a job reach each other on ports they choose, and nobody
/// else, where a policy of the namespace closes all ports of trainers but that of their progress.
pub fn policy(job: &FineTuneJob) -> NetworkPolicy {
    let ranks = || LabelSelector { match_labels: Some(selector(job)), match_expressions: None };
    let peer = NetworkPolicyPeer { pod_selector: Some(ranks()), ..NetworkPolicyPeer::default() };
    NetworkPolicy {
        metadata: metadata(job),
        spec: Some(NetworkPolicySpec {
            pod_selector: Some(ranks()),
            policy_types: Some(vec!["Ingress".to_owned()]),
            ingress: Some(vec![NetworkPolicyIngressRule { from: Some(vec![peer]), ports: None }]),
            egress: None,
        }),
    }
}

fn metadata(job: &FineTuneJob) -> ObjectMeta {
    let name = job.metadata.name.clone().unwrap_or_default();
    ObjectMeta {
        name: Some(ranks_name(&name)),
        namespace: job.metadata.namespace.clone(),
        labels: Some(selector(job)),
        owner_references: Some(owner(job).into_iter().collect()),
        ..ObjectMeta::default()
    }
}

fn selector(job: &FineTuneJob) -> BTreeMap<String, String> {
    let name = job.metadata.name.clone().unwrap_or_default();
    own_labels(&name, Step::Training).into_iter().collect()
}
