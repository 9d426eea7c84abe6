//! What every reconciliation shares, and how one fails.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
};

use finetune_api::FineTuneJob;
use k8s_openapi::jiff::Timestamp;
use kube::{
    Client,
    runtime::events::{Recorder, Reporter},
};

use super::{child_cache::ChildCache, progress_client::ProgressClient};
use crate::operator::{runtime::metrics::Metrics, settings::Settings};

/// Returns the current time.
pub(super) type Clock = Arc<dyn Fn() -> Timestamp + Send + Sync>;

/// What every reconciliation shares.
pub struct Context {
    /// The clock of reconciliations.
    pub(super) clock: Clock,
    pub(super) client: Client,
    pub(super) settings: Settings,
    pub(super) metrics: Metrics,
    pub(super) children: ChildCache,
    pub(super) recorder: Recorder,
    pub(super) progress: ProgressClient,
    memory: Mutex<HashMap<String, Memory>>,
}

/// What is remembered of a job between reconciliations; losing it costs a repetition, no more.
#[derive(Default)]
pub(super) struct Memory {
    /// The version this operator has replaced: seen again, it is old news.
    pub(super) replaced: Option<String>,
    /// Reconciliations that failed in a row.
    pub(super) failures: u32,
    /// Why the apiserver refused the Job of the current attempt, or what its ranks share.
    pub(super) refusal: Option<String>,
    /// The UID of the Job that this process created last.
    pub(super) created: Option<String>,
}

impl Context {
    /// Creates the context of an operator that has not started.
    ///
    /// # Errors
    /// If no HTTP client can be created.
    pub(super) fn new(
        client: Client,
        settings: Settings,
        metrics: Metrics,
        instance: &str,
    ) -> anyhow::Result<Self> {
        let instance = Some(instance.to_owned());
        let reporter = Reporter { controller: "finetune-operator".to_owned(), instance };
        Ok(Self {
            clock: Arc::new(Timestamp::now),
            recorder: Recorder::new(client.clone(), reporter),
            progress: ProgressClient::new()?,
            children: ChildCache::default(),
            memory: Mutex::default(),
            client,
            settings,
            metrics,
        })
    }

    /// Reads and changes what is remembered of a job.
    pub(super) fn remember<T>(
        &self,
        job: &FineTuneJob,
        change: impl FnOnce(&mut Memory) -> T,
    ) -> T {
        let uid = job.metadata.uid.clone().unwrap_or_default();
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        change(memory.entry(uid).or_default())
    }

    /// Forgets all but these jobs.
    pub(super) fn forget_others(&self, jobs: &[Arc<FineTuneJob>]) {
        let uids: HashSet<&str> =
            jobs.iter().filter_map(|job| job.metadata.uid.as_deref()).collect();
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        memory.retain(|uid, _| uids.contains(uid.as_str()));
        self.progress.forget_others(&uids);
    }
}

/// Why a reconciliation failed; it is repeated.
#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    /// The apiserver refused or did not answer.
    #[error("cannot {action}: {source}")]
    Api {
        /// What was to be done.
        action: &'static str,
        /// The apiserver's answer.
        source: kube::Error,
    },
    /// An object of that name exists and is not ours.
    #[error(
        "a {kind} named {name:?} already exists and does not belong to this FineTuneJob: delete it, or create the FineTuneJob under another name"
    )]
    NameTaken {
        /// Such as `Job`.
        kind: String,
        /// The name that is taken.
        name: String,
    },
    /// It took too long.
    #[error("the reconciliation took longer than {} s", .0.as_secs())]
    TimedOut(std::time::Duration),
    /// It panicked.
    #[error("the reconciliation panicked, which is a bug: {0}")]
    Panicked(String),
}

impl ReconcileError {
    pub(super) fn api(action: &'static str) -> impl FnOnce(kube::Error) -> Self {
        move |source| Self::Api { action, source }
    }

    /// Returns whether what was read is older than what is stored: reconcile again, nothing is wrong.
    pub(super) fn is_conflict(&self) -> bool {
        matches!(self, Self::Api { source: kube::Error::Api(status), .. } if status.code == 409)
    }
}
