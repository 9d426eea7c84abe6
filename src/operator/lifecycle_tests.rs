//! A job's life, told by a small world that does what is decided.

use std::collections::BTreeSet;

use finetune_contract::{
    ArtifactKind, CONTRACT_VERSION, FailureReason, Outcome, OutputState, PreflightReport, Problem,
    ProblemReason, Progress, Proof, PublishedResult, RunConfig, RunId, RunReport, Stage,
    StoppedEarly, decisive_settings, parse, render, settings_text,
};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::ResourceExt;

use super::{
    super::{
        conditions::{Kind, find},
        observe::{Observed, ObservedJob, ObservedPod, PodState},
        settings::Settings,
    },
    Action, Decision, decide,
};
use crate::{
    api::FineTuneJob,
    manifest,
    plan::{fixture, settings::sha256_hex},
};

const SETTINGS: &str = "trainerImage: trainer:1\naccelerators:\n- {name: cpu, cpu: 2, memoryGiB: 4, bf16Tflops: 0.5, fp32Tflops: 0.2, hasBf16: true}\n- {name: a100, resourceName: nvidia.com/gpu, memoryGiB: 80, bf16Tflops: 312, fp32Tflops: 19, hasBf16: true}\nretries: 2\ndisruptions: 2\n";

/// A cluster of one job: actions take effect at once, pods end when a test says so.
struct World {
    job: FineTuneJob,
    observed: Observed,
    settings: Settings,
    now: Timestamp,
    next_uid: u32,
    writes: u32,
    shared: BTreeSet<String>,
}

impl World {
    fn new(lines: &str) -> Self {
        let text = include_str!("../../examples/minimal.yaml").replace("file:///", "s3://");
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

    /// Visits until nothing changes, as watches would make it.
    fn settle(&mut self) -> Decision {
        for _ in 0..20 {
            let decision = decide(&self.job, &self.observed, &self.settings, self.now);
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

    fn settle_once(&self) -> Decision {
        decide(&self.job, &self.observed, &self.settings, self.now)
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
                assert!(self.observed.job(&job.name_any()).is_none(), "made twice");
                let uid = format!("uid-{}", self.next_uid);
                let completions = job.spec.as_ref().and_then(|spec| spec.completions);
                let ranks = completions.unwrap_or(1).unsigned_abs();
                self.observed.jobs.push(ObservedJob {
                    name: job.name_any(),
                    uid: uid.clone(),
                    owner_uid: Some("job-uid".to_owned()),
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
                    ip: Some("10.0.0.1".to_owned()),
                    ended: None,
                    is_deleting: false,
                    is_disrupted: false,
                    state: PodState::Running,
                };
                self.observed.pods.extend((0..ranks).map(pod));
            }
            Action::DeleteJob { uid, .. } => {
                self.observed.jobs.retain(|job| job.uid != *uid);
                self.observed.pods.retain(|pod| pod.job_uid.as_ref() != Some(uid));
            }
            Action::DeletePod { uid, .. } => self.observed.pods.retain(|pod| pod.uid != *uid),
            Action::DeleteSelf => {}
        }
    }

    /// Ends the newest pod and its Job.
    fn end(&mut self, code: Option<i32>, message: &str) {
        let job = self.observed.jobs.last_mut().unwrap();
        job.ended = Some(code == Some(0));
        let pod = self.observed.pods.last_mut().unwrap();
        pod.state = PodState::Ended {
            code,
            is_out_of_memory: code == Some(137),
            message: message.to_owned(),
        };
    }

    /// Ends the pod of one rank of the newest Job; the Job goes on.
    fn end_rank(&mut self, rank: u32, code: i32, message: &str) {
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
    fn of_two_ranks() -> Self {
        let mut world = Self::new("  training: {contextLength: 256}\n");
        world.settings.accelerators[0].memory_gi_b = 2.5;
        world.pass_preflight();
        world.settle();
        world
    }

    fn pass_preflight(&mut self) {
        self.settle();
        let report = fixture::report(fixture::smollm2(), 1_000_000_000);
        self.end(Some(0), &render(&report));
    }

    fn wait(&mut self, seconds: i64) {
        self.now += SignedDuration::from_secs(seconds);
    }

    fn report(outcome: Outcome) -> String {
        render(&RunReport {
            version: CONTRACT_VERSION,
            run_id: RunId("r".to_owned()),
            attempt: 0,
            outcome,
            steps: 10,
            tokens_seen: 100,
            rows_left_out: None,
            resumed_from_step: None,
            train_loss: Some([3.0, 1.0]),
            eval_loss: None,
            best_step: None,
            stopped_early: None,
            bf16_kernel: None,
            tokens_per_second: None,
            duration_seconds: 1.0,
            predicted_peak_bytes: 2,
            measured_peak_bytes: 1,
            predicted_sent_bytes: None,
            measured_sent_bytes: None,
        })
    }

    fn succeed(&mut self) {
        let proof =
            Proof { files: 3, bytes: 10, max_logit_change: 1.0, loss_trained_and_reloaded: None };
        let report = Self::report(Outcome::Succeeded {
            kind: ArtifactKind::Adapter,
            uri: "s3://bucket/out".to_owned(),
            manifest_sha256: "0".repeat(64),
            proof,
        });
        self.end(Some(0), &report);
    }

    fn condition(&self, kind: Kind) -> String {
        let status = self.job.status.clone().unwrap_or_default();
        let condition = find(&status, kind).unwrap();
        format!("{} {}", condition.status, condition.reason)
    }

    fn summary(&self) -> String {
        self.condition(Kind::Succeeded)
    }

    fn message(&self) -> String {
        let status = self.job.status.clone().unwrap_or_default();
        find(&status, Kind::Succeeded).unwrap().message.clone()
    }

    fn tries(&self) -> (i32, i32, i32) {
        let attempt = self.job.status.as_ref().unwrap().attempt.clone().unwrap();
        (attempt.number, attempt.failures, attempt.disruptions)
    }
}

#[test]
fn a_life_without_trouble_takes_few_writes() {
    let mut world = World::new("  loraConfig: {}\n");
    world.settle();
    assert_eq!(world.summary(), "Unknown Preflight");
    world.pass_preflight();
    world.settle();
    assert_eq!(world.condition(Kind::Planned), "True Planned");
    assert_eq!(world.summary(), "Unknown Starting");
    let plan = world.job.status.as_ref().unwrap().plan.clone().unwrap();
    assert_eq!((plan.method.as_str(), plan.accelerator.as_str()), ("LoRA", "cpu"));
    let told: RunConfig = parse(&plan.run_config).unwrap();
    world.observed.progress = Some(Progress {
        version: CONTRACT_VERSION,
        run_id: told.run_id,
        stage: Stage::Training,
        step: 5,
        total_steps: 10,
        epoch: 0.5,
        loss: Some(2.0),
        eval_loss: None,
        learning_rate: None,
        grad_norm: None,
        tokens_per_second: Some(100.0),
        tokens_seen: 50,
        eta_seconds: Some(120),
        peak_memory_bytes: 1,
        checkpoint_step: None,
        checkpoint_stall_seconds: None,
        checkpoint_write_seconds: None,
        resumed_from_step: None,
    });
    let decision = world.settle();
    assert_eq!(decision.look_again, Some(super::PROGRESS_INTERVAL));
    assert_eq!(world.summary(), "Unknown Training");
    world.observed.progress = None;
    world.settle();
    let progress = world.job.status.as_ref().unwrap().progress.clone().unwrap();
    assert_eq!((progress.step, progress.eta.as_deref()), (5, Some("2 min")));
    world.succeed();
    let decision = world.settle();
    assert_eq!(decision.look_again, None, "a finished job is left alone");
    assert_eq!(world.summary(), "True Succeeded");
    assert_eq!(world.condition(Kind::Published), "True Proven");
    assert_eq!(world.observed.jobs.len(), 2);
    // Two events come to these.
    assert!(world.writes <= 8, "{} writes", world.writes);
}

#[test]
fn a_result_of_a_run_that_ended_early_says_so() {
    let mut world = World::new("  loraConfig: {}\n  training: {maxTimeSeconds: 60}\n");
    world.pass_preflight();
    world.settle();
    let plan = world.job.status.as_ref().unwrap().plan.clone().unwrap();
    assert_eq!(parse::<RunConfig>(&plan.run_config).unwrap().training.max_time_seconds, Some(60));
    world.succeed();
    let pod = world.observed.pods.last_mut().unwrap();
    let PodState::Ended { message, .. } = &mut pod.state else { panic!("it has not ended") };
    let mut report: RunReport = parse(message).unwrap();
    report.stopped_early = Some(StoppedEarly::Time);
    *message = render(&report);
    world.settle();
    assert_eq!(world.summary(), "True Succeeded");
    insta::assert_snapshot!(world.message(), @"Adapter at s3://bucket/out, read back and proven; ended by training.maxTimeSeconds after 10 of 111 steps");
}

#[test]
fn problems_of_the_preflight_end_it_and_no_training_pod_is_made() {
    let mut world = World::new("");
    world.settle();
    let mut report = fixture::report(fixture::smollm2(), 1);
    report.problems = vec![Problem {
        reason: ProblemReason::InvalidDataset,
        location: "train.jsonl:3".to_owned(),
        message: "is not JSON".to_owned(),
    }];
    report.problems_total = 7;
    world.end(Some(65), &render(&report));
    world.settle();
    assert_eq!(world.summary(), "False InvalidDataset");
    assert_eq!(world.condition(Kind::Accepted), "False InvalidDataset");
    assert_eq!(world.message(), "train.jsonl:3: is not JSON\nand 6 more");
    assert_eq!(world.observed.jobs.len(), 1);
}

#[test]
fn a_store_that_does_not_answer_is_asked_again_later() {
    let mut world = World::new("");
    world.settle();
    let mut report = fixture::report(fixture::smollm2(), 1);
    report.problems = vec![Problem {
        reason: ProblemReason::Unavailable,
        location: "s3://b".to_owned(),
        message: "timed out".to_owned(),
    }];
    for (tries, wait) in [(1, 10), (2, 20)] {
        world.end(Some(69), &render(&report));
        let decision = world.settle();
        assert_eq!(world.summary(), "Unknown Retrying");
        assert_eq!(world.tries(), (tries, tries, 0));
        assert_eq!(decision.look_again.map(|wait| wait.as_secs()), Some(wait));
        world.wait(wait as i64);
        world.settle();
        assert_eq!(world.summary(), "Unknown Preflight");
    }
    world.end(Some(69), &render(&report));
    world.settle();
    assert_eq!(world.summary(), "False StoreUnavailable");
    assert!(world.message().contains("try 3 of 3"), "{}", world.message());
}

#[test]
fn what_the_cluster_ends_goes_on_and_has_a_budget_of_its_own() {
    let mut world = World::new("  loraConfig: {}\n");
    world.pass_preflight();
    world.settle();
    // Evicted: the pod says so.
    world.observed.pods.last_mut().unwrap().is_disrupted = true;
    world.end(Some(75), "");
    world.settle();
    assert_eq!(world.tries(), (1, 0, 1));
    world.wait(2);
    world.settle();
    // Deleted by hand, Job and pod.
    world.observed.jobs.pop();
    world.observed.pods.pop();
    world.settle();
    assert_eq!(world.tries(), (2, 0, 2));
    assert!(world.message().contains("its Job was deleted"), "{}", world.message());
    world.wait(2);
    world.settle();
    // Drained: the pod is gone without a trace.
    world.observed.jobs.last_mut().unwrap().ended = Some(false);
    world.observed.pods.pop();
    world.settle();
    assert_eq!(world.summary(), "False TooManyDisruptions");
}

#[test]
fn a_pod_that_outlived_its_job_is_ended_before_another_starts() {
    let mut world = World::new("  loraConfig: {}\n");
    world.pass_preflight();
    world.settle();
    world.observed.jobs.pop();
    let decision = decide(&world.job, &world.observed, &world.settings, world.now);
    world.job.status = Some(decision.status);
    world.wait(2);
    let decision = decide(&world.job, &world.observed, &world.settings, world.now);
    assert!(
        matches!(decision.actions.as_slice(), [Action::DeletePod { .. }]),
        "{:?}",
        decision.actions
    );
    world.settle();
    assert_eq!(world.observed.pods.len(), 2, "the preflight's and the new one");
}

#[test]
fn failures_are_repeated_or_not_by_their_kind() {
    let failed = |reason, message: &str| Outcome::Failed { reason, message: message.to_owned() };
    for (reason, code, expected) in [
        (FailureReason::StoreUnavailable, 69, "Unknown Retrying"),
        (FailureReason::Diverged, 65, "False Diverged"),
        (FailureReason::OutputExists, 78, "False OutputExists"),
        (FailureReason::OutOfMemory, 71, "Unknown Adapted"),
    ] {
        let mut world = World::new("");
        world.pass_preflight();
        world.settle();
        let report = World::report(failed(reason, "why"));
        world.end(Some(code), &report);
        world.settle();
        assert_eq!(world.summary(), expected, "{reason:?}");
    }
    for (code, expected) in
        [(139, "Unknown Retrying"), (137, "Unknown Adapted"), (71, "Unknown Adapted")]
    {
        let mut world = World::new("");
        world.pass_preflight();
        world.settle();
        world.end(Some(code), "");
        world.settle();
        assert_eq!(world.summary(), expected, "{code}");
    }
}

#[test]
fn too_little_memory_makes_the_pieces_smaller_and_ends_with_what_is_missing() {
    let mut world = World::new("  loraConfig: {}\n");
    world.pass_preflight();
    world.settle();
    let told = |world: &World| -> RunConfig {
        let plan = world.job.status.as_ref().unwrap().plan.clone().unwrap();
        parse(&plan.run_config).unwrap()
    };
    let first = told(&world);
    assert_eq!(first.training.micro_batch_size, 8);
    world.end(Some(137), "");
    let decision = world.settle();
    assert_eq!(world.summary(), "Unknown Adapted");
    insta::assert_snapshot!(world.message(), @"from try 2 on: trainBatchSizePerDevice 4 instead of 8, gradientAccumulationSteps 4 instead of 2: 16 sequences a step and the same result, in 583 MB instead of 967 MB, because the kernel ended the trainer at its limit of 1.68 GB");
    assert_eq!(world.condition(Kind::Planned), "True Adapted");
    let plan = world.job.status.as_ref().unwrap().plan.clone().unwrap();
    assert!(plan.summary.contains("\nAdapted\n  from try 2 on: "), "{}", plan.summary);
    assert_eq!(
        plan.predicted_peak_bytes,
        i64::try_from(told(&world).predicted_peak_bytes).unwrap()
    );
    assert_eq!(decision.look_again.map(|wait| wait.as_secs()), Some(2));
    // The checkpoint's run goes on: the same name, the same sequences a step.
    let second = told(&world);
    assert_eq!((second.training.micro_batch_size, second.run_id), (4, first.run_id.clone()));
    world.wait(2);
    world.settle();
    assert_eq!(world.summary(), "Unknown Starting");
    assert_eq!(world.condition(Kind::Planned), "True Adapted", "it stays to be read");
    // A trainer that says so itself, and then the kernel each time: it ends, and costs no retry.
    let failed = Outcome::Failed {
        reason: FailureReason::OutOfMemory,
        message: "the device ran out of memory".to_owned(),
    };
    world.end(Some(71), &World::report(failed));
    world.settle();
    let mut tries = 2;
    while world.summary() == "Unknown Adapted" {
        assert_eq!(world.tries(), (tries, 0, 0));
        assert_eq!(told(&world).global_batch_size(), first.global_batch_size());
        world.wait(2);
        world.settle();
        let ranks = told(&world).parallelism.world_size;
        assert_eq!(world.observed.jobs.last().unwrap().ranks, ranks);
        world.observed.jobs.last_mut().unwrap().ended = Some(false);
        for rank in 0..ranks {
            world.end_rank(rank, 137, "");
        }
        world.settle();
        tries += 1;
    }
    assert_eq!(world.summary(), "False OutOfMemory");
    insta::assert_snapshot!(world.message(), @"the kernel ended the trainer at its limit of 1.68 GB, and no way is left to make its micro-batches smaller: 190 MB are predicted, and the limit of 1.68 GB, 1.49 GB above that, was too little. Lower training.contextLength, or set resources.limits.memory");
}

#[test]
fn a_limit_below_all_that_is_predicted_is_not_tried_again() {
    let mut world = World::new(
        "  loraConfig: {}\n  training: {trainBatchSizePerDevice: 8}\n  resources: {limits: {memory: 24Mi}}\n",
    );
    world.pass_preflight();
    world.settle();
    world.end(Some(137), "");
    world.settle();
    assert_eq!(world.summary(), "False OutOfMemory");
    insta::assert_snapshot!(world.message(), @"the kernel ended the trainer at its limit of 25 MB, and no way is left to make its micro-batches smaller: the least it needs is 190 MB, 164 MB more than the limit of 25 MB. Lower training.contextLength, or set resources.limits.memory");
}

#[test]
fn a_plan_waits_for_approval_and_does_not_change_meanwhile() {
    let mut world = World::new("  loraConfig: {}\n  approval: Manual\n");
    world.pass_preflight();
    world.settle();
    assert_eq!(world.summary(), "Unknown AwaitingApproval");
    let plan = world.job.status.as_ref().unwrap().plan.clone();
    world.settings.accelerators[0].memory_gi_b = 2.0;
    world.job.spec.approval = Some(crate::api::Approval::Auto);
    world.settle();
    assert_eq!(world.summary(), "Unknown Starting");
    assert_eq!(world.job.status.as_ref().unwrap().plan, plan);
}

#[test]
fn suspended_it_gives_its_pod_back_and_goes_on_later() {
    let mut world = World::new("  loraConfig: {}\n");
    world.pass_preflight();
    world.settle();
    world.job.spec.suspend = Some(true);
    world.settle();
    assert_eq!(world.summary(), "Unknown Suspended");
    assert_eq!(world.condition(Kind::Suspended), "True Suspended");
    assert_eq!(world.observed.jobs.len(), 1, "the preflight's stays to be read");
    world.job.spec.suspend = Some(false);
    world.settle();
    assert_eq!(world.tries(), (1, 0, 0), "a wish is neither failure nor disruption");
    assert_eq!(world.summary(), "Unknown Starting");
}

#[test]
fn a_deadline_ends_it() {
    let mut world = World::new("  loraConfig: {}\n  activeDeadlineSeconds: 60\n");
    world.pass_preflight();
    let decision = world.settle();
    assert!(decision.look_again.is_some_and(|wait| wait.as_secs() <= 60));
    world.wait(60);
    world.settle();
    assert_eq!(world.summary(), "False DeadlineExceeded");
    assert!(world.observed.jobs.iter().all(|job| job.ended.is_some()), "nothing runs on");
}

#[test]
fn a_finished_job_is_deleted_when_its_time_is_over() {
    let mut world = World::new("  loraConfig: {}\n  ttlSecondsAfterFinished: 30\n");
    world.pass_preflight();
    world.settle();
    world.succeed();
    let decision = world.settle();
    assert_eq!(decision.look_again.map(|wait| wait.as_secs()), Some(30));
    world.wait(30);
    let decision = decide(&world.job, &world.observed, &world.settings, world.now);
    assert_eq!(decision.actions, [Action::DeleteSelf]);
}

#[test]
fn too_large_a_run_is_held_or_ended_by_what_would_help() {
    let large = |lines: &str, accelerators: usize| {
        let mut world = World::new(lines);
        world.settings.accelerators.truncate(accelerators);
        world.settle();
        let report = fixture::report(fixture::llama_8b(), 1);
        world.end(Some(0), &render(&report));
        world.settle();
        world.summary()
    };
    assert_eq!(large("", 2), "Unknown TrainerImageMissing");
    assert_eq!(large("", 1), "False NoAcceleratorFits");
    assert_eq!(large("  loraConfig: {}\n", 2), "Unknown TrainerImageMissing");
    assert_eq!(large("  loraConfig: {}\n", 1), "False NoAcceleratorFits");
}

#[test]
fn a_run_that_two_pods_hold_is_one_job_of_two() {
    let mut world = World::of_two_ranks();
    let status = world.job.status.clone().unwrap();
    let planned = find(&status, Kind::Planned).unwrap();
    insta::assert_snapshot!(planned.message, @"Full over 2 ranks, each on one cpu with 1.74 GB, about 16 min; see status.plan.summary");
    let summary = status.plan.unwrap().summary;
    insta::assert_snapshot!(summary.lines().next().unwrap(), @"On 2 pods of cpu, each 2 CPU, 2.38 GB memory, 4.84 GB storage");
    assert_eq!(world.observed.jobs.last().unwrap().ranks, 2);
    assert_eq!(world.shared, ["Service ranks-minimal".to_owned()].into());
    let report = World::report(Outcome::Succeeded {
        kind: ArtifactKind::FullModel,
        uri: "s3://bucket/out".to_owned(),
        manifest_sha256: "0".repeat(64),
        proof: Proof {
            files: 3,
            bytes: 10,
            max_logit_change: 1.0,
            loss_trained_and_reloaded: None,
        },
    });
    // The others end first, with nothing to say.
    world.end_rank(1, 0, "");
    world.settle();
    assert_eq!(world.summary(), "Unknown Starting");
    world.end_rank(0, 0, &report);
    world.observed.jobs.last_mut().unwrap().ended = Some(true);
    world.settle();
    assert_eq!(world.summary(), "True Succeeded");
    assert!(world.writes <= 8, "{} writes", world.writes);
}

#[test]
fn ranks_of_a_confined_namespace_get_a_way_to_each_other() {
    let mut world = World::new("  training: {contextLength: 256}\n");
    world.settings.accelerators[0].memory_gi_b = 2.5;
    world.settings.confined_namespaces = vec!["other".to_owned(), "team".to_owned()];
    world.pass_preflight();
    world.settle();
    assert!(world.shared.contains("NetworkPolicy ranks-minimal"), "{:?}", world.shared);
}

#[test]
fn a_try_of_several_ranks_ends_by_its_cause() {
    let failed = |reason| World::report(Outcome::Failed { reason, message: "why".to_owned() });
    let lost = failed(FailureReason::PeerLost);
    let store = failed(FailureReason::StoreUnavailable);
    let data = failed(FailureReason::InvalidDataset);
    let stopped = World::report(Outcome::Interrupted { checkpoint_step: 3 });
    // What each rank left, none if its pod is gone; what follows, and what is said of it.
    let (evicted, gone) = (Some((-1, "")), None);
    for (first, second, summary, tries, said) in [
        (Some((76, &*lost)), Some((137, "")), "Unknown Adapted", (1, 0, 0), "the trainer of pod 1"),
        (Some((137, "")), Some((76, &*lost)), "Unknown Adapted", (1, 0, 0), "the trainer of pod 0"),
        (Some((76, &*lost)), Some((65, &*data)), "False InvalidDataset", (0, 0, 0), "why"),
        (Some((69, &*store)), Some((76, &*lost)), "Unknown Retrying", (1, 1, 0), "why"),
        (Some((76, &*lost)), evicted, "Unknown Retrying", (1, 0, 1), "its pod 1"),
        (Some((76, &*lost)), gone, "Unknown Retrying", (1, 0, 1), "its pod 1 is gone"),
        (Some((75, &*stopped)), gone, "Unknown Retrying", (1, 0, 1), "its pod 1 is gone"),
        (Some((75, &*stopped)), Some((75, &*stopped)), "Unknown Retrying", (1, 0, 1), "step 3"),
        // Nobody died: what is between them did.
        (Some((76, &*lost)), Some((76, &*lost)), "Unknown Retrying", (1, 1, 0), "why"),
    ] {
        let mut world = World::of_two_ranks();
        for (rank, left) in [(0, first), (1, second)] {
            match left {
                Some((-1, _)) => {
                    world.end_rank(rank, 143, "");
                    world.observed.pods.last_mut().unwrap().is_disrupted = true;
                }
                Some((code, message)) => world.end_rank(rank, code, message),
                None => drop(world.observed.pods.pop()),
            }
        }
        world.observed.jobs.last_mut().unwrap().ended = Some(false);
        world.settle();
        assert_eq!((world.summary().as_str(), world.tries()), (summary, tries), "{said}");
        assert!(world.message().contains(said), "{said}: {}", world.message());
    }
}

#[test]
fn ranks_that_wait_for_a_lost_one_are_ended() {
    let mut world = World::of_two_ranks();
    world.end_rank(1, 65, "");
    let decision = world.settle();
    assert_eq!(world.observed.pods.len(), 3, "it may still say what it saw");
    assert!(decision.look_again.is_some_and(|wait| wait.as_secs() <= 60));
    world.wait(60);
    let decision = decide(&world.job, &world.observed, &world.settings, world.now);
    let [Action::DeletePod { uid, .. }] = decision.actions.as_slice() else {
        panic!("{:?}", decision.actions)
    };
    assert_eq!(uid, "pod-uid-2-0");
    // Without a trace: at once.
    let mut world = World::of_two_ranks();
    world.observed.pods.pop();
    world.observed.jobs.last_mut().unwrap().has_failed_rank = true;
    let decision = decide(&world.job, &world.observed, &world.settings, world.now);
    assert!(matches!(decision.actions.as_slice(), [Action::DeletePod { .. }]));
}

#[test]
fn a_rank_without_a_place_is_named() {
    let mut world = World::of_two_ranks();
    let pod = world.observed.pods.last_mut().unwrap();
    pod.state = PodState::Unschedulable("0/1 nodes are available".to_owned());
    world.settle();
    assert_eq!(world.summary(), "Unknown Unschedulable");
    insta::assert_snapshot!(world.message(), @"pod 1 of 2, for which the others wait: 0/1 nodes are available");
}

#[test]
fn pods_that_are_placed_together_say_what_lacks() {
    // The words of Kubernetes 1.36 where the node has one slot and two pods ask for one each.
    let waits = "pod group is unschedulable, waiting for minCount pods from a gang to be scheduled, one or more plugins asked to wait and no plugin rejected pod";
    let lacks = "0/1 nodes are available: 1 Insufficient finetune.dev/test-slot";
    for words in [[waits, lacks], [lacks, waits]] {
        let mut world = World::of_two_ranks();
        for (pod, words) in world.observed.pods.iter_mut().rev().zip(words) {
            pod.scheduled = None;
            pod.state = PodState::Unschedulable(words.to_owned());
        }
        world.settle();
        assert_eq!(world.summary(), "Unknown Unschedulable");
        insta::allow_duplicates! {
            insta::assert_snapshot!(world.message(), @"none of 2 pods has a node yet, and the run needs them all: 0/1 nodes are available: 1 Insufficient finetune.dev/test-slot");
        }
    }
}

#[test]
fn a_queue_decides_when_the_pod_starts() {
    let mut world = World::new("  loraConfig: {}\n");
    world.job.metadata.labels =
        Some([(super::QUEUE_LABEL.to_owned(), "research".to_owned())].into());
    world.pass_preflight();
    world.settle();
    assert_eq!(world.summary(), "Unknown Queued");
    world.observed.jobs.last_mut().unwrap().is_suspended = false;
    world.settle();
    assert_eq!(world.summary(), "Unknown Starting");
}

#[test]
fn an_image_that_is_not_there_is_said_at_once_and_given_up_later() {
    let mut world = World::new("  loraConfig: {}\n");
    world.settle();
    world.observed.pods.last_mut().unwrap().state = PodState::Waiting {
        reason: "ImagePullBackOff".to_owned(),
        message: "not found".to_owned(),
    };
    world.settle();
    assert_eq!(world.summary(), "Unknown ImagePullFailed");
    world.wait(600);
    world.settle();
    assert_eq!(world.summary(), "False ImagePullFailed");
    assert!(world.observed.jobs.is_empty());
}

#[test]
fn a_job_that_may_not_be_is_said_and_tried_again() {
    let mut world = World::new("  loraConfig: {}\n");
    world.observed.refusal = Some("exceeded quota".to_owned());
    let decision = decide(&world.job, &world.observed, &world.settings, world.now);
    assert!(matches!(decision.actions.as_slice(), [Action::CreateJob(_)]));
    let condition = find(&decision.status, Kind::Succeeded).unwrap();
    assert_eq!(
        (condition.reason.as_str(), condition.message.as_str()),
        ("JobRefused", "exceeded quota")
    );
}

#[test]
fn a_report_of_another_release_says_so() {
    let mut world = World::new("");
    world.settle();
    world.end(Some(0), "{\"version\": 2}");
    world.settle();
    assert_eq!(world.summary(), "False TrainerFailed");
    assert!(world.message().contains("same release"), "{}", world.message());
}

#[test]
fn files_of_ones_own_machine_are_refused_before_any_pod() {
    let mut world = World::new("");
    world.job.spec.dataset.train = Some("file:///data/train.jsonl".to_owned());
    world.settle();
    assert_eq!(world.summary(), "False InvalidSpec");
    assert!(world.message().contains("spec.dataset.train"), "{}", world.message());
    assert!(world.observed.jobs.is_empty());
}

#[test]
fn the_report_fits_what_a_preflight_really_writes() {
    let report: PreflightReport = fixture::report(fixture::llama_8b(), 1);
    assert!(render(&report.fit()).len() <= finetune_contract::TERMINATION_MESSAGE_LIMIT);
}

impl World {
    /// Deletes the object and creates it again, as GitOps or `kubectl replace --force` does.
    fn create_again(&mut self, uid: &str) {
        self.job.status = None;
        self.job.metadata.uid = Some(uid.to_owned());
        self.observed = Observed::default();
    }

    fn run_id(&self) -> String {
        self.job.status.as_ref().unwrap().plan.as_ref().unwrap().run_id.clone()
    }

    /// Ends the preflight with a report of what it found at the output.
    fn pass_preflight_with(&mut self, change: impl FnOnce(&mut PreflightReport)) {
        self.settle();
        let mut report = fixture::report(fixture::smollm2(), 1_000_000_000);
        change(&mut report);
        self.end(Some(0), &render(&report));
        self.settle();
    }

    /// Returns what a preflight says of the result that the planned run published.
    fn published(&self) -> PublishedResult {
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

#[test]
fn a_job_created_again_on_the_same_inputs_says_that_nothing_was_trained() {
    let mut world = World::new("  loraConfig: {}\n  ttlSecondsAfterFinished: 60\n");
    world.pass_preflight();
    world.settle();
    let first = world.run_id();
    let published = world.published();
    world.succeed();
    world.settle();
    assert_eq!(world.summary(), "True Succeeded");
    world.wait(61);
    assert!(world.settle_once().actions.contains(&Action::DeleteSelf));

    // However often it is created again: no training pod, and no claim of a proof.
    for uid in ["second", "third"] {
        world.create_again(uid);
        world.pass_preflight_with(|report| {
            report.output = Some(OutputState::SameInputs);
            report.published = Some(published.clone());
        });
        assert_eq!(world.summary(), "True AlreadyPublished");
        assert_eq!(world.condition(Kind::Published), "True AlreadyPublished");
        assert_eq!(world.observed.jobs.len(), 1, "only the preflight's");
        assert_ne!(world.run_id(), first, "it is another run");
        let message = world.message();
        assert!(message.contains("nothing was trained") && message.contains(&first), "{message}");
        assert!(!message.contains("proven"), "{message}");
        let result = world.job.status.as_ref().unwrap().result.clone().unwrap();
        assert_eq!((result.steps, result.uri.as_str()), (10, "s3://data/minimal"));
    }
}

#[test]
fn a_job_created_again_on_refreshed_rows_is_refused_or_replaces_the_result_and_never_claims_it() {
    let other = |report: &mut PreflightReport| report.output = Some(OutputState::OtherInputs);
    let mut world = World::new("  loraConfig: {}\n");
    world.pass_preflight_with(other);
    assert_eq!(world.summary(), "False OutputExists");
    assert_eq!(world.observed.jobs.len(), 1);

    // Every week on a new file.
    world.job.spec.output.overwrite = Some(true);
    let mut runs = BTreeSet::new();
    for uid in ["week-1", "week-2", "week-3"] {
        world.create_again(uid);
        world.pass_preflight_with(other);
        assert_eq!(world.summary(), "Unknown Starting", "it trains");
        runs.insert(world.run_id());
        world.succeed();
        world.settle();
        assert_eq!(world.summary(), "True Succeeded");
        assert_eq!(world.condition(Kind::Published), "True Proven");
    }
    assert_eq!(runs.len(), 3, "each with checkpoints of its own");
}

#[test]
fn a_job_created_again_with_other_settings_does_not_claim_the_result() {
    let mut world = World::new("  loraConfig: {}\n");
    world.pass_preflight();
    world.settle();
    let published = world.published();
    let same_rows = |report: &mut PreflightReport| {
        report.output = Some(OutputState::SameInputs);
        report.published = Some(published.clone());
    };
    world.create_again("second");
    world.job.spec.training = Some(serde_json::from_value(serde_json::json!({"seed": 7})).unwrap());
    world.pass_preflight_with(same_rows);
    assert_eq!(world.summary(), "False OutputExists");
    insta::assert_snapshot!(world.message().replace(&published.run_id.0, "RUN"), @"spec.output.uri: s3://data/minimal holds a result of the same rows and model, made with other settings (by run RUN; they are in its finetune-manifest.json): choose another uri, or set output.overwrite: true to replace it");
    world.create_again("third");
    world.job.spec.output.overwrite = Some(true);
    world.pass_preflight_with(same_rows);
    assert_eq!(world.summary(), "Unknown Starting");
}

#[test]
fn a_job_that_failed_on_bad_rows_trains_when_it_is_created_again() {
    let mut world = World::new("  loraConfig: {}\n");
    world.pass_preflight_with(|report| {
        report.problems = vec![Problem {
            reason: ProblemReason::InvalidDataset,
            location: "train.jsonl:3".to_owned(),
            message: "is not JSON".to_owned(),
        }];
    });
    assert_eq!(world.summary(), "False InvalidDataset");
    world.create_again("second");
    world.pass_preflight();
    world.settle();
    assert_eq!(world.summary(), "Unknown Starting");
}

#[test]
fn a_trainer_that_finds_its_inputs_published_ends_the_run_without_a_proof() {
    let mut world = World::new("  loraConfig: {}\n");
    world.pass_preflight();
    world.settle();
    let report = World::report(Outcome::AlreadyPublished {
        kind: ArtifactKind::Adapter,
        uri: "s3://bucket/out".to_owned(),
        manifest_sha256: "0".repeat(64),
        by: RunId("other-1".to_owned()),
    });
    world.end(Some(0), &report);
    world.settle();
    assert_eq!(world.summary(), "True AlreadyPublished");
    insta::assert_snapshot!(world.message(), @"the same inputs are already published at s3://bucket/out (by run other-1); nothing was trained");
}

#[test]
fn a_run_that_an_earlier_release_planned_keeps_its_id() {
    let mut world = World::new("  loraConfig: {}\n");
    world.pass_preflight();
    world.settle();
    // As it stored it: the id by name and manifest.
    let plan = world.job.status.as_mut().unwrap().plan.as_mut().unwrap();
    let stored = plan.run_config.replace(&plan.run_id, "minimal-813dde86");
    assert_ne!(stored, plan.run_config);
    (plan.run_id, plan.run_config) = ("minimal-813dde86".to_owned(), stored);
    world.observed = Observed::default();
    world.settle();
    // A new try, of the new release, goes on from the checkpoints of the run.
    assert_eq!(world.run_id(), "minimal-813dde86");
    let told = world.job.status.as_ref().unwrap().plan.as_ref().unwrap().run_config.clone();
    let config: RunConfig = parse(&told).unwrap();
    assert_eq!(config.run_id.0, "minimal-813dde86");
    assert!(config.checkpoints_uri.ends_with(".checkpoints/minimal-813dde86"));
    world.wait(3);
    world.settle();
    world.succeed();
    world.settle();
    assert_eq!(world.summary(), "True Succeeded");
}

#[test]
fn an_output_that_touches_an_input_makes_no_pod() {
    for (output, overwrite) in [
        ("s3://data", false),
        ("s3://data/train.jsonl", true),
        ("s3://data/train.jsonl/out/", true),
    ] {
        let mut world = World::new("");
        world.job.spec.output.uri = output.to_owned();
        world.job.spec.output.overwrite = Some(overwrite);
        world.settle();
        assert_eq!(world.summary(), "False InvalidSpec", "{output}");
        assert!(world.observed.jobs.is_empty());
        assert!(world.message().contains("spec.dataset.train"), "{}", world.message());
    }
}
