//! Renders the progress of a run for Prometheus.

use finetune_contract::{Progress, Stage};
use prometheus::{Encoder, Gauge, Opts, Registry, TextEncoder};

const STAGES: [Stage; 7] = [
    Stage::Fetching,
    Stage::Loading,
    Stage::Training,
    Stage::Evaluating,
    Stage::Exporting,
    Stage::Publishing,
    Stage::Verifying,
];

/// Renders progress in the text format of Prometheus.
///
/// # Units
/// `predicted_bytes` is the peak memory that the plan predicted.
///
/// # Errors
/// If two metrics have the same name, or a name that is not valid.
pub(super) fn render(
    progress: &Progress,
    run_id: &str,
    predicted_bytes: u64,
) -> prometheus::Result<String> {
    let registry = Registry::new();
    let gauge = |name: &str, help: &str, value: Option<f64>| {
        // As in JSON, a value that is not a number is absent.
        let Some(value) = value.filter(|value| value.is_finite()) else { return Ok(()) };
        let options = Opts::new(format!("finetune_trainer_{name}"), help);
        let gauge = Gauge::with_opts(options.const_label("run_id", run_id.to_owned()))?;
        gauge.set(value);
        registry.register(Box::new(gauge))
    };
    let whole = |number: u64| Some(number as f64);
    gauge("loss", "Mean loss per target token of the last step", progress.loss)?;
    gauge("eval_loss", "Mean loss per target token of the validation set", progress.eval_loss)?;
    gauge("learning_rate", "Learning rate of the last step", progress.learning_rate)?;
    gauge("grad_norm", "2-norm of the gradient before clipping", progress.grad_norm)?;
    gauge("step", "Completed optimizer steps", whole(progress.step))?;
    gauge("total_steps", "Optimizer steps of the whole run", whole(progress.total_steps))?;
    gauge("epoch", "Completed passes over the training data", Some(progress.epoch))?;
    gauge(
        "tokens_per_second",
        "Tokens processed per second, averaged over the last steps",
        progress.tokens_per_second,
    )?;
    let tokens = Opts::new("finetune_trainer_tokens_total", "Tokens processed so far");
    let tokens = prometheus::Counter::with_opts(tokens.const_label("run_id", run_id.to_owned()))?;
    tokens.inc_by(progress.tokens_seen as f64);
    registry.register(Box::new(tokens))?;
    gauge(
        "eta_seconds",
        "Estimated seconds until the last step",
        progress.eta_seconds.map(|seconds| seconds as f64),
    )?;
    gauge(
        "memory_peak_bytes",
        "Peak anonymous memory of the process, or peak memory of its GPU",
        whole(progress.peak_memory_bytes),
    )?;
    gauge(
        "memory_predicted_bytes",
        "Peak memory as predicted by the plan",
        whole(predicted_bytes),
    )?;
    gauge(
        "checkpoint_step",
        "Step of the newest checkpoint",
        progress.checkpoint_step.map(|step| step as f64),
    )?;
    gauge(
        "checkpoint_stall_seconds",
        "Seconds that training was paused for the newest checkpoint",
        progress.checkpoint_stall_seconds,
    )?;
    gauge(
        "checkpoint_write_seconds",
        "Seconds that writing the newest checkpoint took in the background",
        progress.checkpoint_write_seconds,
    )?;
    let stages = prometheus::GaugeVec::new(
        Opts::new(
            "finetune_trainer_stage",
            "1 for the current stage of the trainer, 0 for the others",
        )
        .const_label("run_id", run_id.to_owned()),
        &["stage"],
    )?;
    for stage in STAGES {
        let is_now = if stage == progress.stage { 1.0 } else { 0.0 };
        stages.with_label_values(&[&format!("{stage:?}")]).set(is_now);
    }
    registry.register(Box::new(stages))?;
    let mut text = Vec::new();
    TextEncoder::new().encode(&registry.gather(), &mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}
