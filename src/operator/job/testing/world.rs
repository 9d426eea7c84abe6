//! A cluster of one job.

use std::{collections::BTreeSet, convert::Infallible};

use finetune_api::{FineTuneJob, manifest};
use finetune_contract::{
    ArtifactKind, Outcome, PreflightReport, Proof, PublishedResult, RunConfig, RunId, RunReport,
    decisive_settings, parse, render, settings_text, testing::run_report,
};
use finetune_plan::{resolve::sha256_hex, testing};
use http::{Request, Response};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::{Client, ResourceExt, client::Body};

use super::invariants;
use crate::operator::{
    job::{
        build::digest,
        conditions::{Kind, find},
        context::Context,
        decide::{Action, Decision, decide},
        observe::{Observed, ObservedJob, ObservedPod, PodState},
    },
    runtime::metrics::Metrics,
    settings::Settings,
};

const SETTINGS: &str = "trainerImage: trainer:1\naccelerators:\n- {name: cpu, cpu: 2, memoryGiB: 4, bf16Tflops: 0.5, fp32Tflops: 0.2, hasBf16: true}\n- {name: a100, resourceName: nvidia.com/gpu, memoryGiB: 80, bf16Tflops: 312, fp32Tflops: 19, hasBf16: true}\nretries: 2\ndisruptions: 2\nlostNodeTimeoutSeconds: 600\n";

/// A cluster of one job: actions take effect at once, and pods end when a test says so.
pub(crate) struct World {
    pub(crate) job: FineTuneJob,
    pub(crate) observed: Observed,
    pub(crate) settings: Settings,
    pub(crate) now: Timestamp,
    next_uid: u32,
    /// Writes of the operator so far, events left out.
    pub(crate) writes: u32,
    /// The objects that the ranks of a run share.
    pub(crate) shared: BTreeSet<String>,
}

impl World {
    pub(crate) fn new(lines: &str) -> Self {
        let text = include_str!("../../../../examples/minimal.yaml").replace("file:///", "s3://");
        let mut job = manifest::parse(&format!("{text}{lines}")).unwrap();
        job.metadata.namespace = Some("team".to_owned());
        job.metadata.uid = Some("job-uid".to_owned());
        job.metadata.generation = Some(1);
        Self {
            job,
            observed: Observed::default(),
            settings: Settings::parse(SETTINGS).unwrap(),
            now: "2026-01-01T00:00:00Z".parse().unwrap(),
            next_uid: 0,
            writes: 0,
            shared: BTreeSet::new(),
        }
    }

    /// Returns the context of an operator whose apiserver answers each request with `answer`.
    pub(crate) fn context(
        &self,
        answer: impl Fn(&Request<Body>) -> serde_json::Value + Send + 'static,
    ) -> Context {
        let service = tower::service_fn(move |request: Request<Body>| {
            let body = Body::from(answer(&request).to_string().into_bytes());
            async move { Ok::<_, Infallible>(Response::new(body)) }
        });
        let (client, metrics) = (Client::new(service, "team"), Metrics::new().unwrap());
        Context::new(client, self.settings.clone(), metrics, "test").unwrap()
    }

    /// Reconciles until nothing changes, as watches would make it.
    pub(crate) fn settle(&mut self) -> Decision {
        for _ in 0..20 {
            let decision = self.decide();
            let is_quiet =
                self.job.status.as_ref() == Some(&decision.status) && decision.actions.is_empty();
            if is_quiet {
                return decision;
            }
            self.writes += u32::from(self.job.status.as_ref() != Some(&decision.status));
            self.job.status = Some(decision.status.clone());
            for action in &decision.actions {
                self.writes += 1;
                self.act(action);
            }
        }
        panic!("it does not come to rest: {:?}", self.job.status);
    }

    /// Decides once, and checks the decision.
    pub(crate) fn decide(&self) -> Decision {
        let decision = decide(&self.job, &self.observed, &self.settings, self.now);
        invariants::check(&self.job, &self.observed, &self.settings, &decision);
        decision
    }

    fn act(&mut self, action: &Action) {
        match action {
            Action::CreateService(service) => {
                self.shared.insert(format!("Service {}", service.name_any()));
            }
            Action::CreateNetworkPolicy(policy) => {
                self.shared.insert(format!("NetworkPolicy {}", policy.name_any()));
            }
            Action::CreateJob(job) => {
                self.next_uid += 1;
                assert!(self.observed.job(&job.name_any()).is_none(), "created twice");
                let uid = format!("uid-{}", self.next_uid);
                let completions = job.spec.as_ref().and_then(|spec| spec.completions);
                let ranks = completions.unwrap_or(1).unsigned_abs();
                self.observed.jobs.push(ObservedJob {
                    name: job.name_any(),
                    uid: uid.clone(),
                    owner_uid: Some("job-uid".to_owned()),
                    created: Some(self.now),
                    digest: digest::of_pods(job),
                    is_suspended: job.spec.as_ref().and_then(|spec| spec.suspend).unwrap_or(false),
                    is_deleting: false,
                    ended: None,
                    ranks,
                    has_failed_rank: false,
                });
                let pod = |rank| ObservedPod {
                    name: format!("{}-{rank}-abcde", job.name_any()),
                    uid: format!("pod-{uid}-{rank}"),
                    job_uid: Some(uid.clone()),
                    rank,
                    created: Some(self.now),
                    scheduled: Some(self.now),
                    node: Some("node-1".to_owned()),
                    ip: Some("10.0.0.1".to_owned()),
                    ended: None,
                    is_deleting: false,
                    deletion_timestamp: None,
                    is_force_deleted: false,
                    is_disrupted: false,
                    state: PodState::Running,
                };
                self.observed.pods.extend((0..ranks).map(pod));
            }
            Action::DeleteJob { uid, .. } => {
                self.observed.jobs.retain(|job| job.uid != *uid);
                self.observed.pods.retain(|pod| pod.job_uid.as_ref() != Some(uid));
            }
            Action::DeletePod { uid, .. } | Action::ForceDeletePod { uid, .. } => {
                self.observed.pods.retain(|pod| pod.uid != *uid);
            }
            Action::DeleteSelf => {}
        }
    }

    /// Ends the newest pod and its Job.
    pub(crate) fn end(&mut self, code: Option<i32>, message: &str) {
        let job = self.observed.jobs.last_mut().unwrap();
        job.ended = Some(code == Some(0));
        let pod = self.observed.pods.last_mut().unwrap();
        pod.state = PodState::Ended {
            code,
            is_out_of_memory: code == Some(137),
            message: message.to_owned(),
        };
    }

    /// Ends the pod of one rank of the newest Job, which does not end.
    pub(crate) fn end_rank(&mut self, rank: u32, code: i32, message: &str) {
        let ended = Some(self.now);
        let pod = self.observed.pods.iter_mut().rfind(|pod| pod.rank == rank).unwrap();
        pod.state = PodState::Ended {
            code: Some(code),
            is_out_of_memory: code == 137,
            message: message.to_owned(),
        };
        pod.ended = ended;
    }

    /// A full-parameter run that two pods hold and one does not.
    pub(crate) fn of_two_ranks() -> Self {
        let mut world = Self::new("  training: {contextLength: 256}\n");
        world.settings.accelerators[0].memory_gi_b = 2.5;
        world.pass_preflight();
        world.settle();
        world
    }

    pub(crate) fn pass_preflight(&mut self) {
        self.settle();
        let report = testing::report(testing::smollm2(), 1_000_000_000);
        self.end(Some(0), &render(&report));
    }

    pub(crate) fn wait(&mut self, seconds: i64) {
        self.now += SignedDuration::from_secs(seconds);
    }

    /// Returns the report of the current attempt of the planned run.
    pub(crate) fn report(&self, outcome: Outcome) -> String {
        let (attempt, _, _) = self.budgets();
        let run_id = RunId(self.run_id());
        let attempt = attempt.unsigned_abs();
        render(&RunReport { run_id, attempt, ..run_report(outcome) })
    }

    /// Returns the report of a current attempt that published its result.
    pub(crate) fn success_report(&self, kind: ArtifactKind, uri: String) -> String {
        let proof =
            Proof { files: 3, bytes: 10, max_logit_change: 1.0, loss_trained_and_reloaded: None };
        let manifest_sha256 = "0".repeat(64);
        self.report(Outcome::Succeeded { kind, uri, manifest_sha256, proof })
    }

    pub(crate) fn succeed(&mut self) {
        let report = self.success_report(ArtifactKind::Adapter, self.output());
        self.end(Some(0), &report);
    }

    /// Returns a condition's status and reason.
    pub(crate) fn condition(&self, kind: Kind) -> String {
        let status = self.job.status.clone().unwrap_or_default();
        let condition = find(&status, kind).unwrap();
        format!("{} {}", condition.status, condition.reason)
    }

    pub(crate) fn summary(&self) -> String {
        self.condition(Kind::Succeeded)
    }

    pub(crate) fn message(&self) -> String {
        let status = self.job.status.clone().unwrap_or_default();
        find(&status, Kind::Succeeded).unwrap().message.clone()
    }

    /// Returns the current attempt's number, failures and disruptions.
    pub(crate) fn budgets(&self) -> (i32, i32, i32) {
        let attempt = self.job.status.as_ref().unwrap().attempt.clone().unwrap();
        (attempt.number, attempt.failures, attempt.disruptions)
    }

    /// Deletes the object and creates it again, as GitOps or `kubectl replace --force` does.
    pub(crate) fn create_again(&mut self, uid: &str) {
        self.job.status = None;
        self.job.metadata.uid = Some(uid.to_owned());
        self.observed = Observed::default();
    }

    /// Returns where the planned run is published.
    pub(crate) fn output(&self) -> String {
        let status = self.job.status.as_ref().unwrap();
        let config: RunConfig = parse(&status.plan.as_ref().unwrap().run_config).unwrap();
        config.output.uri.to_string()
    }

    pub(crate) fn run_id(&self) -> String {
        self.job.status.as_ref().unwrap().plan.as_ref().unwrap().run_id.clone()
    }

    /// Ends the preflight with a report of what it found at the output.
    pub(crate) fn pass_preflight_with(&mut self, change: impl FnOnce(&mut PreflightReport)) {
        self.settle();
        let mut report = testing::report(testing::smollm2(), 1_000_000_000);
        change(&mut report);
        self.end(Some(0), &render(&report));
        self.settle();
    }

    /// Returns what a preflight says of the result that the planned run published.
    pub(crate) fn published(&self) -> PublishedResult {
        let plan = self.job.status.as_ref().unwrap().plan.clone().unwrap();
        let config: RunConfig = parse(&plan.run_config).unwrap();
        let settings = settings_text(&decisive_settings(&config));
        PublishedResult {
            run_id: config.run_id,
            kind: ArtifactKind::Adapter,
            manifest_sha256: "0".repeat(64),
            settings_sha256: sha256_hex(settings.as_bytes()),
            step: 10,
        }
    }
}
