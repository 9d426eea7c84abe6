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
    let budgets = |status: &FineTuneJobStatus| {
        status.attempt.as_ref().map_or((0, 0), |attempt| (attempt.failures, attempt.disruptions))
    };
    let [(failures, disruptions), (more_failures, more_disruptions)] =
        [budgets(&before), budgets(status)];
    for (cause, is_more) in
        [("failure", more_failures > failures), ("disruption", more_disruptions > disruptions)]
    {
        if is_more {
            metrics.retries.with_label_values(&[&namespace, cause]).inc();
        }
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
