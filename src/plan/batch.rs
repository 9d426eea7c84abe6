//! Decides the micro-batch, the accumulation and whether blocks are computed again.

use std::cmp::Reverse;

use finetune_contract::{ModelFacts, Recompute, Strategy};

use super::{Decisions, recompute, render, sizing, sizing::Load, word};
use crate::api::Training;

/// Sequences of one optimizer step, unless the data is small.
const DEFAULT_BATCH: u64 = 16;

/// The largest micro-batch chosen without being asked for.
const LARGEST_MICRO_BATCH: u64 = 8;

/// What was decided.
pub(super) struct Batch {
    pub(super) load: Load,
    /// Micro-batches of a step on each rank.
    pub(super) accumulation: u32,
}

/// How large micro-batches may be, and how many sequences a step has.
struct Sizes {
    /// The micro-batch asked for.
    asked: Option<u64>,
    /// The accumulation asked for.
    accumulation: Option<u64>,
    /// Whether either was lowered to the sequences there are.
    is_lowered: bool,
    /// Sequences of a step, unless something was asked for that gives another number.
    global: u64,
    /// A rank's share of them; what does not divide makes the step larger.
    share: u64,
}

impl Sizes {
    fn new(training: &Training, sequences: u64, ranks: u64) -> Self {
        // A power of two, so that large micro-batches divide it.
        let few = (sequences / 4).max(1);
        let global = DEFAULT_BATCH.min(1 << few.ilog2());
        let whole = |value: Option<i32>| value.map(|value| u64::from(value.unsigned_abs()));
        // Copies of rows teach nothing; who counts steps himself has his reasons.
        let at_most = |value: u64, most: u64| {
            if training.max_steps.is_some() { value } else { value.min(most.max(1)) }
        };
        let share = sequences.div_ceil(ranks);
        let asked = whole(training.train_batch_size_per_device).map(|size| at_most(size, share));
        let accumulation = whole(training.gradient_accumulation_steps)
            .map(|steps| at_most(steps, share.div_ceil(asked.unwrap_or(1))));
        Self {
            asked,
            accumulation,
            is_lowered: asked != whole(training.train_batch_size_per_device)
                || accumulation != whole(training.gradient_accumulation_steps),
            global,
            share: global.div_ceil(ranks),
        }
    }

    /// Lists the micro-batches there may be, the largest first.
    fn candidates(&self) -> Vec<u64> {
        if let Some(asked) = self.asked {
            return vec![asked];
        }
        let halves = std::iter::successors(Some(LARGEST_MICRO_BATCH), |size| {
            (*size > 1).then_some(size / 2)
        });
        let divides =
            |micro: &u64| self.accumulation.is_some() || self.share.is_multiple_of(*micro);
        halves.filter(|micro| *micro <= self.share).filter(divides).collect()
    }

    /// Returns the micro-batches of a step on each rank that make up its share.
    fn usual_accumulation(&self, micro_batch: u64) -> u64 {
        self.share.div_ceil(micro_batch)
    }

    fn accumulation(&self, micro_batch: u64) -> u64 {
        self.accumulation.unwrap_or_else(|| self.usual_accumulation(micro_batch))
    }
}

/// Decides how a step is cut into pieces: of what fits, what computes nothing twice; of that, what
/// sends least; of that, the largest micro-batch, then what holds least.
pub(super) fn decide(
    training: &Training,
    model: &ModelFacts,
    load: Load,
    sequences: u64,
    usable: u64,
    decisions: &mut Decisions,
    rejected: &mut Decisions,
) -> Batch {
    let needs = |load: &Load| sizing::memory(model, load).total();
    let sizes = Sizes::new(training, sequences, load.ranks);
    let candidates = sizes.candidates();
    let smallest = *candidates.last().unwrap_or(&1);
    // The way with the largest micro-batch that fits; the smallest if none does.
    let cut = |way: Load| {
        let sized = |micro_batch| Load { micro_batch, ..way };
        let fits = candidates.iter().map(|&size| sized(size)).find(|way| needs(way) <= usable);
        fits.unwrap_or_else(|| sized(smallest))
    };
    let sends = |way: &Load| sizing::sent_bytes(model, way, sizes.accumulation(way.micro_batch));
    let ways = |recompute| {
        let cut = |strategy| cut(Load { recompute, strategy, ..load });
        strategies(&load).iter().map(|&strategy| cut(strategy)).collect::<Vec<_>>()
    };
    let least_sent = |ways: Vec<Load>| {
        ways.into_iter()
            .filter(|way| needs(way) <= usable)
            .min_by_key(|way| (sends(way), Reverse(way.micro_batch), needs(way)))
    };
    let set = recompute(training.recompute);
    let allowed = set.map_or(vec![Recompute::None, Recompute::Block], |set| vec![set]);
    let fitting = allowed.iter().find_map(|&recompute| least_sent(ways(recompute)));
    // What needs least, to say what is missing.
    let closest = || allowed.iter().flat_map(|&recompute| ways(recompute)).min_by_key(needs);
    let chosen = fitting.or_else(closest).unwrap_or(load);

    explain_strategy(&chosen, &ways(chosen.recompute), needs, sends, usable, decisions, rejected);
    let reason = match (set, chosen.recompute) {
        (Some(_), _) => "set in the manifest",
        (None, Recompute::None) => "fits the memory, and computes nothing twice",
        (None, Recompute::Block) => {
            let whole = ways(Recompute::None).iter().map(needs).min().unwrap_or(0);
            rejected.add("recompute", "none", does_not_fit(whole, usable));
            "the only way to fit the memory; about a third slower"
        }
    };
    decisions.add("recompute", word(&chosen.recompute), reason);
    for &micro_batch in candidates.iter().take_while(|size| **size > chosen.micro_batch) {
        let reason = does_not_fit(needs(&Load { micro_batch, ..chosen }), usable);
        rejected.add("trainBatchSizePerDevice", micro_batch, reason);
    }
    let lowered = format!("set in the manifest, lowered: there are only {sequences} sequences");
    let why = match (sizes.asked, sizes.is_lowered) {
        (Some(_), false) => "set in the manifest",
        (Some(_), true) => &lowered,
        (None, _) => "as many as fit the memory, at most 8",
    };
    decisions.add("trainBatchSizePerDevice", chosen.micro_batch, why);
    let usual = sizes.usual_accumulation(chosen.micro_batch);
    let why_steps = sizes.explain(usual * chosen.micro_batch * load.ranks, sequences, load.ranks);
    let steps = decisions.pick("gradientAccumulationSteps", sizes.accumulation, usual, &why_steps);
    Batch { load: chosen, accumulation: steps as u32 }
}

impl Sizes {
    /// Says why a step has `really` sequences: asked for, the micro-batch need not divide them.
    fn explain(&self, really: u64, sequences: u64, ranks: u64) -> String {
        let Self { global, .. } = *self;
        let over = if ranks > 1 { format!(" over {ranks} ranks") } else { String::new() };
        if really != global {
            format!("{really} sequences a step{over}, the fewest not below {global}")
        } else if global == DEFAULT_BATCH {
            format!("{global} sequences a step{over}")
        } else {
            format!(
                "{global} of only {sequences} sequences a step{over}, so that there are several steps"
            )
        }
    }
}

/// Lists what ranks may divide beside the sequences, what they have whole first.
///
/// Of a model trained whole the optimizer's state is always divided: summing parts of the gradient
/// and gathering weights sends no more than summing all of it everywhere.
const fn strategies(load: &Load) -> &'static [Strategy] {
    match (load.ranks, load.is_full) {
        (1, _) => &[Strategy::None],
        (_, true) => &[Strategy::Zero1, Strategy::Zero2, Strategy::Zero3],
        (_, false) => &[Strategy::Ddp, Strategy::Zero3],
    }
}

/// Says why ranks divide what they do, and why nothing else.
fn explain_strategy(
    chosen: &Load,
    ways: &[Load],
    needs: impl Fn(&Load) -> u64,
    sends: impl Fn(&Load) -> u64,
    usable: u64,
    decisions: &mut Decisions,
    rejected: &mut Decisions,
) {
    if chosen.ranks == 1 {
        return;
    }
    for way in ways.iter().filter(|way| way.strategy != chosen.strategy) {
        let reason = if needs(way) > usable {
            does_not_fit(needs(way), usable)
        } else {
            let [there, here] = [way, chosen].map(|way| render::bytes(sends(way)));
            if sends(way) == sends(chosen) {
                format!("sends as much in a step, {here}, and needs {}", render::bytes(needs(way)))
            } else {
                format!("sends {there} in a step where {here} are enough")
            }
        };
        rejected.add("strategy", word(&way.strategy), reason);
    }
    let divides = match (chosen.strategy, chosen.is_full) {
        (Strategy::None | Strategy::Ddp, _) => "each rank holds everything and sends gradients",
        (Strategy::Zero1, _) => "divides moments",
        (Strategy::Zero2, _) => "divides moments and gradients",
        (Strategy::Zero3, true) => "divides moments, gradients and weights",
        (Strategy::Zero3, false) => "divides the frozen weights",
    };
    let reason = format!("{divides}; of what fits, what sends least");
    decisions.add("strategy", word(&chosen.strategy), reason);
}

fn does_not_fit(bytes: u64, usable: u64) -> String {
    format!("{} do not fit {}", render::bytes(bytes), render::bytes(usable))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(training: &Training, sequences: u64, ranks: u64) -> (Option<u64>, Option<u64>, bool) {
        let Sizes { asked, accumulation, is_lowered, .. } = Sizes::new(training, sequences, ranks);
        (asked, accumulation, is_lowered)
    }

    #[test]
    fn a_step_has_no_more_sequences_than_there_are() {
        let training = |batch: i32, accumulation: Option<i32>, max_steps: Option<i64>| Training {
            train_batch_size_per_device: Some(batch),
            gradient_accumulation_steps: accumulation,
            max_steps,
            ..Training::default()
        };
        assert_eq!(check(&training(64, None, None), 5, 1), (Some(5), None, true));
        assert_eq!(check(&training(4, Some(8), None), 5, 1), (Some(4), Some(2), true));
        assert_eq!(check(&training(2, Some(2), None), 5, 1), (Some(2), Some(2), false));
        assert_eq!(check(&training(64, None, None), 5, 2), (Some(3), None, true));
        // Who counts steps gets what was asked for.
        assert_eq!(check(&training(64, None, Some(2)), 5, 1), (Some(64), None, false));
    }
}
