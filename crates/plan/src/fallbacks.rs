//! What a run does instead when it runs out of memory: the same steps in smaller pieces.
//!
//! A step keeps its sequences, their order and its noise, so what is trained stays the same to
//! rounding, and the run resumes from the newest checkpoint. The fallbacks are part of the plan, in
//! the order they are taken: what was approved contains them.

use finetune_api::Fallback;
use finetune_contract::{ModelFacts, Optimizer, Parallelism, Recompute, RunConfig, Strategy};

use super::{
    sizing::{self, Workload},
    units::{self, word},
};

/// A run in smaller pieces.
#[derive(Debug, Clone, PartialEq)]
pub struct Adapted {
    /// The trainer's configuration from now on.
    pub config: RunConfig,
    /// The fallbacks that are left after this one.
    pub left: Vec<Fallback>,
    /// What changed, for people.
    pub change: String,
}

/// Lists the fallbacks of `workload`: half the micro-batch, more divided over the ranks there are,
/// activation checkpointing, and, where a rank more brings memory of its own, twice the ranks.
pub(super) fn list(
    model: &ModelFacts,
    workload: Workload,
    accumulation: u32,
    may_add_ranks: bool,
) -> Vec<Fallback> {
    let mut least = sizing::memory(model, &workload).total();
    let lower =
        |&(workload, accumulation): &(Workload, u64)| lower(workload, accumulation, may_add_ranks);
    let smaller = std::iter::successors(Some((workload, u64::from(accumulation))), lower).skip(1);
    let mut fallbacks = Vec::new();
    for (workload, accumulation) in smaller {
        let predicted_peak_bytes = sizing::memory(model, &workload).total();
        // What saves nothing is no fallback.
        if predicted_peak_bytes >= least {
            continue;
        }
        least = predicted_peak_bytes;
        fallbacks.push(Fallback {
            train_batch_size_per_device: workload.micro_batch as u32,
            gradient_accumulation_steps: accumulation as u32,
            recompute: workload.recompute,
            ranks: workload.ranks as u32,
            strategy: workload.strategy,
            predicted_peak_bytes,
            predicted_sent_bytes: (workload.ranks > 1)
                .then(|| sizing::sent_bytes(model, &workload, accumulation)),
        });
    }
    fallbacks
}

/// Returns the next smaller workload with as many sequences per step.
fn lower(workload: Workload, accumulation: u64, may_add_ranks: bool) -> Option<(Workload, u64)> {
    if workload.micro_batch > 1 {
        let divisor = smallest_divisor(workload.micro_batch);
        let micro_batch = workload.micro_batch / divisor;
        return Some((Workload { micro_batch, ..workload }, accumulation * divisor));
    }
    if let Some(strategy) = divided_further(&workload) {
        return Some((Workload { strategy, ..workload }, accumulation));
    }
    if workload.recompute == Recompute::None {
        return Some((Workload { recompute: Recompute::Block, ..workload }, accumulation));
    }
    let ranks = workload.ranks * 2;
    let can_divide = accumulation.is_multiple_of(2) && ranks <= u64::from(Parallelism::MAX_RANKS);
    (may_add_ranks && can_divide)
        .then_some((Workload { ranks, strategy: Strategy::Zero3, ..workload }, accumulation / 2))
}

/// Returns what divides more over as many ranks; `None` if nothing does.
const fn divided_further(workload: &Workload) -> Option<Strategy> {
    match workload.strategy {
        Strategy::None | Strategy::Zero3 => None,
        Strategy::Zero1 => Some(Strategy::Zero2),
        Strategy::Ddp if workload.is_full => Some(Strategy::Zero1),
        Strategy::Ddp | Strategy::Zero2 => Some(Strategy::Zero3),
    }
}

/// Returns the smallest divisor above 1 of a number above 1.
fn smallest_divisor(number: u64) -> u64 {
    (2..number).find(|divisor| number.is_multiple_of(*divisor)).unwrap_or(number)
}

/// Takes the next fallback of a run for which `limit` bytes were too little; one that is predicted to
/// need more than that is skipped.
///
/// # Errors
/// Why no fallback is left, with the bytes that are missing.
pub fn adapt(
    config: &RunConfig,
    fallbacks: &[Fallback],
    limit: Option<u64>,
) -> Result<Adapted, String> {
    let fits =
        |fallback: &Fallback| limit.is_none_or(|limit| fallback.predicted_peak_bytes <= limit);
    let Some(taken) = fallbacks.iter().position(fits) else {
        return Err(shortfall(config, fallbacks, limit));
    };
    let Fallback {
        train_batch_size_per_device,
        gradient_accumulation_steps,
        recompute,
        ranks,
        strategy,
        predicted_peak_bytes,
        predicted_sent_bytes,
    } = fallbacks[taken];
    let mut adapted = config.clone();
    adapted.training.micro_batch_size = train_batch_size_per_device;
    adapted.training.gradient_accumulation_steps = gradient_accumulation_steps;
    adapted.training.recompute = recompute;
    adapted.parallelism = Parallelism { world_size: ranks, strategy, ..config.parallelism };
    adapted.predicted_peak_bytes = predicted_peak_bytes;
    adapted.predicted_sent_bytes = predicted_sent_bytes;
    let change = change(config, &adapted);
    Ok(Adapted { config: adapted, left: fallbacks[taken + 1..].to_vec(), change })
}

/// Describes what changed and what did not.
fn change(from: &RunConfig, to: &RunConfig) -> String {
    let sizes = |config: &RunConfig| {
        let training = &config.training;
        [
            ("trainBatchSizePerDevice", training.micro_batch_size.to_string()),
            ("gradientAccumulationSteps", training.gradient_accumulation_steps.to_string()),
            ("recompute", word(&training.recompute)),
            ("ranks", config.parallelism.world_size.to_string()),
            ("strategy", word(&config.parallelism.strategy)),
        ]
    };
    let changed: Vec<String> = sizes(from)
        .into_iter()
        .zip(sizes(to))
        .filter(|((_, before), (_, after))| before != after)
        .map(|((field, before), (_, after))| format!("{field} {after} instead of {before}"))
        .collect();
    // Blocks of moments lie otherwise in other parts.
    let is_rounded_anew = to.training.optimizer == Optimizer::Adamw8bit
        && (from.parallelism.strategy, from.parallelism.world_size)
            != (to.parallelism.strategy, to.parallelism.world_size);
    let but = if is_rounded_anew { " but for the rounding of moments" } else { "" };
    format!(
        "{}: {} sequences per step and the same result{but}, in {} instead of {}",
        changed.join(", "),
        to.global_batch_size(),
        units::bytes(to.predicted_peak_bytes),
        units::bytes(from.predicted_peak_bytes)
    )
}

fn shortfall(config: &RunConfig, fallbacks: &[Fallback], limit: Option<u64>) -> String {
    let predicted = config.predicted_peak_bytes;
    let least = fallbacks.last().map_or(predicted, |fallback| fallback.predicted_peak_bytes);
    let nothing = "no smaller configuration is left to try";
    match limit {
        Some(limit) if least > limit => format!(
            "{nothing}: at least {} is needed, {} above the limit of {}",
            units::bytes(least),
            units::bytes(least - limit),
            units::bytes(limit)
        ),
        Some(limit) => format!(
            "{nothing}: {} was predicted, but a limit of {}, {} more, was not enough",
            units::bytes(predicted),
            units::bytes(limit),
            units::bytes(limit.saturating_sub(predicted))
        ),
        None => format!("{nothing}: {} was predicted", units::bytes(predicted)),
    }
}

/// Describes the fallbacks in one line, if there are any.
pub(super) fn describe(config: &RunConfig, fallbacks: &[Fallback]) -> Option<String> {
    let mut parts: Vec<(&str, Vec<String>)> = Vec::new();
    let mut last = config.clone();
    let mut left = fallbacks;
    while let Ok(next) = adapt(&last, left, None) {
        let (before, after) = (&last, &next.config);
        let (name, value) = if before.parallelism.world_size != after.parallelism.world_size {
            ("ranks", after.parallelism.world_size.to_string())
        } else if before.parallelism.strategy != after.parallelism.strategy {
            ("strategy", word(&after.parallelism.strategy))
        } else if before.training.recompute != after.training.recompute {
            ("recompute", word(&after.training.recompute))
        } else {
            ("trainBatchSizePerDevice", after.training.micro_batch_size.to_string())
        };
        match parts.last_mut() {
            Some((last, values)) if *last == name => values.push(value),
            _ => parts.push((name, vec![value])),
        }
        last = next.config;
        left = &left[left.len() - next.left.len()..];
    }
    let parts: Vec<String> =
        parts.into_iter().map(|(name, values)| format!("{name} {}", values.join(", "))).collect();
    (!parts.is_empty()).then(|| parts.join("; then "))
}

#[cfg(test)]
mod tests {
    use finetune_api::{Fallback, manifest};
    use finetune_contract::RunConfig;

    use super::{adapt, describe};
    use crate::{accelerators::Accelerator, plan, target::Target, testing};

    /// Plans the small model for a pod of so many GiB.
    fn planned(lines: &str, gib: f64) -> (RunConfig, Vec<Fallback>) {
        let text = format!("{}{lines}", include_str!("../../../examples/minimal.yaml"));
        let job = manifest::parse(&text).unwrap();
        let pod = Accelerator {
            name: "cpu".to_owned(),
            memory_gi_b: gib,
            bf16_tflops: 0.5,
            fp32_tflops: 0.2,
            has_bf16: true,
            ..Accelerator::default()
        };
        let report = testing::report(testing::smollm2(), 8_000_000_000);
        let plan = plan(&job, &report, Target::on(&pod, &job), 1).unwrap();
        (plan.run_config, plan.fallbacks)
    }

    #[test]
    fn halves_then_computes_again_then_adds_ranks() {
        let (config, fallbacks) = planned("", 8.0);
        insta::assert_snapshot!(describe(&config, &fallbacks).unwrap(), @"trainBatchSizePerDevice 4, 2, 1; then recompute block; then ranks 2, 4, 8, 16");
        let (mut last, mut left) = (config.clone(), fallbacks);
        let mut said = Vec::new();
        while let Ok(next) = adapt(&last, &left, None) {
            assert_eq!(next.config.global_batch_size(), config.global_batch_size());
            assert!(next.config.predicted_peak_bytes < last.predicted_peak_bytes);
            assert!(next.left.len() < left.len(), "it comes to an end");
            said.push(next.change);
            (last, left) = (next.config, next.left);
        }
        insta::assert_snapshot!(said.join("\n"), @r"
        trainBatchSizePerDevice 4 instead of 8, gradientAccumulationSteps 4 instead of 2: 16 sequences per step and the same result, in 3.02 GB instead of 3.40 GB
        trainBatchSizePerDevice 2 instead of 4, gradientAccumulationSteps 8 instead of 4: 16 sequences per step and the same result, in 2.83 GB instead of 3.02 GB
        trainBatchSizePerDevice 1 instead of 2, gradientAccumulationSteps 16 instead of 8: 16 sequences per step and the same result, in 2.71 GB instead of 2.83 GB
        recompute block instead of none: 16 sequences per step and the same result, in 2.63 GB instead of 2.71 GB
        gradientAccumulationSteps 8 instead of 16, ranks 2 instead of 1, strategy zero3 instead of none: 16 sequences per step and the same result, in 1.74 GB instead of 2.63 GB
        gradientAccumulationSteps 4 instead of 8, ranks 4 instead of 2: 16 sequences per step and the same result, in 1.14 GB instead of 1.74 GB
        gradientAccumulationSteps 2 instead of 4, ranks 8 instead of 4: 16 sequences per step and the same result, in 835 MB instead of 1.14 GB
        gradientAccumulationSteps 1 instead of 2, ranks 16 instead of 8: 16 sequences per step and the same result, in 683 MB instead of 835 MB
        ");
    }

    #[test]
    fn ranks_of_one_machine_share_its_memory_and_are_no_fallback() {
        let job = manifest::parse(include_str!("../../../examples/minimal.yaml")).unwrap();
        let report = testing::report(testing::smollm2(), 8_000_000_000);
        let plan = plan(&job, &report, Target::Local(&[]), 2).unwrap();
        assert!(plan.fallbacks.iter().all(|fallback| fallback.ranks == 2), "{:?}", plan.fallbacks);
    }

    #[test]
    fn ranks_that_hold_weights_whole_divide_them_before_anything_is_computed_again() {
        let job = manifest::parse(include_str!("../../../examples/minimal.yaml")).unwrap();
        let report = testing::report(testing::smollm2(), 16_000_000_000);
        let plan = plan(&job, &report, Target::Local(&[]), 2).unwrap();
        let strategy = plan.run_config.parallelism.strategy;
        let fallbacks = describe(&plan.run_config, &plan.fallbacks).unwrap();
        insta::assert_snapshot!(format!("{strategy:?}: {fallbacks}"), @"Zero2: trainBatchSizePerDevice 4, 2, 1; then strategy zero3; then recompute block");
    }

    #[test]
    fn a_micro_batch_without_halves_is_divided_otherwise() {
        let lines = "  training: {trainBatchSizePerDevice: 15, gradientAccumulationSteps: 1, recompute: block}\n  loraConfig: {}\n";
        let (config, fallbacks) = planned(lines, 8.0);
        let sizes: Vec<_> = fallbacks
            .iter()
            .map(|fallback| {
                (fallback.train_batch_size_per_device, fallback.gradient_accumulation_steps)
            })
            .collect();
        assert_eq!(sizes, [(5, 3), (1, 15)]);
        assert_eq!(config.global_batch_size(), 15);
    }

    #[test]
    fn passes_over_what_cannot_fit_and_says_what_is_missing() {
        let (config, fallbacks) = planned("  loraConfig: {}\n", 8.0);
        let adapted = adapt(&config, &fallbacks, Some(300_000_000)).unwrap();
        insta::assert_snapshot!(adapted.change, @"trainBatchSizePerDevice 1 instead of 8, gradientAccumulationSteps 16 instead of 2: 16 sequences per step and the same result, in 269 MB instead of 967 MB");
        insta::assert_snapshot!(adapt(&config, &fallbacks, Some(24 << 20)).unwrap_err(), @"no smaller configuration is left to try: at least 190 MB is needed, 164 MB above the limit of 25 MB");
        insta::assert_snapshot!(adapt(&config, &[], Some(2_000_000_000)).unwrap_err(), @"no smaller configuration is left to try: 967 MB was predicted, but a limit of 2.00 GB, 1.03 GB more, was not enough");
        insta::assert_snapshot!(adapt(&config, &[], None).unwrap_err(), @"no smaller configuration is left to try: 967 MB was predicted");
    }
}
