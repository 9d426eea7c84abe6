//! Decides the micro-batch, the accumulation and whether blocks are computed again.

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
    let asked = training.train_batch_size_per_device.map(|size| u64::from(size.unsigned_abs()));
    let smallest = Load { micro_batch: asked.unwrap_or(1), ..load };
    let smallest = strategy(training, model, smallest, usable, decisions, rejected);
    let load = Load { strategy: smallest.strategy, ..load };
    let chosen = recompute(training.recompute).unwrap_or_else(|| {
        if needs(&smallest) <= usable { Recompute::None } else { Recompute::Block }
    });
    let reason = match (recompute(training.recompute), chosen) {
        (Some(_), _) => "set in the manifest".to_owned(),
        (None, Recompute::None) => "fits the memory, and computes nothing twice".to_owned(),
        (None, Recompute::Block) => {
            let reason =
                format!("{} do not fit {}", render::bytes(needs(&smallest)), render::bytes(usable));
            rejected.add("recompute", "none", reason);
            "the only way to fit the memory; about a third slower".to_owned()
        }
    };
    decisions.add("recompute", word(&chosen), reason);
    let load = Load { recompute: chosen, ..load };

    // A power of two, so that large micro-batches divide it.
    let few = (sequences / 4).max(1);
    let global = DEFAULT_BATCH.min(1 << few.ilog2());
    let ranks = load.ranks;
    let over = if ranks > 1 { format!(" over {ranks} ranks") } else { String::new() };
    let why_global = if global == DEFAULT_BATCH {
        format!("{global} sequences a step{over}")
    } else {
        format!(
            "{global} of only {sequences} sequences a step{over}, so that there are several steps"
        )
    };
    // What a rank has to do of it; what does not divide makes the step larger.
    let share = global.div_ceil(ranks);
    let accumulation =
        training.gradient_accumulation_steps.map(|steps| u64::from(steps.unsigned_abs()));
    let micro_batch = asked.unwrap_or_else(|| {
        let divides = |micro: &u64| accumulation.is_some() || share.is_multiple_of(*micro);
        let sizes = std::iter::successors(Some(LARGEST_MICRO_BATCH), |size| {
            (*size > 1).then_some(size / 2)
        });
        for micro in sizes.filter(|micro| *micro <= share).filter(divides) {
            let bytes = needs(&Load { micro_batch: micro, ..load });
            if bytes <= usable {
                return micro;
            }
            rejected.add(
                "trainBatchSizePerDevice",
                micro,
                format!("{} do not fit {}", render::bytes(bytes), render::bytes(usable)),
            );
        }
        1
    });
    let why = if asked.is_some() {
        "set in the manifest"
    } else {
        "as many as fit the memory, at most 8"
    };
    decisions.add("trainBatchSizePerDevice", micro_batch, why);
    let default = share.div_ceil(micro_batch);
    // Asked for, the micro-batch need not divide the usual batch: say what a step really has.
    let really = default * micro_batch * ranks;
    let why_steps = if really == global {
        why_global
    } else {
        format!("{really} sequences a step{over}, the fewest not below {global}")
    };
    let steps = decisions.pick("gradientAccumulationSteps", accumulation, default, &why_steps);
    Batch { load: Load { micro_batch, ..load }, accumulation: steps as u32 }
}

/// Decides what ranks divide beside the sequences: nothing while all of it fits each of them.
///
/// Sharding sends for every micro-batch what whole ranks send for a step, and waits for it at every
/// block; computing blocks again costs a third of the time, whatever the network. So the order is:
/// neither, sharding, computing again, both.
fn strategy(
    training: &Training,
    model: &ModelFacts,
    load: Load,
    usable: u64,
    decisions: &mut Decisions,
    rejected: &mut Decisions,
) -> Load {
    if load.ranks == 1 {
        return load;
    }
    let needs = |load: &Load| sizing::memory(model, load).total();
    let allowed: Vec<Recompute> = match recompute(training.recompute) {
        Some(set) => vec![set],
        None => vec![Recompute::None, Recompute::Block],
    };
    let ways = allowed.iter().flat_map(|&recompute| {
        [Strategy::Ddp, Strategy::Zero3].map(|strategy| Load { recompute, strategy, ..load })
    });
    let ways: Vec<Load> = ways.collect();
    let chosen = ways.iter().find(|way| needs(way) <= usable).or(ways.last()).copied();
    let chosen = chosen.unwrap_or(load);
    let ddp = Load { strategy: Strategy::Ddp, ..chosen };
    let reason = match chosen.strategy {
        Strategy::Zero3 => {
            let reason =
                format!("{} do not fit {}", render::bytes(needs(&ddp)), render::bytes(usable));
            rejected.add("strategy", "ddp", reason);
            "divides weights, gradients and moments, which do not fit each rank"
        }
        Strategy::Ddp | Strategy::None => {
            "each rank holds everything, which fits, and sends only gradients"
        }
    };
    decisions.add("strategy", word(&chosen.strategy), reason);
    Load { recompute: load.recompute, ..chosen }
}
