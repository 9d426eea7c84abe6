//! Pods that hang on a node that does not answer.
//!
//! Kubernetes waits for the kubelet to confirm that a pod is gone, which a lost node never does. If the
//! administrator sets a timeout, the pod is then deleted by force, and the run resumes elsewhere. That is not
//! the default: a node that is only cut off from the apiserver may still train, and nothing in the bucket keeps
//! its pod from writing.

use finetune_contract::Reason;
use k8s_openapi::jiff::SignedDuration;

use super::{Action, Input, state::InProgress};
use crate::operator::job::observe::{ObservedPod, PodState};

/// How much later than it should a pod may be gone before its node counts as lost.
const NODE_GRACE: SignedDuration = SignedDuration::from_secs(60);

/// If a pod should be gone by now, its node does not answer: reports it, and deletes the pod by force when the
/// administrator's timeout is over.
pub(super) fn report<'a>(
    input: &Input<'_>,
    pods: impl Iterator<Item = &'a ObservedPod>,
    mut state: InProgress,
) -> InProgress {
    let has_ended = |pod: &&ObservedPod| matches!(pod.state, PodState::Ended { .. });
    let leaving: Vec<_> = pods
        .filter(|pod| !has_ended(pod))
        .filter_map(|pod| Some((pod.deletion_timestamp?, pod)))
        .collect();
    let Some(&(due, pod)) = leaving.iter().min_by_key(|(due, _)| *due) else { return state };
    let timeout = input.settings.lost_node_timeout_seconds;
    let timeout = (timeout > 0).then(|| SignedDuration::from_secs(timeout));
    let reported = due + timeout.map_or(NODE_GRACE, |timeout| timeout.min(NODE_GRACE));
    if input.now < reported {
        return state.requeue_within(input.until(reported));
    }
    let node = pod.node.as_deref().unwrap_or("unknown");
    let message = format!(
        "the pod {} should have been gone by {due}: its node {node} does not answer",
        pod.name
    );
    let Some(timeout) = timeout else {
        let advice = "If the node is lost, delete its Node object, or the pod with --force, and the run resumes elsewhere";
        return state.with_summary(Reason::NodeUnreachable, format!("{message}. {advice}"));
    };
    let forced = due + timeout;
    let lost =
        leaving.iter().filter(|(due, pod)| input.now >= *due + timeout && !pod.is_force_deleted);
    state.actions.extend(lost.map(|(_, pod)| Action::force_delete_pod(pod)));
    let message = format!(
        "{message}. At {forced} the pod is deleted by force, and the run resumes elsewhere"
    );
    let state = state.with_summary(Reason::NodeUnreachable, message);
    if input.now < forced { state.requeue_within(input.until(forced)) } else { state }
}
