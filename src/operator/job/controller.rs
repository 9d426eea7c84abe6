//! The controller of FineTuneJobs: watches fill a queue of jobs to reconcile, and a job that failed is
//! put into it again.

use std::{future::Future, sync::Arc, time::Duration};

use finetune_api::FineTuneJob;
use futures::{StreamExt, future, stream};
use k8s_openapi::api::{batch::v1::Job, core::v1::Pod};
use kube::{
    Api, Client, Resource, ResourceExt,
    core::DeserializeGuard,
    runtime::{
        Controller, WatchStreamExt,
        controller::{Action, Config},
        reflector, watcher,
    },
};
use tracing::{error, warn};

use super::{
    accounting,
    build::names::{JOB_LABEL, MANAGED_BY},
    context::{Context, ReconcileError},
    invalid_object::valid_jobs,
    reconcile::reconcile,
};
use crate::operator::{runtime::metrics::Metrics, settings::Settings};

/// Jobs reconciled at once, at most.
const CONCURRENCY: u16 = 16;
/// The first wait after a failed reconciliation; it doubles.
const FIRST_BACKOFF: Duration = Duration::from_secs(1);
/// The longest wait after a failed reconciliation.
const MAX_BACKOFF: Duration = Duration::from_mins(5);

/// The controller of one namespace, or of all.
pub struct Operator {
    context: Arc<Context>,
    namespace: Option<String>,
}

impl Operator {
    /// Creates an operator of one namespace, or of all, that has not started.
    ///
    /// # Errors
    /// If no HTTP client can be created.
    pub fn new(
        client: Client,
        settings: Settings,
        metrics: Metrics,
        instance: &str,
        namespace: Option<String>,
    ) -> anyhow::Result<Self> {
        let context = Arc::new(Context::new(client, settings, metrics, instance)?);
        Ok(Self { context, namespace })
    }

    /// Runs until `stop` resolves; reconciliations in progress are finished first.
    pub async fn run(self: Arc<Self>, stop: impl Future<Output = ()> + Send + Sync + 'static) {
        let (reader, writer) = reflector::store();
        let jobs = self.watch::<DeserializeGuard<FineTuneJob>>(false);
        let jobs = jobs.filter_map(|event| future::ready(event.map(valid_jobs).transpose()));
        let jobs = reflector::reflector(writer, jobs).touched_objects();
        let counter = accounting::count_jobs(Arc::clone(&self.context), reader.clone());
        let children = self.watch::<Job>(true);
        let pods = self.watch::<Pod>(true);
        let [of_jobs, of_pods] = [Arc::clone(&self.context), Arc::clone(&self.context)];
        let job_parents = children.flat_map(move |event| {
            stream::iter(event.map(|event| of_jobs.children.take_job(event)).unwrap_or_default())
        });
        let pod_parents = pods.flat_map(move |event| {
            stream::iter(event.map(|event| of_pods.children.take_pod(event)).unwrap_or_default())
        });
        let answered = self.context.progress.answers();
        let reconciliations = Controller::for_stream(jobs, reader)
            .with_config(Config::default().concurrency(CONCURRENCY))
            .reconcile_on(job_parents)
            .reconcile_on(pod_parents)
            .reconcile_on(answered)
            .graceful_shutdown_on(stop)
            .run(
                |job, context| async move { reconcile(&context, &job).await },
                |job, error, context| requeue_failed(&context, &job, error),
                Arc::clone(&self.context),
            )
            .for_each(|_| async {});
        tokio::select! {
            () = reconciliations => {}
            () = counter => {}
        }
    }

    /// Opens a watch that is opened again, with back-off, when it fails.
    fn watch<K>(
        &self,
        only_ours: bool,
    ) -> impl futures::Stream<Item = Result<watcher::Event<K>, watcher::Error>> + Send + use<K>
    where
        K: Resource<Scope = kube::core::NamespaceResourceScope, DynamicType = ()>
            + serde::de::DeserializeOwned
            + Clone
            + std::fmt::Debug
            + Send
            + 'static,
    {
        let api: Api<K> = match &self.namespace {
            Some(namespace) => Api::namespaced(self.context.client.clone(), namespace),
            None => Api::all(self.context.client.clone()),
        };
        let (label, value) = MANAGED_BY;
        let config = if only_ours {
            watcher::Config::default().labels(&format!("{label}={value},{JOB_LABEL}"))
        } else {
            watcher::Config::default()
        };
        let errors =
            self.context.metrics.watch_errors.with_label_values(&[K::plural(&()).as_ref()]);
        watcher(api, config)
            .modify(|object| object.meta_mut().managed_fields = None)
            .default_backoff()
            .inspect(move |event| {
                if let Err(error) = event {
                    errors.inc();
                    warn!(%error, kind = %K::kind(&()), "a watch failed and is opened again");
                }
            })
    }
}

/// Returns when a job whose reconciliation failed is reconciled again.
fn requeue_failed(context: &Context, job: &FineTuneJob, error: &ReconcileError) -> Action {
    if error.is_conflict() {
        // The watch brings what is newer; if it already has, this reconciles it.
        return Action::requeue(FIRST_BACKOFF);
    }
    context.metrics.reconcile_errors.inc();
    let failures = context.remember(job, |memory| {
        memory.failures += 1;
        memory.failures
    });
    let wait = (FIRST_BACKOFF * 2_u32.saturating_pow(failures.min(16) - 1)).min(MAX_BACKOFF);
    let (namespace, name) = (job.namespace().unwrap_or_default(), job.name_any());
    error!(%error, namespace, name, wait_seconds = wait.as_secs(), "a reconciliation failed");
    Action::requeue(wait)
}
