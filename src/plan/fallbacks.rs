//! What a run does instead when it finds too little memory: the same steps in smaller pieces.
//!
//! A step keeps its sequences, their order and its noise, so what is trained stays the same to
//! rounding, and the newest checkpoint is gone on from. The ways are part of the plan, in the order
//! they are taken: what was approved contains them.

use finetune_contract::{ModelFacts, Optimizer, Parallelism, Recompute, RunConfig, Strategy};

use super::{render, sizing, sizing::Load, word};
use crate::api::Fallback;

/// A run in smaller pieces.
#[derive(Debug, Clone, PartialEq)]
pub struct Adapted {
    /// What the trainer is told from now on.
    pub config: RunConfig,
    /// The ways that are left after this one.
    pub left: Vec<Fallback>,
    /// What changed, for people.
    pub change: String,
}

/// Lists the ways from `load` down: the micro-batch in halves, more divided over the ranks there are,
/// blocks computed again, and, where a rank more brings memory of its own, twice the ranks.
pub(super) fn ladder(
    model: &ModelFacts,
    load: Load,
    accumulation: u32,
    may_add_ranks: bool,
) -> Vec<Fallback> {
    let mut least = sizing::memory(model, &load).total();
    let lower = |&(load, accumulation): &(Load, u64)| lower(load, accumulation, may_add_ranks);
    let ways = std::iter::successors(Some((load, u64::from(accumulation))), lower).skip(1);
    let mut ladder = Vec::new();
    for (load, accumulation) in ways {
        let predicted_peak_bytes = sizing::memory(model, &load).total();
        // What saves nothing is no way out.
        if predicted_peak_bytes >= least {
            continue;
        }
        least = predicted_peak_bytes;
        ladder.push(Fallback {
            train_batch_size_per_device: load.micro_batch as u32,
            gradient_accumulation_steps: accumulation as u32,
            recompute: load.recompute,
            ranks: load.ranks as u32,
            strategy: load.strategy,
            predicted_peak_bytes,
            predicted_sent_bytes: (load.ranks > 1)
                .then(|| sizing::sent_bytes(model, &load, accumulation)),
        });
    }
    ladder
}

/// Returns the next way down with as many sequences a step.
fn lower(load: Load, accumulation: u64, may_add_ranks: bool) -> Option<(Load, u64)> {
    if load.micro_batch > 1 {
        let divisor = smallest_divisor(load.micro_batch);
        let micro_batch = load.micro_batch / divisor;
        return Some((Load { micro_batch, ..load }, accumulation * divisor));
    }
    if let Some(strategy) = divided_further(&load) {
        return Some((Load { strategy, ..load }, accumulation));
    }
    if load.recompute == Recompute::None {
        return Some((Load { recompute: Recompute::Block, ..load }, accumulation));
    }
    let ranks = load.ranks * 2;
    let can_divide = accumulation.is_multiple_of(2) && ranks <= u64::from(Parallelism::MAX_RANKS);
    (may_add_ranks && can_divide)
        .then_some((Load { ranks, strategy: Strategy::Zero3, ..load }, accumulation / 2))
}

/// Returns what divides more over as many ranks; `None` if nothing does.
const fn divided_further(load: &Load) -> Option<Strategy> {
    match load.strategy {
        Strategy::None | Strategy::Zero3 => None,
        Strategy::Zero1 => Some(Strategy::Zero2),
        Strategy::Ddp if load.is_full => Some(Strategy::Zero1),
        Strategy::Ddp | Strategy::Zero2 => Some(Strategy::Zero3),
    }
}

/// Returns the smallest divisor above 1 of a number above 1.
fn smallest_divisor(number: u64) -> u64 {
    (2..number).find(|divisor| number.is_multiple_of(*divisor)).unwrap_or(number)
}

/// Goes down the ladder, for a run that found `limit` bytes too little; a way that is predicted to
/// need more than them is passed over.
///
/// # Errors
/// Why no way is left, with the bytes that are missing.
pub fn adapt(
    config: &RunConfig,
    ladder: &[Fallback],
    limit: Option<u64>,
) -> Result<Adapted, String> {
    let fits = |way: &Fallback| limit.is_none_or(|limit| way.predicted_peak_bytes <= limit);
    let Some(taken) = ladder.iter().position(fits) else {
        return Err(shortfall(config, ladder, limit));
    };
    let Fallback {
        train_batch_size_per_device,
        gradient_accumulation_steps,
        recompute,
        ranks,
        strategy,
        predicted_peak_bytes,
        predicted_sent_bytes,
    } = ladder[taken];
    let mut adapted = config.clone();
    adapted.training.micro_batch_size = train_batch_size_per_device;
    adapted.training.gradient_accumulation_steps = gradient_accumulation_steps;
    adapted.training.recompute = recompute;
    adapted.parallelism = Parallelism { world_size: ranks, strategy, ..config.parallelism };
    adapted.predicted_peak_bytes = predicted_peak_bytes;
    adapted.predicted_sent_bytes = predicted_sent_bytes;
    let change = change(config, &adapted);
    Ok(Adapted { config: adapted, left: ladder[taken + 1..].to_vec(), change })
}

/// Says what changed and what did not.
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
        "{}: {} sequences a step and the same result{but}, in {} instead of {}",
        changed.join(", "),
        to.global_batch_size(),
        render::bytes(to.predicted_peak_bytes),
        render::bytes(from.predicted_peak_bytes)
    )
}

fn shortfall(config: &RunConfig, ladder: &[Fallback], limit: Option<u64>) -> String {
    let predicted = config.predicted_peak_bytes;
    let least = ladder.last().map_or(predicted, |way| way.predicted_peak_bytes);
    let nothing = "no smaller configuration is left to try";
    match limit {
        Some(limit) if least > limit => format!(
            "{nothing}: the least it needs is {}, {} more than the limit of {}",
            render::bytes(least),
            render::bytes(least - limit),
            render::bytes(limit)
        ),
        Some(limit) => format!(
            "{nothing}: {} are predicted, and the limit of {}, {} above that, was too little",
            render::bytes(predicted),
            render::bytes(limit),
            render::bytes(limit.saturating_sub(predicted))
        ),
        None => format!("{nothing}: {} are predicted", render::bytes(predicted)),
    }
}

/// Says the ways in one line; none if there is none.
pub(super) fn describe(config: &RunConfig, ladder: &[Fallback]) -> Option<String> {
    let mut parts: Vec<(&str, Vec<String>)> = Vec::new();
    let mut last = config.clone();
    let mut left = ladder;
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
    use finetune_contract::RunConfig;

    use super::{adapt, describe};
    use crate::{
        api::Fallback,
        manifest,
        plan::{Place, accelerators::Accelerator, fixture, plan, plan_over},
    };

    /// Plans the small model for a pod of so many GiB.
    fn planned(lines: &str, gib: f64) -> (RunConfig, Vec<Fallback>) {
        let text = format!("{}{lines}", include_str!("../../examples/minimal.yaml"));
        let job = manifest::parse(&text).unwrap();
        let pod = Accelerator {
            name: "cpu".to_owned(),
            memory_gi_b: gib,
            bf16_tflops: 0.5,
            fp32_tflops: 0.2,
            has_bf16: true,
            ..Accelerator::default()
        };
        let report = fixture::report(fixture::smollm2(), 8_000_000_000);
        let plan = plan(&job, &report, Place::on(&pod, &job)).unwrap();
        (plan.run_config, plan.fallbacks)
    }

    #[test]
    fn halves_then_computes_again_then_adds_ranks() {
        let (config, ladder) = planned("", 8.0);
        insta::assert_snapshot!(describe(&config, &ladder).unwrap(), @"trainBatchSizePerDevice 4, 2, 1; then recompute block; then ranks 2, 4, 8, 16");
        let (mut last, mut left) = (config.clone(), ladder);
        let mut said = Vec::new();
        while let Ok(next) = adapt(&last, &left, None) {
            assert_eq!(next.config.global_batch_size(), config.global_batch_size());
            assert!(next.config.predicted_peak_bytes < last.predicted_peak_bytes);
            assert!(next.left.len() < left.len(), "it comes to an end");
            said.push(next.change);
            (last, left) = (next.config, next.left);
        }
        insta::assert_snapshot!(said.join("\n"), @r"
        trainBatchSizePerDevice 4 instead of 8, gradientAccumulationSteps 4 instead of 2: 16 sequences a step and the same result, in 3.02 GB instead of 3.40 GB
        trainBatchSizePerDevice 2 instead of 4, gradientAccumulationSteps 8 instead of 4: 16 sequences a step and the same result, in 2.83 GB instead of 3.02 GB
        trainBatchSizePerDevice 1 instead of 2, gradientAccumulationSteps 16 instead of 8: 16 sequences a step and the same result, in 2.71 GB instead of 2.83 GB
        recompute block instead of none: 16 sequences a step and the same result, in 2.63 GB instead of 2.71 GB
        gradientAccumulationSteps 8 instead of 16, ranks 2 instead of 1, strategy zero3 instead of none: 16 sequences a step and the same result, in 1.74 GB instead of 2.63 GB
        gradientAccumulationSteps 4 instead of 8, ranks 4 instead of 2: 16 sequences a step and the same result, in 1.14 GB instead of 1.74 GB
        gradientAccumulationSteps 2 instead of 4, ranks 8 instead of 4: 16 sequences a step and the same result, in 835 MB instead of 1.14 GB
        gradientAccumulationSteps 1 instead of 2, ranks 16 instead of 8: 16 sequences a step and the same result, in 683 MB instead of 835 MB
        ");
    }

    #[test]
    fn ranks_of_one_machine_share_its_memory_and_are_no_way_out() {
        let job = manifest::parse(include_str!("../../examples/minimal.yaml")).unwrap();
        let report = fixture::report(fixture::smollm2(), 8_000_000_000);
        let plan = plan_over(2, &job, &report, Place::Here(&[])).unwrap();
        assert!(plan.fallbacks.iter().all(|way| way.ranks == 2), "{:?}", plan.fallbacks);
    }

    #[test]
    fn ranks_that_hold_weights_whole_divide_them_before_anything_is_computed_again() {
        let job = manifest::parse(include_str!("../../examples/minimal.yaml")).unwrap();
        let report = fixture::report(fixture::smollm2(), 16_000_000_000);
        let plan = plan_over(2, &job, &report, Place::Here(&[])).unwrap();
        let strategy = plan.run_config.parallelism.strategy;
        let ladder = describe(&plan.run_config, &plan.fallbacks).unwrap();
        insta::assert_snapshot!(format!("{strategy:?}: {ladder}"), @"Zero2: trainBatchSizePerDevice 4, 2, 1; then strategy zero3; then recompute block");
    }

    #[test]
    fn a_micro_batch_without_halves_is_divided_otherwise() {
        let lines = "  training: {trainBatchSizePerDevice: 15, gradientAccumulationSteps: 1, recompute: block}\n  loraConfig: {}\n";
        let (config, ladder) = planned(lines, 8.0);
        let sizes: Vec<_> = ladder
            .iter()
            .map(|way| (way.train_batch_size_per_device, way.gradient_accumulation_steps))
            .collect();
        assert_eq!(sizes, [(5, 3), (1, 15)]);
        assert_eq!(config.global_batch_size(), 15);
    }

    #[test]
    fn passes_over_what_cannot_fit_and_says_what_is_missing() {
        let (config, ladder) = planned("  loraConfig: {}\n", 8.0);
        let adapted = adapt(&config, &ladder, Some(300_000_000)).unwrap();
        insta::assert_snapshot!(adapted.change, @"trainBatchSizePerDevice 1 instead of 8, gradientAccumulationSteps 16 instead of 2: 16 sequences a step and the same result, in 269 MB instead of 967 MB");
        insta::assert_snapshot!(adapt(&config, &ladder, Some(24 << 20)).unwrap_err(), @"no smaller configuration is left to try: the least it needs is 190 MB, 164 MB more than the limit of 25 MB");
        insta::assert_snapshot!(adapt(&config, &[], Some(2_000_000_000)).unwrap_err(), @"no smaller configuration is left to try: 967 MB are predicted, and the limit of 2.00 GB, 1.03 GB above that, was too little");
        insta::assert_snapshot!(adapt(&config, &[], None).unwrap_err(), @"no smaller configuration is left to try: 967 MB are predicted");
    }
}
