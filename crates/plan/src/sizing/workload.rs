//! What the cost of a run depends on.

use finetune_contract::{Dtype, ModelFacts, Optimizer, Recompute, Strategy};

/// All that memory depends on.
#[derive(Debug, Clone, Copy)]
pub struct Workload {
    /// Parameters trained.
    pub trained: u64,
    /// Whether all of the model is trained.
    pub is_full: bool,
    /// The element type of the computation.
    pub dtype: Dtype,
    /// What takes the steps.
    pub optimizer: Optimizer,
    /// What a block keeps.
    pub recompute: Recompute,
    /// Sequences of one micro-batch.
    pub micro_batch: u64,
    /// Positions of a sequence.
    pub context: u64,
    /// Those of them that are predicted, at most.
    pub targets: u64,
    /// Whether it runs on a device, to which frozen weights are copied: there is nothing to map.
    pub is_device: bool,
    /// Processes that train together.
    pub ranks: u64,
    /// What is divided over them.
    pub strategy: Strategy,
}

/// Returns the parameters outside the blocks, which are gathered together, and of one block.
pub(super) fn units(model: &ModelFacts) -> [u64; 2] {
    let cost = model.cost();
    let blocks = model.parameters.saturating_sub(cost.outer_parameters);
    [cost.outer_parameters, blocks / cost.blocks]
}
