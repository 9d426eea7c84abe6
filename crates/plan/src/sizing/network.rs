//! What the ranks of a run send each other.

use finetune_contract::{ModelFacts, Strategy};

use super::workload::{Workload, units};

/// Predicts the bytes a rank sends in one optimizer step of `accumulation` micro-batches.
///
/// # Source
/// A ring all-reduce sends `2 n (W − 1) / W` of `n` bytes, an all-gather and a reduce-scatter half of
/// that. Divided, weights are gathered once a step, for they change only then; but with `zero3` a
/// block forward and backward, though not the two last used, which are still there. Gradients are
/// summed once a step with `zero1`, else those of blocks once a micro-batch.
pub fn sent_bytes(model: &ModelFacts, workload: &Workload, accumulation: u64) -> u64 {
    let share = |bytes: u64| bytes * (workload.ranks - 1) / workload.ranks;
    let summed = 2 * share(4 * workload.trained);
    let [outer, block] = units(model);
    let (s, layers) = (workload.dtype.bytes(), model.cost().blocks);
    let passes = 2 * accumulation * layers.saturating_sub(2);
    let (gathers, sums) = match (workload.strategy, workload.is_full) {
        (Strategy::None | Strategy::Ddp, _) | (Strategy::Zero1 | Strategy::Zero2, false) => {
            return summed;
        }
        (Strategy::Zero3, false) => return summed + share(s * block) * passes,
        (Strategy::Zero1, true) => (layers, layers),
        (Strategy::Zero2, true) => (layers, layers * accumulation),
        (Strategy::Zero3, true) => (passes + layers.min(2), layers * accumulation),
    };
    share(s * outer) + share(s * block) * gathers + share(4 * outer) + share(4 * block) * sums
}
