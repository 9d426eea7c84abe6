//! Runs over several pods.

use finetune_contract::{ArtifactKind, FailureReason, Outcome};

use crate::operator::job::{
    conditions::{Kind, find},
    decide::Action,
    observe::PodState,
    testing::World,
};

#[test]
fn a_run_over_two_pods_is_one_job_of_two() {
    let mut world = World::of_two_ranks();
    let status = world.job.status.clone().unwrap();
    let planned = find(&status, Kind::Planned).unwrap();
    insta::assert_snapshot!(planned.message, @"Full over 2 ranks, each on one cpu with 1.74 GB, about 16 min; see status.plan.summary");
    let summary = status.plan.unwrap().summary;
    insta::assert_snapshot!(summary.lines().next().unwrap(), @"On 2 pods of cpu, each 2 CPU, 2.38 GB memory, 4.84 GB storage");
    assert_eq!(world.observed.jobs.last().unwrap().ranks, 2);
    assert_eq!(world.shared, ["Service ranks-minimal".to_owned()].into());
    let report = world.success_report(ArtifactKind::FullModel, world.output());
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
fn an_attempt_of_several_ranks_ends_by_its_cause() {
    let planned = World::of_two_ranks();
    let failed = |reason| planned.report(Outcome::Failed { reason, message: "why".to_owned() });
    let lost = failed(FailureReason::PeerLost);
    let store = failed(FailureReason::StoreUnavailable);
    let data = failed(FailureReason::InvalidDataset);
    let stopped = planned.report(Outcome::Interrupted { checkpoint_step: 3 });
    // What each rank left, none if its pod is gone; what follows, and what its message contains.
    let (evicted, gone) = (Some((-1, "")), None);
    for (first, second, summary, budgets, expected) in [
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
        assert_eq!((world.summary().as_str(), world.budgets()), (summary, budgets), "{expected}");
        assert!(world.message().contains(expected), "{expected}: {}", world.message());
    }
}

#[test]
fn ranks_that_wait_for_a_lost_one_are_terminated() {
    let mut world = World::of_two_ranks();
    world.end_rank(1, 65, "");
    let decision = world.settle();
    assert_eq!(world.observed.pods.len(), 3, "it may still say what it saw");
    assert!(decision.requeue_after.is_some_and(|wait| wait.as_secs() <= 60));
    world.wait(60);
    let decision = world.decide();
    let [Action::DeletePod { uid, .. }] = decision.actions.as_slice() else {
        panic!("{:?}", decision.actions)
    };
    assert_eq!(uid, "pod-uid-2-0");
    // Without a trace: at once.
    let mut world = World::of_two_ranks();
    world.observed.pods.pop();
    world.observed.jobs.last_mut().unwrap().has_failed_rank = true;
    let decision = world.decide();
    assert!(matches!(decision.actions.as_slice(), [Action::DeletePod { .. }]));
}

#[test]
fn an_unschedulable_rank_is_named() {
    let mut world = World::of_two_ranks();
    let pod = world.observed.pods.last_mut().unwrap();
    pod.state = PodState::Unschedulable("0/1 nodes are available".to_owned());
    world.settle();
    assert_eq!(world.summary(), "Unknown Unschedulable");
    insta::assert_snapshot!(world.message(), @"pod 1 of 2, for which the others wait: 0/1 nodes are available");
}

#[test]
fn pods_of_a_gang_report_what_lacks() {
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
            insta::assert_snapshot!(world.message(), @"none of 2 pods has a node yet, and the run needs all of them: 0/1 nodes are available: 1 Insufficient finetune.dev/test-slot");
        }
    }
}
