//! Whole documents for tests, which name only the fields that they are about:
//! `TrainingSettings { seed: 7, ..training_settings() }`.

use std::path::Path;

use crate::{
    CONTRACT_VERSION, DatasetSource, Device, Dtype, ExpectedData, LrScheduler, ModelSource,
    ObjectUri, Optimizer, Outcome, OutputTarget, Parallelism, Progress, Recompute, RunConfig,
    RunId, RunReport, Stage, TrainingSettings,
};

/// Returns the URI of an absolute path of this machine.
///
/// # Panics
/// If the path cannot be written as a URI.
#[track_caller]
pub fn file_uri(path: &Path) -> ObjectUri {
    ObjectUri::of_path(path).expect("a path for a test")
}

/// Returns the settings of five steps in fp32, each of one short sequence: no warm-up, no evaluation.
pub fn training_settings() -> TrainingSettings {
    TrainingSettings {
        context_length: 64,
        total_steps: 5,
        total_sequences: None,
        learning_rate: 1e-3,
        lr_scheduler_type: LrScheduler::Constant,
        min_learning_rate_ratio: None,
        num_warmup_steps: 0,
        weight_decay: 0.01,
        max_grad_norm: 1.0,
        micro_batch_size: 1,
        gradient_accumulation_steps: 1,
        packing: false,
        optimizer: Optimizer::Adamw,
        dtype: Dtype::Fp32,
        recompute: Recompute::None,
        seed: 7,
        evaluation_steps: 0,
        early_stopping_patience: 0,
        checkpoint_steps: Some(100),
        num_checkpoints_to_keep: 1,
        max_time_seconds: None,
    }
}

/// Returns a full-parameter run of [`training_settings`] on one CPU, whose checkpoints lie beside its
/// output; what it expects of the data is for the test to say.
pub fn run_config(model: ModelSource, dataset: DatasetSource, output: OutputTarget) -> RunConfig {
    RunConfig {
        version: CONTRACT_VERSION,
        run_id: RunId("a-1".to_owned()),
        attempt: 0,
        model,
        dataset,
        lora: None,
        initial_adapter: None,
        initial_checkpoint: None,
        training: training_settings(),
        device: Device::Cpu,
        parallelism: Parallelism::SINGLE,
        checkpoints_uri: output.uri.with_suffix(".checkpoints"),
        output,
        expected: ExpectedData {
            train_sha256: String::new(),
            validation_sha256: None,
            sequences: 1,
        },
        predicted_peak_bytes: 0,
        predicted_sent_bytes: None,
    }
}

/// Returns the progress of a run in the middle of its ten steps.
pub fn progress() -> Progress {
    Progress {
        version: CONTRACT_VERSION,
        run_id: RunId("a-1".to_owned()),
        stage: Stage::Training,
        step: 5,
        total_steps: 10,
        epoch: 0.5,
        loss: Some(2.0),
        eval_loss: None,
        learning_rate: Some(1e-4),
        grad_norm: Some(1.0),
        tokens_per_second: Some(100.0),
        tokens_seen: 50,
        eta_seconds: Some(120),
        peak_memory_bytes: 1,
        checkpoint_step: None,
        checkpoint_stall_seconds: None,
        checkpoint_write_seconds: None,
        resumed_from_step: None,
    }
}

/// Returns the report of a run of ten steps that ended with `outcome`.
pub fn run_report(outcome: Outcome) -> RunReport {
    RunReport {
        version: CONTRACT_VERSION,
        run_id: RunId("a-1".to_owned()),
        attempt: 0,
        outcome,
        steps: 10,
        tokens_seen: 100,
        rows_left_out: None,
        resumed_from_step: None,
        train_loss: Some([3.0, 1.0]),
        eval_loss: None,
        best_step: None,
        stopped_early: None,
        bf16_kernel: None,
        tokens_per_second: None,
        duration_seconds: 1.0,
        predicted_peak_bytes: 2,
        measured_peak_bytes: 1,
        predicted_sent_bytes: None,
        measured_sent_bytes: None,
    }
}
