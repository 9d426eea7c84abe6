//! Metrics of jobs: how many there are, and how they ended.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use finetune_api::{FineTuneJob, FineTuneJobStatus};
use finetune_contract::Reason;
use kube::{ResourceExt, runtime::reflector::Store};

use super::{
    conditions::{self, Kind},
    context::Context,
};

/// How often jobs are counted.
const COUNT_INTERVAL: Duration = Duration::from_secs(10);

/// Counts retries and the end of a run, once: when the status that says so was written.
pub(super) fn count_changes(context: &Context, job: &FineTuneJob, status: &FineTuneJobStatus) {
    let metrics = &context.metrics;
    let namespace = job.namespace().unwrap_or_default();
    let before = job.status.clone().unwrap_or_default();
    if let Some(cause) = cause_of_retry(&before, status) {
        metrics.retries.with_label_values(&[&namespace, cause]).inc();
    }
    if conditions::is_finished(&before) || !conditions::is_finished(status) {
        return;
    }
    let Some(end) = conditions::find(status, Kind::Succeeded) else { return };
    let method = if job.spec.lora_config.is_some() { "lora" } else { "full" };
    let result = if end.status == "True" { "succeeded" } else { "failed" };
    metrics.completions.with_label_values(&[&namespace, method, result, &end.reason]).inc();
    if let (Some(start), Some(end)) = (&status.start_time, &status.completion_time) {
        let seconds = start.0.duration_until(end.0).as_secs_f64();
        metrics.job_seconds.with_label_values(&[method]).observe(seconds);
    }
    let trained = status.result.as_ref().filter(|result| result.measured_peak_bytes > 0);
    if let (Some(plan), Some(result)) = (&status.plan, trained) {
        let name = job.name_any();
        let labels = [namespace.as_str(), name.as_str()];
        metrics.predicted_bytes.with_label_values(&labels).set(plan.predicted_peak_bytes as f64);
        metrics.measured_bytes.with_label_values(&labels).set(result.measured_peak_bytes as f64);
    }
}

/// Returns why another attempt follows, if one does and it counts against a budget.
fn cause_of_retry(before: &FineTuneJobStatus, after: &FineTuneJobStatus) -> Option<&'static str> {
    let counts = |status: &FineTuneJobStatus| {
        status.attempt.as_ref().map_or((None, 0, 0), |attempt| {
            (attempt.counted_from_step, attempt.failures, attempt.disruptions)
        })
    };
    let ((from, mut failures, mut disruptions), (now_from, now_failures, now_disruptions)) =
        (counts(before), counts(after));
    if from != now_from {
        // A newer checkpoint began both counts again.
        (failures, disruptions) = (0, 0);
    }
    let is_failure = (now_failures > failures).then_some("failure");
    is_failure.or((now_disruptions > disruptions).then_some("disruption"))
}

/// Updates the gauge of jobs by reason until the operator stops, and forgets jobs that are gone.
pub(super) async fn count_jobs(context: Arc<Context>, reader: Store<FineTuneJob>) {
    let metrics = &context.metrics;
    // Other namespaces have gauges of their own: only what was set here may be taken away.
    let mut counted: Vec<(String, String)> = Vec::new();
    let mut known = HashSet::new();
    loop {
        tokio::time::sleep(COUNT_INTERVAL).await;
        let jobs = reader.state();
        context.forget_others(&jobs);
        let names: HashSet<(String, String)> =
            jobs.iter().map(|job| (job.namespace().unwrap_or_default(), job.name_any())).collect();
        for (namespace, name) in known.difference(&names) {
            for gauges in [&metrics.predicted_bytes, &metrics.measured_bytes] {
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
                let _ = metrics.jobs.remove_label_values(&[&namespace, &reason]);
            }
        }
        for ((namespace, reason), count) in counts {
            metrics.jobs.with_label_values(&[&namespace, &reason]).set(count);
            counted.push((namespace, reason));
        }
    }
}

#[cfg(test)]
mod tests {
    use finetune_api::{AttemptStatus, FineTuneJobStatus, Step};

    use super::cause_of_retry;

    #[test]
    fn a_retry_counts_though_its_budget_was_renewed() {
        let status = |counted_from_step, failures, disruptions| {
            let attempt = AttemptStatus {
                step: Step::Training,
                number: 9,
                failures,
                disruptions,
                counted_from_step,
                job_uid: None,
                retry_time: None,
            };
            FineTuneJobStatus { attempt: Some(attempt), ..FineTuneJobStatus::default() }
        };
        let none = FineTuneJobStatus::default();
        for (before, after, cause) in [
            (&none, status(None, 0, 0), None),
            (&none, status(None, 1, 0), Some("failure")),
            (&status(None, 1, 2), status(None, 1, 3), Some("disruption")),
            (&status(Some(5), 1, 2), status(Some(9), 0, 1), Some("disruption")),
            (&status(Some(5), 1, 2), status(Some(9), 1, 0), Some("failure")),
            (&status(Some(5), 1, 2), status(Some(5), 1, 2), None),
        ] {
            assert_eq!(cause_of_retry(before, &after), cause, "{before:?} {after:?}");
        }
    }
}
