//! The pods of a Job that has ended, if their watch is behind that of Jobs.
//!
//! The two watches are independent: after an outage the Jobs' list may be there half a minute before
//! the pods'. An attempt that succeeded would then seem to have lost its pod, and be run again.

use finetune_api::FineTuneJob;
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, ResourceExt, api::ListParams};

use super::{
    conditions::is_finished,
    context::{Context, ReconcileError},
    observe::{Observed, ObservedJob, ObservedPod, PodState, observe_pod},
};

/// The label by which Kubernetes knows the pods of a Job.
const CONTROLLER_LABEL: &str = "batch.kubernetes.io/controller-uid";

/// Reads the pods of ended Jobs of this job that are not known to have ended, from the apiserver.
///
/// # Errors
/// If the apiserver does not answer: without the pods it is not known how the attempt ended.
pub(super) async fn read(
    context: &Context,
    job: &FineTuneJob,
    observed: &mut Observed,
) -> Result<(), ReconcileError> {
    // How the last attempt of a finished job ended is decided.
    let status = job.status.as_ref().filter(|status| !is_finished(status));
    let attempt = status.and_then(|status| status.attempt.as_ref());
    let current = attempt.and_then(|attempt| observed.job_of(attempt));
    let Some(uid) = current.filter(|job| is_ahead_of_pods(observed, job)).map(|job| &job.uid)
    else {
        return Ok(());
    };
    let uid = uid.clone();
    let namespace = job.namespace().unwrap_or_default();
    let pods: Api<Pod> = Api::namespaced(context.client.clone(), &namespace);
    let ours = ListParams::default().labels(&format!("{CONTROLLER_LABEL}={uid}"));
    let found = pods.list(&ours).await.map_err(ReconcileError::api("list the pods of a Job"))?;
    observed.pods.retain(|pod| pod.job_uid.as_ref() != Some(&uid));
    observed.pods.extend(found.items.iter().map(observe_pod));
    Ok(())
}

/// Returns whether a Job has ended and one of its pods has not, as far as is known.
fn is_ahead_of_pods(observed: &Observed, job: &ObservedJob) -> bool {
    let has_ended = |pod: &ObservedPod| matches!(pod.state, PodState::Ended { .. });
    job.ended.is_some() && !observed.pods_of(job).into_iter().all(|pod| pod.is_some_and(has_ended))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::read;
    use crate::operator::job::{context::Context, observe::PodState, testing::World};

    /// A context whose apiserver knows these pods, and checks what it is asked.
    fn context(world: &World, pods: serde_json::Value) -> Context {
        let list = json!({"apiVersion": "v1", "kind": "PodList", "metadata": {}, "items": pods});
        world.context(move |request| {
            let query = request.uri().query().unwrap_or_default();
            assert!(query.contains("controller-uid%3Duid-2"), "{query}");
            list.clone()
        })
    }

    #[tokio::test]
    async fn a_success_whose_pod_is_known_late_is_no_loss() {
        let mut world = World::new("  loraConfig: {}\n");
        world.pass_preflight();
        world.settle();
        // The watch of Jobs is ahead: the pod still runs, or was never seen.
        world.observed.jobs.last_mut().unwrap().ended = Some(true);
        let ended = json!([{
            "metadata": {
                "name": "minimal-0-abcde", "uid": "pod",
                "ownerReferences": [{
                    "apiVersion": "batch/v1", "kind": "Job", "name": "minimal-0", "uid": "uid-2",
                    "controller": true,
                }],
            },
            "status": {"phase": "Succeeded", "containerStatuses": [{
                "name": "trainer", "image": "", "imageID": "", "ready": false, "restartCount": 0,
                "state": {"terminated": {"exitCode": 0, "message": "a report"}},
            }]},
        }]);
        for is_seen in [true, false] {
            let mut observed = world.observed.clone();
            if !is_seen {
                observed.pods.pop();
            }
            read(&context(&world, ended.clone()), &world.job, &mut observed).await.unwrap();
            let message = match &observed.pods.last().unwrap().state {
                PodState::Ended { code: Some(0), message, .. } => message.clone(),
                other => panic!("{other:?}"),
            };
            assert_eq!((observed.pods.len(), &*message), (2, "a report"));
        }
        // If it is gone there too, it is.
        let mut observed = world.observed.clone();
        read(&context(&world, json!([])), &world.job, &mut observed).await.unwrap();
        assert_eq!(observed.pods.len(), 1);
    }
}
