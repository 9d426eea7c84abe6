//! The reasons of a job's conditions: one list for the operator, the trainer and the documentation.

use crate::{preflight_report::ProblemReason, run_report::FailureReason};

/// When the condition `Succeeded` can have a reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReasonPhase {
    /// While the job is in progress: the condition is Unknown.
    InProgress,
    /// While a pod cannot start, and at the end if that lasts longer than
    /// `startupDeadlineSeconds`.
    Startup,
    /// At the end: the condition is True or False.
    Terminal,
    /// Never: it is a reason of another condition only.
    OtherCondition,
}

macro_rules! reasons {
    ($($phase:ident { $($reason:ident: $meaning:literal, $remedy:literal;)+ })+) => {
        /// Why a condition of a job has its value.
        ///
        /// The names are part of the API: they are stored in `status.conditions`, counted in metrics
        /// and matched by alerts. `docs/reference/reasons.md` is generated from the two texts of each.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Reason {
            $($(
                #[doc = concat!("Meaning: ", $meaning, ".\n\nWhat to do: ", $remedy, ".")]
                $reason,
            )+)+
        }

        impl Reason {
            /// All reasons, in the order of the documentation.
            pub const ALL: &[Self] = &[$($(Self::$reason,)+)+];

            /// Returns the reason as it is written in a condition.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $($(Self::$reason => stringify!($reason),)+)+
                }
            }

            /// Returns when the condition `Succeeded` can have the reason.
            pub const fn phase(self) -> ReasonPhase {
                match self {
                    $($(Self::$reason)|+ => ReasonPhase::$phase,)+
                }
            }

            /// Returns what the reason means, in Markdown.
            pub const fn meaning(self) -> &'static str {
                match self {
                    $($(Self::$reason => $meaning,)+)+
                }
            }

            /// Returns what to do about it, in Markdown.
            pub const fn remedy(self) -> &'static str {
                match self {
                    $($(Self::$reason => $remedy,)+)+
                }
            }
        }
    };
}

reasons! {
    InProgress {
        Pending: "the operator has not reconciled the job yet (a job without conditions is pending too)", "wait; if it stays pending: is the operator running, is the namespace in `settings.namespaces`, and does the operator's log say that the job \"cannot be read\"?";
        Preflight: "a pod checks model, dataset and output", "nothing";
        AwaitingApproval: "the plan is made and `approval` is Manual", "read the plan, then approve it with `spec.approval: Auto`, or delete the job";
        Queued: "Kueue has not admitted the job", "see [FineTuneJobsQueued](../OPERATIONS.md#finetunejobsqueued)";
        Unschedulable: "no node has room for the pod, for the pod of the rank that is named, or for all pods of a gang at once; the message is the scheduler's", "see [FineTuneJobsQueued](../OPERATIONS.md#finetunejobsqueued)";
        Starting: "the training pod starts, fetches the model and loads it", "nothing";
        Training: "the trainer makes optimizer steps", "read `status.progress`";
        Publishing: "the result is written, read back and verified", "nothing";
        Stopping: "pods of an attempt are terminating: the job was suspended, a Job was deleted, or a rank is lost", "wait";
        NodeUnreachable: "a pod that is being deleted should be gone and is not: its node, which the message names, does not answer", "see [FineTuneJobNodeUnreachable](../OPERATIONS.md#finetunejobnodeunreachable)";
        Suspended: "`spec.suspend` is set and nothing runs", "set it to false to resume";
        Retrying: "an attempt ended and the next one follows; the message says why", "if it repeats, look at the cause";
        Adapted: "an attempt ran out of memory; the next one computes the same steps with smaller micro-batches and resumes from the newest checkpoint; the message, which the condition `Planned` keeps, says how", "nothing; if it repeats from job to job, raise `resources.limits.memory` or report the prediction";
        PlanUnreadable: "the plan was made by another release, which this one cannot read; pods of the run go on, and their reports wait", "see [FineTuneJobsHeld](../OPERATIONS.md#finetunejobsheld)";
        AcceleratorMissing: "the plan's accelerator is no longer in the settings", "add it again, or create the job again";
        TrainerImageMissing: "the run fits only an accelerator whose `image` is not set", "set `image` of that accelerator in the settings to a trainer built with CUDA ([GPUs](../OPERATIONS.md#gpus)), or make the run smaller; a waiting job is planned again when the settings change";
    }
    Startup {
        JobRefused: "the apiserver rejects the Job of an attempt: a quota, a policy, or a Job, Service or NetworkPolicy of that name that is not the operator's; the message is the apiserver's", "fix what the message names; the operator retries with growing delays of up to 5 minutes";
        PodsRefused: "the cluster rejects the pods of an attempt: a ResourceQuota, a LimitRange, Pod Security or an admission webhook; the message is the cluster's", "fix what the message names, or wait for the quota: Kubernetes retries with growing delays, and the pods then start by themselves";
        ImagePullFailed: "the trainer's image cannot be pulled", "check `image.trainer`, and its `pullSecrets` in the job's namespace";
        SecretOrConfigMapMissing: "a Secret or ConfigMap that the job names, or a key of one, does not exist", "create it; the pod then starts by itself";
        VolumeClaimMissing: "a PersistentVolumeClaim that a `pvc://` URI of the job names does not exist in its namespace; the message is the scheduler's", "correct the URI, or create the claim; the pod then starts by itself";
        ContainerCannotStart: "the container runtime refuses to start the container; the message is the runtime's", "check the node's runtime, `runtimeClassName` and volume claims";
    }
    Terminal {
        Succeeded: "the result is published and verified", "nothing";
        AlreadyPublished: "the condition is true, and nothing was trained: the same rows, model and settings are already published at `output.uri`; the message names the run that published them", "to train anyway, choose another `output.uri`, or another `training.seed` with `output.overwrite: true`";
        InvalidSpec: "a field has a value that cannot work, such as a file:// URI, or an `output.uri` at, above or below an input", "correct the field that the message names";
        InvalidConfiguration: "the trainer cannot carry out the configuration", "correct the field that the message names";
        NotFound: "nothing exists at a URI", "correct the URI";
        PermissionDenied: "a bucket or hub refuses the credentials, or requires some", "correct the Secret; accept the model's terms at the hub";
        StoreUnavailable: "a bucket or hub did not answer, in any of the retries", "check DNS, `networkPolicies.trainers`, the endpoint in the Secret, and `allowedEndpoints`";
        Unavailable: "as `StoreUnavailable`, found by the preflight together with another problem", "as for `StoreUnavailable`";
        UnsupportedModel: "the trainer does not support the model's architecture, or a key of its config", "choose another model";
        InvalidModel: "files of the model are damaged, unsafe or contradict each other", "fetch or convert the model again";
        InvalidTokenizer: "the tokenizer or its chat template is missing or unusable", "add the files to the model";
        InvalidDataset: "a row or file cannot be used, or changed since the preflight", "correct the file and line that the message names";
        NothingToTrain: "no token of the dataset is a target", "check that the format is the one intended";
        Overflow: "rows are longer than the context", "shorten them, raise `contextLength`, or let them be cut or dropped";
        DuplicateRows: "rows occur twice, or in both splits", "remove them";
        OutputExists: "the output holds a result of other rows, another model or other settings (the message says which), or one of an earlier release that did not record them", "choose another URI, or set `output.overwrite: true`";
        Servability: "a server such as vLLM would refuse the result", "change the setting that the message names";
        NoAcceleratorFits: "no accelerator has enough memory; the message says what each lacks", "choose a smaller model, batch or context, or LoRA, or add another accelerator to the settings";
        OutOfMemory: "a pod or device had too little memory; when training, even for the smallest micro-batches (`status.plan.fallbacks` is used up, or all of it needs more than the limit); the message says how many bytes are missing", "for a preflight, raise `preflight.memoryGiB`; for training, see [FineTuneTrainerMemoryAbovePrediction](../OPERATIONS.md#finetunetrainermemoryaboveprediction)";
        DiskFull: "the pod's scratch space is full", "report it with the plan: the pod was planned too small";
        Diverged: "the loss is infinite or not a number; nothing of it is published", "lower the learning rate to a third or a tenth, or lengthen the warm-up; if the loss was high from the first step, look at the data";
        NotProven: "verification failed: what was published is not what was written, or does not behave as trained", "do not use it; create the job again, and report it if it repeats";
        DeviceUnavailable: "the pod was planned for a GPU and can use none; the message says why as far as it is known", "check the node's driver, container toolkit and device plugin, and `image` of the accelerator";
        PeerLost: "another rank of the run died, failed or fell silent; the message names it", "read its log; the run resumes from its checkpoint";
        CheckpointMismatch: "a checkpoint in the output is of other data or settings", "choose another output URI";
        DeadlineExceeded: "the run took longer than `activeDeadlineSeconds`", "set a longer deadline in the next job; the last checkpoint stays in the bucket";
        TooManyDisruptions: "the cluster ended more attempts than `disruptions` allows", "use another node pool, or raise `disruptions`";
        TrainerFailed: "the trainer ended without a readable report, in every retry, or with one of another run, attempt or output", "read its log; is the image of the operator's release?";
        Internal: "a defect of the trainer", "report it with the log";
    }
    OtherCondition {
        NotSuspended: "`Suspended` is false: `spec.suspend` is not set", "nothing";
        PreflightPassed: "`Accepted` is true: model, dataset and output can be used", "nothing";
        Planned: "`Planned` is true: the run has a plan and an accelerator", "read `status.plan.summary`";
        Proven: "`Published` is true: the result was read back and verified", "nothing";
    }
}

impl From<ProblemReason> for Reason {
    fn from(reason: ProblemReason) -> Self {
        match reason {
            ProblemReason::InvalidSpec => Self::InvalidSpec,
            ProblemReason::NotFound => Self::NotFound,
            ProblemReason::PermissionDenied => Self::PermissionDenied,
            ProblemReason::Unavailable => Self::Unavailable,
            ProblemReason::UnsupportedModel => Self::UnsupportedModel,
            ProblemReason::InvalidModel => Self::InvalidModel,
            ProblemReason::InvalidTokenizer => Self::InvalidTokenizer,
            ProblemReason::InvalidDataset => Self::InvalidDataset,
            ProblemReason::NothingToTrain => Self::NothingToTrain,
            ProblemReason::Overflow => Self::Overflow,
            ProblemReason::DuplicateRows => Self::DuplicateRows,
            ProblemReason::OutputExists => Self::OutputExists,
            ProblemReason::Servability => Self::Servability,
        }
    }
}

impl From<FailureReason> for Reason {
    fn from(reason: FailureReason) -> Self {
        match reason {
            FailureReason::InvalidConfiguration => Self::InvalidConfiguration,
            FailureReason::InvalidModel => Self::InvalidModel,
            FailureReason::InvalidDataset => Self::InvalidDataset,
            FailureReason::StoreUnavailable => Self::StoreUnavailable,
            FailureReason::PermissionDenied => Self::PermissionDenied,
            FailureReason::OutputExists => Self::OutputExists,
            FailureReason::OutOfMemory => Self::OutOfMemory,
            FailureReason::DeviceUnavailable => Self::DeviceUnavailable,
            FailureReason::DiskFull => Self::DiskFull,
            FailureReason::Diverged => Self::Diverged,
            FailureReason::NotProven => Self::NotProven,
            FailureReason::CheckpointMismatch => Self::CheckpointMismatch,
            FailureReason::PeerLost => Self::PeerLost,
            FailureReason::Internal => Self::Internal,
        }
    }
}

impl std::fmt::Display for Reason {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(self.as_str())
    }
}

impl std::str::FromStr for Reason {
    type Err = UnknownReason;

    fn from_str(word: &str) -> Result<Self, Self::Err> {
        let known = Self::ALL.iter().copied().find(|reason| reason.as_str() == word);
        known.ok_or_else(|| UnknownReason(word.to_owned()))
    }
}

/// A word that is no [`Reason`] of this release.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a reason of this release")]
pub struct UnknownReason(String);

#[cfg(test)]
mod tests {
    use super::Reason;
    use crate::{preflight_report::ProblemReason, run_report::FailureReason};

    #[test]
    fn reasons_keep_the_words_that_users_and_alerts_match() {
        let words: Vec<&str> = Reason::ALL.iter().map(|reason| reason.as_str()).collect();
        insta::assert_snapshot!(words.join(" "), @"Pending Preflight AwaitingApproval Queued Unschedulable Starting Training Publishing Stopping NodeUnreachable Suspended Retrying Adapted PlanUnreadable AcceleratorMissing TrainerImageMissing JobRefused PodsRefused ImagePullFailed SecretOrConfigMapMissing VolumeClaimMissing ContainerCannotStart Succeeded AlreadyPublished InvalidSpec InvalidConfiguration NotFound PermissionDenied StoreUnavailable Unavailable UnsupportedModel InvalidModel InvalidTokenizer InvalidDataset NothingToTrain Overflow DuplicateRows OutputExists Servability NoAcceleratorFits OutOfMemory DiskFull Diverged NotProven DeviceUnavailable PeerLost CheckpointMismatch DeadlineExceeded TooManyDisruptions TrainerFailed Internal NotSuspended PreflightPassed Planned Proven");
    }

    #[test]
    fn problems_and_failures_are_reasons_of_the_same_word() {
        // The word of a document is its serialised form.
        let mut shared = 0;
        for reason in Reason::ALL {
            let json = format!("\"{reason}\"");
            if let Ok(problem) = serde_json::from_str::<ProblemReason>(&json) {
                assert_eq!(Reason::from(problem), *reason);
                shared += 1;
            }
            if let Ok(failure) = serde_json::from_str::<FailureReason>(&json) {
                assert_eq!(Reason::from(failure), *reason);
                shared += 1;
            }
            assert_eq!(reason.as_str().parse(), Ok(*reason));
        }
        assert_eq!(shared, 13 + 14);
    }

    #[test]
    fn texts_fit_a_table_and_a_sentence() {
        for reason in Reason::ALL {
            for text in [reason.meaning(), reason.remedy()] {
                assert!(!text.is_empty() && !text.contains(['|', '\n']), "{reason}: {text}");
                assert!(!text.ends_with('.'), "{reason}: {text}");
            }
        }
    }
}
