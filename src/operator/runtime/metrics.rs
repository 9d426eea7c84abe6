//! The metrics of the operator. Names follow controller-runtime's where there is one.

use std::time::Instant;

use prometheus::{
    Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, TextEncoder,
};

/// All metrics of the operator.
#[derive(Clone)]
pub struct Metrics {
    registry: Registry,
    /// Reconciliations by result: `success`, `error` or `conflict`.
    pub reconciles: IntCounterVec,
    /// Reconciliations that failed.
    pub reconcile_errors: prometheus::IntCounter,
    /// Seconds of a reconciliation.
    pub reconcile_seconds: Histogram,
    /// Reconciliations in progress.
    pub active_workers: IntGauge,
    /// 1 for the leader.
    pub leader: Gauge,
    /// Requests to the apiserver by method, resource and status.
    pub api_requests: IntCounterVec,
    /// Errors of watches by resource.
    pub watch_errors: IntCounterVec,
    /// Jobs by namespace and the reason of their condition `Succeeded`.
    pub jobs: IntGaugeVec,
    /// Jobs that ended, by namespace, method, result and reason.
    pub completions: IntCounterVec,
    /// Seconds from the first training pod to the end, by method.
    pub job_seconds: HistogramVec,
    /// Attempts that were retried, by namespace and cause.
    pub retries: IntCounterVec,
    /// Predicted memory of jobs that ended, in bytes.
    pub predicted_bytes: GaugeVec,
    /// Measured memory of jobs that ended, in bytes.
    pub measured_bytes: GaugeVec,
}

impl Metrics {
    /// Creates and registers them.
    ///
    /// # Errors
    /// The registry's, if two had one name.
    pub fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let counters = |name: &str, help: &str, labels: &[&str]| {
            let counters = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(counters.clone()))?;
            Ok::<_, prometheus::Error>(counters)
        };
        let gauges = |name: &str, help: &str, labels: &[&str]| {
            let gauges = GaugeVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(gauges.clone()))?;
            Ok::<_, prometheus::Error>(gauges)
        };
        let reconcile_errors = prometheus::IntCounter::new(
            "finetune_operator_reconcile_errors_total",
            "Reconciliations that failed and are retried",
        )?;
        let reconcile_seconds = Histogram::with_opts(
            HistogramOpts::new(
                "finetune_operator_reconcile_time_seconds",
                "Seconds of a reconciliation of a job",
            )
            .buckets(vec![0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0]),
        )?;
        let active_workers =
            IntGauge::new("finetune_operator_active_workers", "Reconciliations in progress")?;
        let leader =
            Gauge::new("finetune_operator_leader", "1 for the leader, 0 for the standby replicas")?;
        gauges(
            "finetune_operator_build_info",
            "Always 1; the label has the operator's version",
            &["version"],
        )?
        .with_label_values(&[env!("CARGO_PKG_VERSION")])
        .set(1.0);
        let jobs = IntGaugeVec::new(
            Opts::new("finetune_jobs", "Jobs by the reason of their condition Succeeded"),
            &["namespace", "reason"],
        )?;
        let job_seconds = HistogramVec::new(
            HistogramOpts::new(
                "finetune_job_duration_seconds",
                "Seconds from the first training pod to the end",
            )
            .buckets(vec![30.0, 60.0, 300.0, 900.0, 1800.0, 3600.0, 10_800.0, 43_200.0, 172_800.0]),
            &["method"],
        )?;
        for method in ["lora", "full"] {
            // From the start: the first end would have nothing to be an increase of.
            job_seconds.with_label_values(&[method]);
        }
        registry.register(Box::new(reconcile_errors.clone()))?;
        registry.register(Box::new(reconcile_seconds.clone()))?;
        registry.register(Box::new(active_workers.clone()))?;
        registry.register(Box::new(leader.clone()))?;
        registry.register(Box::new(jobs.clone()))?;
        registry.register(Box::new(job_seconds.clone()))?;
        Ok(Self {
            reconciles: counters(
                "finetune_operator_reconcile_total",
                "Reconciliations of a job by result",
                &["result"],
            )?,
            api_requests: counters(
                "finetune_operator_api_requests_total",
                "Requests to the apiserver",
                &["method", "resource", "code"],
            )?,
            watch_errors: counters(
                "finetune_operator_watch_errors_total",
                "Watches that failed and were restarted",
                &["resource"],
            )?,
            completions: counters(
                "finetune_job_completions_total",
                "Jobs that ended",
                &["namespace", "method", "result", "reason"],
            )?,
            retries: counters(
                "finetune_job_retries_total",
                "Attempts that were retried",
                &["namespace", "cause"],
            )?,
            predicted_bytes: gauges(
                "finetune_job_predicted_peak_bytes",
                "Predicted memory of a job that succeeded",
                &["namespace", "name"],
            )?,
            measured_bytes: gauges(
                "finetune_job_measured_peak_bytes",
                "Measured memory of a job that succeeded",
                &["namespace", "name"],
            )?,
            reconcile_errors,
            reconcile_seconds,
            active_workers,
            leader,
            jobs,
            job_seconds,
            registry,
        })
    }

    /// Counts and times a reconciliation until the result is dropped.
    pub fn reconciling(&self) -> Reconciling<'_> {
        self.active_workers.inc();
        Reconciling { metrics: self, started: Instant::now() }
    }

    /// Returns all of them in Prometheus' text format.
    pub fn render(&self) -> String {
        let mut text = Vec::new();
        // Writing to memory does not fail.
        let _ = TextEncoder::new().encode(&self.registry.gather(), &mut text);
        String::from_utf8_lossy(&text).into_owned()
    }
}

/// A reconciliation in progress.
pub struct Reconciling<'a> {
    metrics: &'a Metrics,
    started: Instant,
}

impl Drop for Reconciling<'_> {
    fn drop(&mut self) {
        self.metrics.active_workers.dec();
        self.metrics.reconcile_seconds.observe(self.started.elapsed().as_secs_f64());
    }
}
