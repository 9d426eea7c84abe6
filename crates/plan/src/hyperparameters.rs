//! The hyperparameters of a run, with their defaults.

use finetune_api::{Precision, Training};
use finetune_contract::{Dtype, MachineFacts, Optimizer, TrainingSettings};

use super::{batch::Batch, choices::Choices, length::Length, resolve, target::Target, units::word};

/// Takes the optimizer asked for: 8-bit state adds noise, which only a user may choose.
pub(super) fn optimizer(set: Option<Optimizer>, decisions: &mut Choices) -> Optimizer {
    let optimizer = set.unwrap_or_default();
    if !optimizer.is_default() {
        let reason = "set in the manifest; 8-bit optimizer state";
        decisions.add("optimizer", word(&optimizer), reason);
    }
    optimizer
}

/// What the hyper-parameters' defaults depend on.
pub(super) struct TrainingFacts {
    pub(super) context_length: u32,
    pub(super) length: Length,
    pub(super) packing: bool,
    pub(super) is_lora: bool,
    pub(super) has_validation: bool,
}

pub(super) fn training_settings(
    training: &Training,
    batch: &Batch,
    facts: &TrainingFacts,
    decisions: &mut Choices,
) -> TrainingSettings {
    let TrainingFacts { context_length, length, packing, is_lora, has_validation } = facts;
    let Length { total_steps, total_sequences } = length;
    let workload = batch.workload;
    let tenth = (total_steps / 10).max(1);
    let learning_rate = decisions.pick(
        "learningRate",
        training.learning_rate,
        if *is_lora { 1e-4 } else { 1e-5 },
        if *is_lora { "usual for LoRA" } else { "usual for full-parameter training" },
    );
    let whole = |value: Option<i64>| value.map(i64::unsigned_abs);
    let scheduler = training.lr_scheduler_type.unwrap_or_default();
    let min_learning_rate_ratio = training.min_learning_rate_ratio.filter(|ratio| *ratio > 0.0);
    let reason = match (training.lr_scheduler_type, min_learning_rate_ratio) {
        (Some(_), _) => "set in the manifest",
        (None, None) => "decays smoothly to zero",
        (None, Some(_)) => "decays smoothly",
    };
    decisions.add("lrSchedulerType", word(&scheduler), reason);
    if let Some(ratio) = min_learning_rate_ratio {
        decisions.add("minLearningRateRatio", ratio, "set in the manifest");
    }
    TrainingSettings {
        context_length: *context_length,
        total_steps: *total_steps,
        total_sequences: *total_sequences,
        learning_rate,
        lr_scheduler_type: scheduler,
        min_learning_rate_ratio,
        num_warmup_steps: decisions.pick(
            "numWarmupSteps",
            whole(training.num_warmup_steps),
            (total_steps / 10).min(10),
            "10 % of the steps, at most 10",
        ),
        weight_decay: decisions.pick(
            "weightDecay",
            training.weight_decay,
            0.0,
            "fine-tuning is short",
        ),
        max_grad_norm: decisions.pick(
            "maxGradNorm",
            training.max_grad_norm,
            1.0,
            "limits the effect of outlier batches",
        ),
        micro_batch_size: workload.micro_batch as u32,
        gradient_accumulation_steps: batch.accumulation,
        packing: *packing,
        optimizer: workload.optimizer,
        dtype: workload.dtype,
        recompute: workload.recompute,
        seed: decisions.pick(
            "seed",
            whole(training.seed),
            resolve::DEFAULT_SEED,
            "fixed, so that a run can be repeated",
        ),
        evaluation_steps: if *has_validation {
            decisions.pick(
                "evaluationSteps",
                whole(training.evaluation_steps),
                tenth,
                "a tenth of the steps",
            )
        } else {
            whole(training.evaluation_steps).unwrap_or(0)
        },
        early_stopping_patience: training.early_stopping_patience.unwrap_or(0).unsigned_abs(),
        checkpoint_steps: checkpoint_steps(whole(training.checkpoint_steps), decisions),
        num_checkpoints_to_keep: training.num_checkpoints_to_keep.unwrap_or(2).unsigned_abs(),
        max_time_seconds: whole(training.max_time_seconds).inspect(|seconds| {
            let reason = "set in the manifest; then the best so far is published";
            decisions.add("maxTimeSeconds", seconds, reason);
        }),
    }
}

/// Leaves it to the trainer when to save checkpoints, unless it is set: it knows what they cost.
fn checkpoint_steps(set: Option<u64>, decisions: &mut Choices) -> Option<u64> {
    match set {
        Some(steps) => decisions.add("checkpointSteps", steps, "set in the manifest"),
        None => decisions.add(
            "checkpointSteps",
            "by time",
            "about every 30 s, less often if it would take more than 1 % of the time",
        ),
    }
    set
}

pub(super) fn dtype(
    set: Option<Precision>,
    target: Target<'_>,
    machine: Option<&MachineFacts>,
    decisions: &mut Choices,
) -> Dtype {
    let native = machine.is_some_and(|machine| machine.native_bf16);
    let who = match target {
        Target::Accelerator { accelerator, .. } if accelerator.is_device() => {
            accelerator.name.as_str()
        }
        Target::Local(_) | Target::Accelerator { .. } => "this CPU",
    };
    let (dtype, reason) = match (set.and_then(Precision::fixed), native) {
        (Some(Dtype::Bf16), false) => (
            Dtype::Bf16,
            format!("set in the manifest; slow, {who} does not multiply bf16 natively"),
        ),
        (Some(dtype), _) => (dtype, "set in the manifest".to_owned()),
        (None, true) => {
            let kernel = machine.and_then(|machine| machine.bf16_kernel.as_deref());
            let by = kernel.map_or(String::new(), |kernel| format!(", here by {kernel}"));
            (Dtype::Bf16, format!("{who} multiplies bf16 natively{by}"))
        }
        (None, false) => (Dtype::Fp32, format!("{who} does not multiply bf16 natively")),
    };
    decisions.add("dtype", word(&dtype), reason);
    dtype
}
