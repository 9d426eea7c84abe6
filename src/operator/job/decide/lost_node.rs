//! Pods that hang on a node which does not answer.

use finetune_contract::Reason;
use k8s_openapi::jiff::SignedDuration;

use super::{Input, state::InProgress};
use crate::operator::job::observe::{ObservedPod, PodState};

/// How much later than it should a pod may be gone before its node counts as lost.
const NODE_GRACE: SignedDuration = SignedDuration::from_secs(60);

/// If a pod should be gone by now, its node does not answer: nothing goes on until somebody acts.
pub(super) fn report<'a>(
    input: &Input<'_>,
    pods: impl Iterator<Item = &'a ObservedPod>,
    state: InProgress,
) -> InProgress {
    let due = |pod: &'a ObservedPod| Some((pod.deletion_timestamp? + NODE_GRACE, pod));
    let leaving = pods.filter(|pod| !matches!(pod.state, PodState::Ended { .. })).filter_map(due);
    let Some((due, pod)) = leaving.min_by_key(|(due, _)| *due) else { return state };
    if input.now < due {
        let waits = [Some(input.until(due)), state.requeue_after].into_iter().flatten();
        return InProgress { requeue_after: waits.min(), ..state };
    }
    let node = pod.node.as_deref().unwrap_or("unknown");
    let message = format!(
        "the pod {} should have been gone by {}: its node {node} does not answer. If the node is lost, delete its Node object, or the pod with --force, and the run goes on elsewhere",
        pod.name,
        due - NODE_GRACE
    );
    state.with_summary(Reason::NodeUnreachable, message)
}
