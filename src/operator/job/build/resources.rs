//! What a pod requests, and what it is limited to.

use std::collections::BTreeMap;

use finetune_api::{FineTuneJob, Step};
use finetune_plan::pod::PodSize;
use k8s_openapi::{
    api::core::v1::ResourceRequirements, apimachinery::pkg::api::resource::Quantity,
};

use super::Attempt;
use crate::operator::settings::Settings;

pub(super) fn resources(
    job: &FineTuneJob,
    settings: &Settings,
    attempt: &Attempt<'_>,
) -> ResourceRequirements {
    let PodSize { cpu_millis, memory_bytes, storage_bytes, .. } = attempt.pod_size(settings);
    let mut requests = BTreeMap::from([
        ("cpu".to_owned(), Quantity(format!("{cpu_millis}m"))),
        ("memory".to_owned(), mebibytes(memory_bytes)),
        ("ephemeral-storage".to_owned(), mebibytes(storage_bytes)),
    ]);
    let mut limits = BTreeMap::from([("memory".to_owned(), mebibytes(memory_bytes))]);
    if let Some(cores) = settings.preflight.cpu_limit.filter(|_| attempt.step == Step::Preflight) {
        limits.insert("cpu".to_owned(), Quantity(format!("{}m", (cores * 1000.0) as i64)));
    }
    if let Some(device) = attempt.accelerator().and_then(|one| one.resource_name.clone()) {
        let count = Quantity(attempt.parallelism.local_world_size.to_string());
        requests.insert(device.clone(), count.clone());
        limits.insert(device, count);
    }
    if attempt.step == Step::Training
        && let Some(users) = &job.spec.resources
    {
        let quantity = |(name, value): (&String, &String)| (name.clone(), Quantity(value.clone()));
        // A limit alone is a request too: a request above it would be refused.
        requests.extend(users.limits.iter().flatten().map(quantity));
        requests.extend(users.requests.iter().flatten().map(quantity));
        limits.extend(users.limits.iter().flatten().map(quantity));
    }
    ResourceRequirements { requests: Some(requests), limits: Some(limits), claims: None }
}

/// Returns the memory limit of a training pod of `size`, in bytes: the user's limit,
/// if there is one that can be read.
pub fn memory_limit(job: &FineTuneJob, size: &PodSize) -> u64 {
    job.spec.memory_limit().unwrap_or(size.memory_bytes)
}

pub(super) fn mebibytes(bytes: u64) -> Quantity {
    Quantity(format!("{}Mi", bytes.div_ceil(1 << 20)))
}
