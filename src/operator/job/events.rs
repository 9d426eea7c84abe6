//! Events of jobs.

use finetune_api::FineTuneJob;
use kube::{
    Resource,
    runtime::events::{Event, EventType},
};
use tracing::warn;

use super::{context::Context, decide::JobEvent};

/// The longest text of an event.
const NOTE_LIMIT: usize = 1000;

/// Emits an event; that it could not be written is no reason to stop.
pub(super) async fn emit(context: &Context, job: &FineTuneJob, event: JobEvent) {
    let JobEvent { is_warning, reason, mut message } = event;
    message.truncate(message.floor_char_boundary(NOTE_LIMIT));
    let event = Event {
        type_: if is_warning { EventType::Warning } else { EventType::Normal },
        action: reason.as_str().to_owned(),
        reason: reason.as_str().to_owned(),
        note: Some(message),
        secondary: None,
    };
    if let Err(error) = context.recorder.publish(&event, &job.object_ref(&())).await {
        warn!(%error, "an event could not be written");
    }
}
