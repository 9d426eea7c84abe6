//! FineTuneJobs that cannot be deserialised: stored by another release's schema, or by hand. One of
//! them must not keep the watch from the others.

use finetune_api::FineTuneJob;
use kube::{
    Resource,
    core::{DeserializeGuard, error_boundary::InvalidObject},
    runtime::watcher::Event,
};
use serde_json::json;
use tracing::error;

/// Passes on the jobs that can be deserialised; one that no longer can is treated as deleted.
pub fn valid_jobs(event: Event<DeserializeGuard<FineTuneJob>>) -> Option<Event<FineTuneJob>> {
    Some(match event {
        Event::Init => Event::Init,
        Event::InitDone => Event::InitDone,
        Event::InitApply(DeserializeGuard(Ok(job))) => Event::InitApply(job),
        Event::InitApply(DeserializeGuard(Err(invalid))) => {
            log_invalid(&invalid);
            return None;
        }
        Event::Apply(DeserializeGuard(Ok(job))) => Event::Apply(job),
        Event::Apply(DeserializeGuard(Err(invalid))) => {
            log_invalid(&invalid);
            Event::Delete(object_stub(invalid)?)
        }
        Event::Delete(DeserializeGuard(Ok(job))) => Event::Delete(job),
        Event::Delete(DeserializeGuard(Err(invalid))) => Event::Delete(object_stub(invalid)?),
    })
}

fn log_invalid(invalid: &InvalidObject) {
    let metadata = &invalid.metadata;
    error!(
        error = %invalid.error,
        namespace = metadata.namespace.as_deref().unwrap_or_default(),
        name = metadata.name.as_deref().unwrap_or_default(),
        "a FineTuneJob cannot be read and is left alone: delete it, or write it again"
    );
}

/// Returns a job with nothing but its metadata.
fn object_stub(invalid: InvalidObject) -> Option<FineTuneJob> {
    let empty = json!({
        "metadata": {}, "spec": {"model": {"uri": ""}, "dataset": {"train": ""}, "output": {"uri": ""}},
    });
    let mut job: FineTuneJob = serde_json::from_value(empty).ok()?;
    *job.meta_mut() = invalid.metadata;
    Some(job)
}

#[cfg(test)]
mod tests {
    use finetune_api::FineTuneJob;
    use kube::{ResourceExt, core::DeserializeGuard, runtime::watcher::Event};
    use serde_json::json;

    use super::valid_jobs;

    fn job(rank: &serde_json::Value) -> DeserializeGuard<FineTuneJob> {
        serde_json::from_value(json!({
            "apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob",
            "metadata": {"name": "a", "namespace": "team"},
            "spec": {
                "model": {"uri": "hf://a/b"}, "dataset": {"train": "s3://a/b.jsonl"},
                "output": {"uri": "s3://a/out"}, "loraConfig": {"r": rank},
            },
        }))
        .unwrap()
    }

    #[test]
    fn a_job_that_cannot_be_read_is_not_listed_and_goes_when_it_becomes_one() {
        assert!(matches!(valid_jobs(Event::InitApply(job(&json!(8)))), Some(Event::InitApply(_))));
        assert!(valid_jobs(Event::InitApply(job(&json!("8")))).is_none());
        let Some(Event::Delete(gone)) = valid_jobs(Event::Apply(job(&json!("8")))) else {
            panic!("it would be acted on as it was")
        };
        assert_eq!((gone.name_any(), gone.namespace()), ("a".to_owned(), Some("team".to_owned())));
        assert!(matches!(valid_jobs(Event::Delete(job(&json!("8")))), Some(Event::Delete(_))));
    }
}
