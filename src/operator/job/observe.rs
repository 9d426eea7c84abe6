//! What is observed of a job's children, in the operator's own words.
//!
//! Kubernetes' objects are read once, when a watch delivers them, and only this is kept: a cache of
//! thousands stays small.

use finetune_api::AttemptStatus;
use finetune_contract::Progress;
use k8s_openapi::{
    api::{
        batch::v1::Job,
        core::v1::{ContainerState, ContainerStateTerminated, Pod},
    },
    apimachinery::pkg::apis::meta::v1::OwnerReference,
    jiff::{SignedDuration, Timestamp},
};
use kube::ResourceExt;

use super::build::{digest, names::CONTAINER};

/// Where a Job writes which rank a pod is.
const INDEX_ANNOTATION: &str = "batch.kubernetes.io/job-completion-index";

/// How long Kubernetes may take to create the pods of a Job before the operator asks why.
const PODS_DUE_AFTER: SignedDuration = SignedDuration::from_secs(30);

/// What is observed of one FineTuneJob.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Observed {
    /// Its Jobs.
    pub jobs: Vec<ObservedJob>,
    /// Its pods, those of Jobs that are gone too.
    pub pods: Vec<ObservedPod>,
    /// What the trainer answered, if it was asked.
    pub progress: Option<Progress>,
    /// The UID of the Job that this process created last for it.
    pub created: Option<String>,
    /// Why the cluster refused pods of the current attempt's Job, if some are missing and it did.
    pub pods_refused: Option<String>,
    /// Why the apiserver refused the Job of the current attempt, or what its ranks share, if it did.
    pub refusal: Option<String>,
}

/// A Job.
#[derive(Debug, Clone, PartialEq)]
pub struct ObservedJob {
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: String,
    /// The UID of what made it.
    pub owner_uid: Option<String>,
    /// When it was created.
    pub created: Option<Timestamp>,
    /// What its pods run; see [`digest::of_pods`].
    pub digest: String,
    /// Whether it waits for a queue.
    pub is_suspended: bool,
    /// Whether it is on its way out.
    pub is_deleting: bool,
    /// Whether it succeeded, once it has ended.
    pub ended: Option<bool>,
    /// How many pods it has: the ranks of a run.
    pub ranks: u32,
    /// Whether it has given up the pod of one rank or more.
    pub has_failed_rank: bool,
}

/// A pod.
#[derive(Debug, Clone, PartialEq)]
pub struct ObservedPod {
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: String,
    /// The UID of the Job it belongs to.
    pub job_uid: Option<String>,
    /// Which rank of its Job it is, from 0.
    pub rank: u32,
    /// When it was made.
    pub created: Option<Timestamp>,
    /// When a node was found for it.
    pub scheduled: Option<Timestamp>,
    /// Its node.
    pub node: Option<String>,
    /// Where it can be asked.
    pub ip: Option<String>,
    /// When its container ended.
    pub ended: Option<Timestamp>,
    /// Whether it is on its way out.
    pub is_deleting: bool,
    /// When it is to be gone, if it is on its way out.
    pub deletion_timestamp: Option<Timestamp>,
    /// Whether it is to be gone whatever its node says.
    pub is_force_deleted: bool,
    /// Whether the cluster, not the program, ended or ends it.
    pub is_disrupted: bool,
    /// How it is.
    pub state: PodState,
}

/// How a pod is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PodState {
    /// No node has room for it; the scheduler's words.
    Unschedulable(String),
    /// Its container cannot start; the kubelet's word and words, if it has any.
    Waiting {
        /// Such as `ImagePullBackOff`; empty if the kubelet has not said one.
        reason: String,
        /// The kubelet's words.
        message: String,
    },
    /// Its container runs.
    Running,
    /// Its container has ended.
    Ended {
        /// The exit status; none if the pod ended without its container having run.
        code: Option<i32>,
        /// Whether it was OOM-killed.
        is_out_of_memory: bool,
        /// The termination message: what the trainer reported.
        message: String,
    },
}

impl Observed {
    /// Finds a Job by name.
    pub fn job(&self, name: &str) -> Option<&ObservedJob> {
        self.jobs.iter().find(|job| job.name == name)
    }

    /// Finds the Job whose UID an attempt notes.
    pub fn job_of(&self, attempt: &AttemptStatus) -> Option<&ObservedJob> {
        let uid = attempt.job_uid.as_ref()?;
        self.jobs.iter().find(|job| job.uid == *uid)
    }

    /// Finds the newest pod of each rank of a Job, by rank.
    pub fn pods_of(&self, job: &ObservedJob) -> Vec<Option<&ObservedPod>> {
        let newest = |rank| {
            let is_of_rank =
                |pod: &&ObservedPod| pod.job_uid.as_ref() == Some(&job.uid) && pod.rank == rank;
            self.pods.iter().filter(is_of_rank).max_by_key(|pod| pod.created)
        };
        (0..job.ranks).map(newest).collect()
    }

    /// Returns when pods that a Job still lacks are overdue; `None` if it lacks none, or waits itself.
    pub fn pods_due(&self, job: &ObservedJob) -> Option<Timestamp> {
        let is_waiting = job.is_suspended || job.is_deleting || job.ended.is_some();
        let lacks_pods = || self.pods_of(job).iter().any(Option::is_none);
        let due = job.created.filter(|_| !is_waiting)? + PODS_DUE_AFTER;
        lacks_pods().then_some(due)
    }

    /// Lists the pods that run though their Job is gone.
    pub fn orphaned_pods(&self) -> impl Iterator<Item = &ObservedPod> {
        let has_job =
            |pod: &&ObservedPod| self.jobs.iter().any(|job| Some(&job.uid) == pod.job_uid.as_ref());
        self.pods
            .iter()
            .filter(move |pod| !matches!(pod.state, PodState::Ended { .. }) && !has_job(pod))
    }
}

/// Finds what made an object.
pub fn controller(owners: &[OwnerReference]) -> Option<&OwnerReference> {
    owners.iter().find(|owner| owner.controller == Some(true))
}

/// Reads a Job.
pub fn observe_job(job: &Job) -> ObservedJob {
    let conditions = job.status.as_ref().and_then(|status| status.conditions.as_deref());
    let holds = |kind: &str| {
        conditions
            .unwrap_or_default()
            .iter()
            .any(|condition| condition.type_ == kind && condition.status == "True")
    };
    let spec = job.spec.as_ref();
    let completions = spec.and_then(|spec| spec.completions).unwrap_or(1);
    let failed_ranks = job.status.as_ref().and_then(|status| status.failed_indexes.as_ref());
    ObservedJob {
        name: job.name_any(),
        uid: job.uid().unwrap_or_default(),
        owner_uid: controller(job.owner_references()).map(|owner| owner.uid.clone()),
        created: job.metadata.creation_timestamp.as_ref().map(|time| time.0),
        digest: digest::of_pods(job),
        is_suspended: spec.and_then(|spec| spec.suspend).unwrap_or(false),
        is_deleting: job.metadata.deletion_timestamp.is_some(),
        ended: match (holds("Complete"), holds("Failed")) {
            (true, _) => Some(true),
            (false, true) => Some(false),
            (false, false) => None,
        },
        ranks: u32::try_from(completions).unwrap_or(1),
        has_failed_rank: failed_ranks.is_some_and(|indexes| !indexes.is_empty()),
    }
}

/// Reads a pod.
pub fn observe_pod(pod: &Pod) -> ObservedPod {
    let status = pod.status.as_ref();
    let conditions = status.and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    let condition = |kind: &str| conditions.iter().find(|condition| condition.type_ == kind);
    ObservedPod {
        name: pod.name_any(),
        uid: pod.uid().unwrap_or_default(),
        job_uid: controller(pod.owner_references()).map(|owner| owner.uid.clone()),
        // A pod of a Job without indexes is its only one.
        rank: pod
            .annotations()
            .get(INDEX_ANNOTATION)
            .and_then(|rank| rank.parse().ok())
            .unwrap_or(0),
        created: pod.metadata.creation_timestamp.as_ref().map(|time| time.0),
        scheduled: condition("PodScheduled")
            .filter(|condition| condition.status == "True")
            .and_then(|condition| condition.last_transition_time.as_ref())
            .map(|time| time.0),
        node: pod.spec.as_ref().and_then(|spec| spec.node_name.clone()),
        ip: status.and_then(|status| status.pod_ip.clone()),
        ended: container(pod)
            .and_then(|state| state.terminated.as_ref()?.finished_at.as_ref())
            .map(|time| time.0),
        is_deleting: pod.metadata.deletion_timestamp.is_some(),
        deletion_timestamp: pod.metadata.deletion_timestamp.as_ref().map(|time| time.0),
        is_force_deleted: pod.metadata.deletion_grace_period_seconds == Some(0),
        is_disrupted: condition("DisruptionTarget")
            .is_some_and(|condition| condition.status == "True"),
        state: observe_state(pod),
    }
}

fn container(pod: &Pod) -> Option<&ContainerState> {
    let containers = pod.status.as_ref()?.container_statuses.as_ref()?;
    containers.iter().find(|container| container.name == CONTAINER)?.state.as_ref()
}

fn observe_state(pod: &Pod) -> PodState {
    let status = pod.status.as_ref();
    let phase = status.and_then(|status| status.phase.as_deref()).unwrap_or_default();
    let container = container(pod);
    if let Some(ended) = container.and_then(|state| state.terminated.as_ref()) {
        return ended_state(ended);
    }
    if phase == "Failed" || phase == "Succeeded" {
        // The kubelet refused the pod or evicted it before its container ran.
        let message = status.and_then(|status| status.message.clone()).unwrap_or_default();
        return PodState::Ended { code: None, is_out_of_memory: false, message };
    }
    if container.is_some_and(|state| state.running.is_some()) {
        return PodState::Running;
    }
    if let Some(waiting) = container.and_then(|state| state.waiting.as_ref()) {
        return PodState::Waiting {
            reason: waiting.reason.clone().unwrap_or_default(),
            message: waiting.message.clone().unwrap_or_default(),
        };
    }
    let conditions = status.and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    let unscheduled = conditions
        .iter()
        .find(|condition| condition.type_ == "PodScheduled" && condition.status == "False");
    match unscheduled {
        Some(condition) => PodState::Unschedulable(condition.message.clone().unwrap_or_default()),
        None => PodState::Waiting { reason: String::new(), message: String::new() },
    }
}

fn ended_state(ended: &ContainerStateTerminated) -> PodState {
    PodState::Ended {
        code: Some(ended.exit_code),
        is_out_of_memory: ended.reason.as_deref() == Some("OOMKilled"),
        message: ended.message.clone().unwrap_or_default(),
    }
}
