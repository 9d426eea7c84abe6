//! Why the cluster refuses the pods of a Job: Kubernetes says it only in events of that Job.

use finetune_api::FineTuneJob;
use k8s_openapi::{api::core::v1::Event, jiff::Timestamp};
use kube::{Api, ResourceExt, api::ListParams};
use tracing::warn;

use super::{context::Context, observe::Observed};

/// The most events of one Job that are read.
const LIMIT: u32 = 50;

/// Returns the newest refusal of the pods that the current attempt's Job lacks, if they are overdue.
pub(super) async fn newest(
    context: &Context,
    job: &FineTuneJob,
    observed: &Observed,
    now: Timestamp,
) -> Option<String> {
    let current = observed.job_of(job.status.as_ref()?.attempt.as_ref()?)?;
    observed.pods_due(current).filter(|due| *due <= now)?;
    let namespace = job.namespace().unwrap_or_default();
    let events: Api<Event> = Api::namespaced(context.client.clone(), &namespace);
    let selector = format!("involvedObject.uid={},reason=FailedCreate", current.uid);
    match events.list(&ListParams::default().fields(&selector).limit(LIMIT)).await {
        Ok(events) => events.items.into_iter().max_by_key(time)?.message,
        Err(error) => {
            // It is no reason to stop: the job starts, or waits, all the same.
            warn!(%error, namespace, "the events of a Job could not be read");
            None
        }
    }
}

/// Returns when an event happened last.
fn time(event: &Event) -> Option<Timestamp> {
    let series = event.series.as_ref().and_then(|series| series.last_observed_time.as_ref());
    let last = event.last_timestamp.as_ref().map(|time| time.0);
    last.max(series.map(|time| time.0)).max(event.event_time.as_ref().map(|time| time.0))
}
