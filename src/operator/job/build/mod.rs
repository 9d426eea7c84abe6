//! The objects of one attempt: a Job with one pod, or with one for each rank, which find each other
//! through a headless Service. Pure and infallible.
//!
//! The trainer's configuration travels as an annotation of the pod and reaches it as a file: one
//! object to create, which cannot disagree with itself.

pub mod digest;
mod env;
pub mod names;
mod pod;
pub mod ranks;
mod resources;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use finetune_api::{FineTuneJob, GIB, Step};
use finetune_contract::Parallelism;
use finetune_plan::{accelerators::Accelerator, pod::PodSize};
use k8s_openapi::{
    api::batch::v1::{Job, JobSpec},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};

use crate::operator::settings::Settings;
use names::{QUEUE_LABEL, job_name, labels, owner};
use pod::pod_template;

pub use resources::memory_limit;

/// The annotation of a Job by which Volcano knows how many of its pods start together or not at all.
const GANG_SIZE_ANNOTATION: &str = "scheduling.volcano.sh/group-min-member";

/// One attempt of one step.
#[derive(Debug, Clone, Copy)]
pub struct Attempt<'a> {
    /// The step.
    pub step: Step,
    /// Its number, from 0.
    pub number: i32,
    /// The trainer's configuration, as JSON.
    pub config: &'a str,
    /// Where it runs; absent for a preflight.
    pub place: Option<(&'a Accelerator, PodSize)>,
    /// How the run is divided over pods and over the processes of each.
    pub parallelism: Parallelism,
}

impl<'a> Attempt<'a> {
    fn accelerator(&self) -> Option<&'a Accelerator> {
        self.place.map(|(accelerator, _)| accelerator)
    }

    /// Returns the size of one pod: the plan's, or the settings' for a preflight.
    fn pod_size(&self, settings: &Settings) -> PodSize {
        let preflight = &settings.preflight;
        self.place.map_or_else(
            || PodSize {
                cpu_millis: (preflight.cpu * 1000.0) as i64,
                memory_bytes: (preflight.memory_gi_b * GIB) as u64,
                shared_memory_bytes: 0,
                storage_bytes: (preflight.storage_gi_b * GIB) as u64,
            },
            |(_, size)| size,
        )
    }

    /// Returns the trainer's image: the accelerator's, or else the one for all.
    fn image<'s>(&'s self, settings: &'s Settings) -> &'s str {
        let own = self.accelerator().and_then(Accelerator::own_trainer);
        own.unwrap_or(&settings.trainer_image)
    }
}

/// Builds the Job of an attempt.
pub fn job(job: &FineTuneJob, settings: &Settings, attempt: &Attempt<'_>) -> Job {
    let name = job.metadata.name.clone().unwrap_or_default();
    let mut labels = labels(job, &name, attempt.step);
    let pod = pod_template(job, settings, attempt, labels.clone());
    let queue = job.metadata.labels.as_ref().and_then(|labels| labels.get(QUEUE_LABEL));
    let is_queued = queue.is_some() && attempt.step == Step::Training;
    if let Some(queue) = queue.filter(|_| is_queued) {
        labels.insert(QUEUE_LABEL.to_owned(), queue.clone());
    }
    let pods = i32::try_from(attempt.parallelism.places()).unwrap_or(i32::MAX);
    let has_ranks = pods > 1;
    Job {
        metadata: ObjectMeta {
            name: Some(job_name(&name, attempt.step, attempt.number)),
            namespace: job.metadata.namespace.clone(),
            labels: Some(labels),
            annotations: has_ranks
                .then(|| BTreeMap::from([(GANG_SIZE_ANNOTATION.to_owned(), pods.to_string())])),
            owner_references: Some(owner(job).into_iter().collect()),
            ..ObjectMeta::default()
        },
        spec: Some(JobSpec {
            // The unit of retry is the attempt, which has a Job of its own.
            // Each rank ends by itself when another does, so all of them can be asked why: a Job that
            // failed as a whole would delete the pods that are still terminating.
            backoff_limit: (!has_ranks).then_some(0),
            backoff_limit_per_index: has_ranks.then_some(0),
            completion_mode: has_ranks.then(|| "Indexed".to_owned()),
            completions: has_ranks.then_some(pods),
            parallelism: has_ranks.then_some(pods),
            pod_replacement_policy: Some("Failed".to_owned()),
            // Set once, when it is created; after that it is the queue's.
            suspend: is_queued.then_some(true),
            template: pod,
            ..JobSpec::default()
        }),
        status: None,
    }
}
