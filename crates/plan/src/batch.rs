//! Decides the micro-batch, the accumulation and whether activations are checkpointed.

use std::cmp::Reverse;

use finetune_api::{Recomputation, Training};
use finetune_contract::{ModelFacts, Recompute, Strategy};

use super::{
    choices::Choices,
    sizing::{self, Workload},
    units::{self, word},
};

/// Sequences of one optimizer step, unless the data is small.
const DEFAULT_BATCH: u64 = 16;

/// The largest micro-batch chosen without being asked for.
const LARGEST_MICRO_BATCH: u64 = 8;

/// What was decided.
pub(super) struct Batch {
    pub(super) workload: Workload,
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
    fn micro_batches(&self) -> Vec<u64> {
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
    workload: Workload,
    sequences: u64,
    budget: u64,
    decisions: &mut Choices,
    rejected: &mut Choices,
) -> Batch {
    let needs = |workload: &Workload| sizing::memory(model, workload).total();
    let sizes = Sizes::new(training, sequences, workload.ranks);
    let micro_batches = sizes.micro_batches();
    let smallest = *micro_batches.last().unwrap_or(&1);
    // With the largest micro-batch that fits; the smallest if none does.
    let cut = |candidate: Workload| {
        let sized = |micro_batch| Workload { micro_batch, ..candidate };
        let fits = micro_batches
            .iter()
            .map(|&size| sized(size))
            .find(|candidate| needs(candidate) <= budget);
        fits.unwrap_or_else(|| sized(smallest))
    };
    let sends = |candidate: &Workload| {
        sizing::sent_bytes(model, candidate, sizes.accumulation(candidate.micro_batch))
    };
    let candidates = |recompute| {
        let cut = |strategy| cut(Workload { recompute, strategy, ..workload });
        strategies(&workload).iter().map(|&strategy| cut(strategy)).collect::<Vec<_>>()
    };
    let least_sent = |candidates: Vec<Workload>| {
        candidates.into_iter().filter(|candidate| needs(candidate) <= budget).min_by_key(
            |candidate| (sends(candidate), Reverse(candidate.micro_batch), needs(candidate)),
        )
    };
    let set = training.recompute.and_then(Recomputation::fixed);
    let allowed = set.map_or(vec![Recompute::None, Recompute::Block], |set| vec![set]);
    let fitting = allowed.iter().find_map(|&recompute| least_sent(candidates(recompute)));
    // What needs least, to say what is missing.
    let closest = || allowed.iter().flat_map(|&recompute| candidates(recompute)).min_by_key(needs);
    let chosen = fitting.or_else(closest).unwrap_or(workload);

    explain_strategy(
        &chosen,
        &candidates(chosen.recompute),
        needs,
        sends,
        budget,
        decisions,
        rejected,
    );
    let reason = match (set, chosen.recompute) {
        (Some(_), _) => "set in the manifest",
        (None, Recompute::None) => "fits the memory, and computes nothing twice",
        (None, Recompute::Block) => {
            let whole = candidates(Recompute::None).iter().map(needs).min().unwrap_or(0);
            rejected.add("recompute", "none", does_not_fit(whole, budget));
            "the only way to fit the memory; about a third slower"
        }
    };
    decisions.add("recompute", word(&chosen.recompute), reason);
    for &micro_batch in micro_batches.iter().take_while(|size| **size > chosen.micro_batch) {
        let reason = does_not_fit(needs(&Workload { micro_batch, ..chosen }), budget);
        rejected.add("trainBatchSizePerDevice", micro_batch, reason);
    }
    let lowered = format!("set in the manifest, lowered: there are only {sequences} sequences");
    let why = match (sizes.asked, sizes.is_lowered) {
        (Some(_), false) => "set in the manifest",
        (Some(_), true) => &lowered,
        (None, _) => "as many as fit in memory, at most 8",
    };
    decisions.add("trainBatchSizePerDevice", chosen.micro_batch, why);
    let usual = sizes.usual_accumulation(chosen.micro_batch);
    let why_steps =
        sizes.explain(usual * chosen.micro_batch * workload.ranks, sequences, workload.ranks);
    let steps = decisions.pick("gradientAccumulationSteps", sizes.accumulation, usual, &why_steps);
    Batch { workload: chosen, accumulation: steps as u32 }
}

impl Sizes {
    /// Explains why a step has `really` sequences: asked for, the micro-batch need not divide them.
    fn explain(&self, really: u64, sequences: u64, ranks: u64) -> String {
        let Self { global, .. } = *self;
        let over = if ranks > 1 { format!(" over {ranks} ranks") } else { String::new() };
        if really != global {
            format!("{really} sequences per step{over}, the fewest not below {global}")
        } else if global == DEFAULT_BATCH {
            format!("{global} sequences per step{over}")
        } else {
            format!(
                "{global} of only {sequences} sequences per step{over}, so that there are several steps"
            )
        }
    }
}

/// Lists what ranks may divide beside the sequences, what they have whole first.
///
/// Of a model trained whole the optimizer's state is always divided: summing parts of the gradient
/// and gathering weights sends no more than summing all of it everywhere.
const fn strategies(workload: &Workload) -> &'static [Strategy] {
    match (workload.ranks, workload.is_full) {
        (1, _) => &[Strategy::None],
        (_, true) => &[Strategy::Zero1, Strategy::Zero2, Strategy::Zero3],
        (_, false) => &[Strategy::Ddp, Strategy::Zero3],
    }
}

/// Explains why ranks divide what they do, and why nothing else.
fn explain_strategy(
    chosen: &Workload,
    candidates: &[Workload],
    needs: impl Fn(&Workload) -> u64,
    sends: impl Fn(&Workload) -> u64,
    budget: u64,
    decisions: &mut Choices,
    rejected: &mut Choices,
) {
    if chosen.ranks == 1 {
        return;
    }
    for candidate in candidates.iter().filter(|candidate| candidate.strategy != chosen.strategy) {
        let reason = if needs(candidate) > budget {
            does_not_fit(needs(candidate), budget)
        } else {
            let [there, here] = [candidate, chosen].map(|candidate| units::bytes(sends(candidate)));
            if sends(candidate) == sends(chosen) {
                format!(
                    "sends as much in a step, {here}, and needs {}",
                    units::bytes(needs(candidate))
                )
            } else {
                format!("sends {there} in a step where {here} are enough")
            }
        };
        rejected.add("strategy", word(&candidate.strategy), reason);
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

fn does_not_fit(bytes: u64, budget: u64) -> String {
    format!("{} does not fit in {}", units::bytes(bytes), units::bytes(budget))
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
