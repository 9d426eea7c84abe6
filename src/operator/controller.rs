//! The driver: watches tell that something changed, a visit looks at one job and acts.

use std::{
    collections::{HashMap, HashSet},
    future::Future,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use finetune_contract::{
    Progress, Reason,
    process::{METRICS_PORT, PROGRESS_PATH},
};
use futures::{StreamExt, future, stream};
use k8s_openapi::{
    api::{batch::v1::Job, core::v1::Pod},
    jiff::Timestamp,
};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{DeleteParams, PostParams, Preconditions},
    core::DeserializeGuard,
    runtime::{
        Controller, WatchStreamExt,
        controller::{Action as Next, Config},
        events::{Event, EventType, Recorder, Reporter},
        reflector::{self, Store},
        watcher,
    },
};
use tracing::{error, info, warn};

use super::{
    build::{JOB_LABEL, MANAGED_BY},
    children::Children,
    conditions::{self, Kind},
    lifecycle::{self, Action, Decision, Note, PROGRESS_INTERVAL},
    metrics::Metrics,
    observe::{Observed, ObservedPod, PodState, controller},
    readable::readable,
    settings::Settings,
};
use crate::api::{FineTuneJob, FineTuneJobStatus, Step};

/// Visits at once, at most.
const CONCURRENCY: u16 = 16;
/// How long a visit may take.
const VISIT_TIMEOUT: Duration = Duration::from_mins(1);
/// How long a trainer may take to answer.
const PROGRESS_TIMEOUT: Duration = Duration::from_secs(3);
/// The first wait after a failed visit; it doubles.
const FIRST_WAIT: Duration = Duration::from_secs(1);
/// The longest wait after a failed visit.
const LONGEST_WAIT: Duration = Duration::from_mins(5);
/// Answers by which the apiserver says that a Job may not be.
const REFUSALS: [u16; 3] = [400, 403, 422];
/// How often jobs are counted.
const COUNT_INTERVAL: Duration = Duration::from_secs(10);
/// The longest text of an event.
const NOTE_LIMIT: usize = 1000;

/// Why a visit failed; it is repeated.
#[derive(Debug, thiserror::Error)]
pub enum VisitError {
    /// The apiserver refused or did not answer.
    #[error("cannot {action}: {source}")]
    Api {
        /// What was to be done.
        action: &'static str,
        /// Why not.
        source: kube::Error,
    },
    /// An object of that name is there and is not ours.
    #[error(
        "a {kind} named {name:?} is there already and belongs to something else: delete it, or create the FineTuneJob under another name"
    )]
    NameTaken {
        /// Such as `Job`.
        kind: String,
        /// Its name.
        name: String,
    },
    /// It took too long.
    #[error("the visit took longer than {} s", VISIT_TIMEOUT.as_secs())]
    TimedOut,
}

impl VisitError {
    fn api(action: &'static str) -> impl FnOnce(kube::Error) -> Self {
        move |source| Self::Api { action, source }
    }

    /// Tells whether what was read is older than what is there: look again, nothing is wrong.
    fn is_conflict(&self) -> bool {
        matches!(self, Self::Api { source: kube::Error::Api(status), .. } if status.code == 409)
    }
}

/// What every visit shares.
pub struct Operator {
    client: Client,
    settings: Settings,
    namespace: Option<String>,
    metrics: Metrics,
    children: Children,
    recorder: Recorder,
    http: reqwest::Client,
    memory: Mutex<HashMap<String, Memory>>,
}

/// What is remembered of a job between visits; losing it costs a repetition, no more.
#[derive(Default)]
struct Memory {
    /// The version this operator has replaced: seen again, it is old news.
    replaced: Option<String>,
    /// When the trainer was last asked.
    asked: Option<Instant>,
    /// Visits that failed in a row.
    failures: u32,
    /// Why the apiserver refused the Job of the current try, or what its ranks share.
    refusal: Option<String>,
}

impl Operator {
    /// Makes an operator of one namespace, or of all, that has not started.
    ///
    /// # Errors
    /// If no HTTP client can be made.
    pub fn new(
        client: Client,
        settings: Settings,
        metrics: Metrics,
        instance: &str,
        namespace: Option<String>,
    ) -> anyhow::Result<Self> {
        let instance = Some(instance.to_owned());
        let reporter = Reporter { controller: "finetune-operator".to_owned(), instance };
        Ok(Self {
            recorder: Recorder::new(client.clone(), reporter),
            http: reqwest::Client::builder().timeout(PROGRESS_TIMEOUT).no_proxy().build()?,
            children: Children::default(),
            memory: Mutex::default(),
            client,
            settings,
            namespace,
            metrics,
        })
    }

    /// Runs until `stop` resolves; visits under way are finished first.
    pub async fn run(self: Arc<Self>, stop: impl Future<Output = ()> + Send + Sync + 'static) {
        let (reader, writer) = reflector::store();
        let jobs = self.watch::<DeserializeGuard<FineTuneJob>>(false);
        let jobs = jobs.filter_map(|event| future::ready(event.map(readable).transpose()));
        let jobs = reflector::reflector(writer, jobs).touched_objects();
        let counter = Arc::clone(&self).count_jobs(reader.clone());
        let children = self.watch::<Job>(true);
        let pods = self.watch::<Pod>(true);
        let [of_jobs, of_pods] = [Arc::clone(&self), Arc::clone(&self)];
        let job_parents = children.flat_map(move |event| {
            stream::iter(event.map(|event| of_jobs.children.take_job(event)).unwrap_or_default())
        });
        let pod_parents = pods.flat_map(move |event| {
            stream::iter(event.map(|event| of_pods.children.take_pod(event)).unwrap_or_default())
        });
        let visits = Controller::for_stream(jobs, reader)
            .with_config(Config::default().concurrency(CONCURRENCY))
            .reconcile_on(job_parents)
            .reconcile_on(pod_parents)
            .graceful_shutdown_on(stop)
            .run(
                |job, operator| async move { operator.visit(job).await },
                |job, error, operator| operator.after_failure(&job, error),
                Arc::clone(&self),
            )
            .for_each(|_| async {});
        tokio::select! {
            () = visits => {}
            () = counter => {}
        }
    }

    /// Opens a watch that opens itself again, more and more slowly, when it fails.
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
            Some(namespace) => Api::namespaced(self.client.clone(), namespace),
            None => Api::all(self.client.clone()),
        };
        let (label, value) = MANAGED_BY;
        let config = if only_ours {
            watcher::Config::default().labels(&format!("{label}={value},{JOB_LABEL}"))
        } else {
            watcher::Config::default()
        };
        let errors = self.metrics.watch_errors.with_label_values(&[K::plural(&()).as_ref()]);
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

    /// Looks at one job and does what there is to do.
    async fn visit(&self, job: Arc<FineTuneJob>) -> Result<Next, VisitError> {
        self.children.ready().await;
        let _visit = self.metrics.visit();
        let visited = tokio::time::timeout(VISIT_TIMEOUT, self.look_and_act(&job));
        let visited = visited.await.unwrap_or(Err(VisitError::TimedOut));
        let result = match &visited {
            Ok(_) => {
                self.remember(&job, |memory| memory.failures = 0);
                "success"
            }
            Err(error) if error.is_conflict() => "conflict",
            Err(_) => "error",
        };
        self.metrics.reconciles.with_label_values(&[result]).inc();
        visited
    }

    fn after_failure(&self, job: &FineTuneJob, error: &VisitError) -> Next {
        let name = job.name_any();
        let namespace = job.namespace().unwrap_or_default();
        if error.is_conflict() {
            // The watch will bring what is newer; if it already has, this brings the visit.
            return Next::requeue(FIRST_WAIT);
        }
        self.metrics.reconcile_errors.inc();
        let failures = self.remember(job, |memory| {
            memory.failures += 1;
            memory.failures
        });
        let wait = (FIRST_WAIT * 2_u32.saturating_pow(failures.min(16) - 1)).min(LONGEST_WAIT);
        error!(%error, namespace, name, wait_seconds = wait.as_secs(), "a visit failed");
        Next::requeue(wait)
    }

    async fn look_and_act(&self, job: &FineTuneJob) -> Result<Next, VisitError> {
        if job.metadata.deletion_timestamp.is_some() {
            // Its Jobs and their pods go with it: they are owned.
            return Ok(Next::await_change());
        }
        let version = job.resource_version();
        if self.remember(job, |memory| memory.replaced.is_some() && memory.replaced == version) {
            return Ok(Next::await_change());
        }
        let (namespace, name) = (job.namespace().unwrap_or_default(), job.name_any());
        let mut observed =
            self.children.of(&namespace, &name, job.metadata.uid.as_deref().unwrap_or_default());
        observed.progress = self.ask(job, &observed).await;
        observed.refusal = self.remember(job, |memory| memory.refusal.clone());
        let decision = lifecycle::decide(job, &observed, &self.settings, Timestamp::now());
        self.carry_out(job, &namespace, &name, decision).await
    }

    /// Writes the status first: a plan is known before a pod of it exists.
    async fn carry_out(
        &self,
        job: &FineTuneJob,
        namespace: &str,
        name: &str,
        decision: Decision,
    ) -> Result<Next, VisitError> {
        let Decision { status, actions, notes, look_again } = decision;
        if job.status.as_ref() != Some(&status) {
            let mut next = job.clone();
            next.status = Some(status);
            let api: Api<FineTuneJob> = Api::namespaced(self.client.clone(), namespace);
            // The object carries the version that was read: a newer one makes this fail.
            api.replace_status(name, &PostParams::default(), &next)
                .await
                .map_err(VisitError::api("write the status"))?;
            self.remember(job, |memory| memory.replaced = job.resource_version());
            self.count(job, &next.status.unwrap_or_default());
            for note in notes {
                self.tell(job, note).await;
            }
        }
        for action in actions {
            self.act(namespace, name, job, action).await?;
        }
        Ok(look_again.map_or_else(Next::await_change, Next::requeue))
    }

    async fn act(
        &self,
        namespace: &str,
        name: &str,
        parent: &FineTuneJob,
        action: Action,
    ) -> Result<(), VisitError> {
        match action {
            Action::CreateService(service) => {
                self.create(namespace, parent, &*service, "create the Service of ranks").await?;
            }
            Action::CreateNetworkPolicy(policy) => {
                self.create(namespace, parent, &*policy, "create the NetworkPolicy of ranks")
                    .await?;
            }
            Action::CreateJob(job) => {
                let name = job.name_any();
                let made = self.create(namespace, parent, &*job, "create a Job").await?;
                self.remember(parent, |memory| memory.refusal = None);
                info!(namespace, name, "the Job of a try is there");
                self.children.take_job(watcher::Event::Apply(made));
            }
            Action::DeleteJob { name, uid } => {
                let jobs: Api<Job> = Api::namespaced(self.client.clone(), namespace);
                // In the foreground: the Job stays in sight until its pods are gone.
                let parameters = DeleteParams::foreground()
                    .preconditions(Preconditions { uid: Some(uid), resource_version: None });
                ignore_gone(jobs.delete(&name, &parameters).await)
                    .map_err(VisitError::api("delete a Job"))?;
                info!(namespace, name, "the Job of a try is being deleted");
            }
            Action::DeletePod { name, uid } => {
                let pods: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
                let parameters = DeleteParams::default()
                    .preconditions(Preconditions { uid: Some(uid), resource_version: None });
                ignore_gone(pods.delete(&name, &parameters).await)
                    .map_err(VisitError::api("delete a pod"))?;
                info!(
                    namespace,
                    name, "a pod is being deleted: it has no Job, or waits for a rank that is lost"
                );
            }
            Action::DeleteSelf => {
                let api: Api<FineTuneJob> = Api::namespaced(self.client.clone(), namespace);
                let uid = parent.metadata.uid.clone();
                let parameters = DeleteParams::background()
                    .preconditions(Preconditions { uid, resource_version: None });
                ignore_gone(api.delete(name, &parameters).await)
                    .map_err(VisitError::api("delete the job after its time"))?;
                info!(namespace, name, "a finished job's time is over");
            }
        }
        Ok(())
    }

    /// Makes an object of a job, or finds the one made before.
    async fn create<K>(
        &self,
        namespace: &str,
        parent: &FineTuneJob,
        object: &K,
        action: &'static str,
    ) -> Result<K, VisitError>
    where
        K: Resource<Scope = kube::core::NamespaceResourceScope, DynamicType = ()>
            + serde::Serialize
            + serde::de::DeserializeOwned
            + Clone
            + std::fmt::Debug,
    {
        let api: Api<K> = Api::namespaced(self.client.clone(), namespace);
        let name = object.name_any();
        let made = match api.create(&PostParams::default(), object).await {
            Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => {
                api.get(&name).await
            }
            made => made,
        };
        if let Err(kube::Error::Api(status)) = &made
            && REFUSALS.contains(&status.code)
        {
            // Seen by the next visit, which tells the user.
            let refusal = Some(status.message.clone());
            self.remember(parent, |memory| memory.refusal = refusal);
        }
        let made = made.map_err(VisitError::api(action))?;
        if controller(made.owner_references()).map(|owner| &owner.uid)
            != parent.metadata.uid.as_ref()
        {
            let error = VisitError::NameTaken { kind: K::kind(&()).into_owned(), name };
            let refusal = Some(error.to_string());
            self.remember(parent, |memory| memory.refusal = refusal);
            return Err(error);
        }
        Ok(made)
    }

    /// Tells people; that it could not be told is no reason to stop.
    async fn tell(&self, job: &FineTuneJob, note: Note) {
        let Note { is_warning, reason, mut message } = note;
        message.truncate(message.floor_char_boundary(NOTE_LIMIT));
        let event = Event {
            type_: if is_warning { EventType::Warning } else { EventType::Normal },
            action: reason.as_str().to_owned(),
            reason: reason.as_str().to_owned(),
            note: Some(message),
            secondary: None,
        };
        if let Err(error) = self.recorder.publish(&event, &job.object_ref(&())).await {
            warn!(%error, "an event could not be written");
        }
    }

    /// Asks the trainer how far it is, if it runs and was not asked just now.
    async fn ask(&self, job: &FineTuneJob, observed: &Observed) -> Option<Progress> {
        let attempt = job.status.as_ref()?.attempt.as_ref()?;
        if attempt.step != Step::Training {
            return None;
        }
        let uid = attempt.job_uid.as_ref()?;
        let is_asked = |pod: &&ObservedPod| {
            // Rank 0 speaks for all.
            pod.job_uid.as_ref() == Some(uid)
                && pod.rank == 0
                && pod.state == PodState::Running
                && !pod.is_deleting
        };
        let ip = observed.pods.iter().find(is_asked)?.ip.as_ref()?;
        let is_early = self.remember(job, |memory| {
            let is_early = memory.asked.is_some_and(|asked| asked.elapsed() < PROGRESS_INTERVAL);
            if !is_early {
                memory.asked = Some(Instant::now());
            }
            is_early
        });
        if is_early {
            return None;
        }
        let host = if ip.contains(':') { format!("[{ip}]") } else { ip.clone() };
        let answer =
            self.http.get(format!("http://{host}:{METRICS_PORT}{PROGRESS_PATH}")).send().await;
        let text = answer.ok()?.error_for_status().ok()?.text().await.ok()?;
        // A pod may answer anything: what is not this run's progress is not believed.
        let progress: Progress = finetune_contract::parse(&text).ok()?;
        let plan = job.status.as_ref()?.plan.as_ref()?;
        (progress.run_id.0 == plan.run_id).then_some(progress)
    }

    fn remember<T>(&self, job: &FineTuneJob, change: impl FnOnce(&mut Memory) -> T) -> T {
        let uid = job.metadata.uid.clone().unwrap_or_default();
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        change(memory.entry(uid).or_default())
    }

    /// Forgets all but these jobs.
    fn forget_others(&self, jobs: &[Arc<FineTuneJob>]) {
        let uids: HashSet<&str> =
            jobs.iter().filter_map(|job| job.metadata.uid.as_deref()).collect();
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        memory.retain(|uid, _| uids.contains(uid.as_str()));
    }

    /// Counts repeated tries and a run's end, once: when the status that says so was written.
    fn count(&self, job: &FineTuneJob, status: &FineTuneJobStatus) {
        let namespace = job.namespace().unwrap_or_default();
        let before = job.status.clone().unwrap_or_default();
        let tries = |status: &FineTuneJobStatus| {
            status
                .attempt
                .as_ref()
                .map_or((0, 0), |attempt| (attempt.failures, attempt.disruptions))
        };
        let [(failures, disruptions), (more_failures, more_disruptions)] =
            [tries(&before), tries(status)];
        for (cause, is_more) in
            [("failure", more_failures > failures), ("disruption", more_disruptions > disruptions)]
        {
            if is_more {
                self.metrics.retries.with_label_values(&[&namespace, cause]).inc();
            }
        }
        if conditions::is_finished(&before) || !conditions::is_finished(status) {
            return;
        }
        let Some(end) = conditions::find(status, Kind::Succeeded) else { return };
        let method = if job.spec.lora_config.is_some() { "lora" } else { "full" };
        let result = if end.status == "True" { "succeeded" } else { "failed" };
        self.metrics
            .completions
            .with_label_values(&[&namespace, method, result, &end.reason])
            .inc();
        if let (Some(start), Some(end)) = (&status.start_time, &status.completion_time) {
            let seconds = start.0.duration_until(end.0).as_secs_f64();
            self.metrics.job_seconds.with_label_values(&[method]).observe(seconds);
        }
        let trained = status.result.as_ref().filter(|result| result.measured_peak_bytes > 0);
        if let (Some(plan), Some(result)) = (&status.plan, trained) {
            let name = job.name_any();
            let labels = [namespace.as_str(), name.as_str()];
            self.metrics
                .predicted_bytes
                .with_label_values(&labels)
                .set(plan.predicted_peak_bytes as f64);
            self.metrics
                .measured_bytes
                .with_label_values(&labels)
                .set(result.measured_peak_bytes as f64);
        }
    }

    /// Keeps the gauge of jobs by reason, and forgets jobs that are gone.
    async fn count_jobs(self: Arc<Self>, reader: Store<FineTuneJob>) {
        // Other namespaces have gauges of their own: only what was set here may be taken away.
        let mut counted: Vec<(String, String)> = Vec::new();
        let mut known = HashSet::new();
        loop {
            tokio::time::sleep(COUNT_INTERVAL).await;
            let jobs = reader.state();
            self.forget_others(&jobs);
            let names: HashSet<(String, String)> = jobs
                .iter()
                .map(|job| (job.namespace().unwrap_or_default(), job.name_any()))
                .collect();
            for (namespace, name) in known.difference(&names) {
                for gauges in [&self.metrics.predicted_bytes, &self.metrics.measured_bytes] {
                    // A job that did not succeed has none.
                    let _ = gauges.remove_label_values(&[namespace, name]);
                }
            }
            known = names;
            let mut counts: HashMap<(String, String), i64> = HashMap::new();
            for job in &jobs {
                let reason = job
                    .status
                    .as_ref()
                    .and_then(|status| conditions::find(status, Kind::Succeeded))
                    .map_or(Reason::Pending.as_str(), |condition| condition.reason.as_str());
                let namespace = job.namespace().unwrap_or_default();
                *counts.entry((namespace, reason.to_owned())).or_default() += 1;
            }
            for (namespace, reason) in counted.drain(..) {
                if !counts.contains_key(&(namespace.clone(), reason.clone())) {
                    // It was set here, so it is there.
                    let _ = self.metrics.jobs.remove_label_values(&[&namespace, &reason]);
                }
            }
            for ((namespace, reason), count) in counts {
                self.metrics.jobs.with_label_values(&[&namespace, &reason]).set(count);
                counted.push((namespace, reason));
            }
        }
    }
}

/// Deleting what is gone is done.
fn ignore_gone<T>(deleted: kube::Result<T>) -> kube::Result<()> {
    match deleted {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        // Another object of that name: ours is gone.
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
        Err(error) => Err(error),
    }
}
