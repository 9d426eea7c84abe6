//! Names, labels and the owner of the objects of a job.

use std::collections::BTreeMap;

use finetune_api::{FineTuneJob, Step};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::Resource;

/// The name of the trainer's container.
pub const CONTAINER: &str = "trainer";
/// The home of the trainer: scratch space that ends with the pod.
pub(super) const WORK_DIRECTORY: &str = "/work";
/// The label that names the FineTuneJob.
pub const JOB_LABEL: &str = "finetune.dev/job";
/// The label that names the step.
pub const STEP_LABEL: &str = "finetune.dev/step";
/// The label all children carry.
pub const MANAGED_BY: (&str, &str) = ("app.kubernetes.io/managed-by", "finetune-operator");
/// The label by which Kueue knows the queue of a workload.
pub const QUEUE_LABEL: &str = "kueue.x-k8s.io/queue-name";
/// The label by which the coscheduling plugin knows the members of a gang.
const GANG_LABEL: &str = "scheduling.x-k8s.io/pod-group";

/// Returns the name of an attempt's Job: at most 11 characters longer than the FineTuneJob's.
pub fn job_name(name: &str, step: Step, number: i32) -> String {
    match step {
        Step::Preflight => format!("{name}-check-{number}"),
        Step::Training => format!("{name}-{number}"),
    }
}

/// Returns the name of what the ranks of a job share, in all its attempts. A Service's name starts with
/// a letter; a job's need not.
pub(super) fn ranks_name(name: &str) -> String {
    format!("ranks-{name}")
}

/// Returns the reference by which objects are deleted with the job. They do not block its deletion:
/// that would need a permission on its finalizers where clusters check it.
pub(super) fn owner(job: &FineTuneJob) -> Option<OwnerReference> {
    let mut owner = job.controller_owner_ref(&())?;
    owner.block_owner_deletion = None;
    Some(owner)
}

pub(super) fn labels(job: &FineTuneJob, name: &str, step: Step) -> BTreeMap<String, String> {
    let template = job.spec.pod_template.as_ref();
    let mut users = template.and_then(|template| template.labels.clone()).unwrap_or_default();
    if step == Step::Preflight {
        // It runs alone: as one more member it would let an incomplete gang start.
        users.remove(GANG_LABEL);
    }
    // Ours last: they are what children are found by.
    users.into_iter().chain(own_labels(name, step)).collect()
}

pub(super) fn own_labels(name: &str, step: Step) -> [(String, String); 4] {
    [
        ("app.kubernetes.io/name", "finetune-trainer"),
        MANAGED_BY,
        (JOB_LABEL, name),
        (STEP_LABEL, step_word(step)),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
}

fn step_word(step: Step) -> &'static str {
    match step {
        Step::Preflight => "preflight",
        Step::Training => "training",
    }
}
