//! Decides the micro-batch, the accumulation and whether blocks are computed again.

use finetune_contract::{ModelFacts, Recompute};

use super::{Decisions, recompute, render, sizing, sizing::Load, word};
use crate::api::Training;

/// Sequences of one optimizer step, unless the data is small.
const DEFAULT_BATCH: u64 = 16;

/// The largest micro-batch chosen without being asked for.
const LARGEST_MICRO_BATCH: u64 = 8;

/// What was decided.
pub(super) struct Batch {
    pub(super) load: Load,
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
    let why_global = if global == DEFAULT_BATCH {
        format!("{global} sequences a step")
    } else {
        format!("{global} of only {sequences} sequences a step, so that there are several steps")
    };
    let accumulation =
        training.gradient_accumulation_steps.map(|steps| u64::from(steps.unsigned_abs()));
    let micro_batch = asked.unwrap_or_else(|| {
        let divides = |micro: &u64| accumulation.is_some() || global.is_multiple_of(*micro);
        let sizes = std::iter::successors(Some(LARGEST_MICRO_BATCH), |size| {
            (*size > 1).then_some(size / 2)
        });
        for micro in sizes.filter(|micro| *micro <= global).filter(divides) {
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
    let default = global.div_ceil(micro_batch);
    // Asked for, the micro-batch need not divide the usual batch: say what a step really has.
    let why_steps = if default * micro_batch == global {
        why_global
    } else {
        format!("{} sequences a step, the fewest not below {global}", default * micro_batch)
    };
    let steps = decisions.pick("gradientAccumulationSteps", accumulation, default, &why_steps);
    Batch { load: Load { micro_batch, ..load }, accumulation: steps as u32 }
}
