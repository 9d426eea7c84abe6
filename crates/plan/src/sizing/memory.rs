//! The memory of a run, by term.
//!
//! What a token costs is the model's own ([`finetune_contract::cost::CostFacts`], declared by its
//! architecture in the trainer); the constants below are those of the process.

use finetune_contract::{
    Dtype, ModelFacts, Optimizer, Recompute, Strategy,
    cost::{
        CHECKPOINT_BYTES_PER_PARAMETER, HEAD_ROWS, MOMENTS_BLOCK, UPLOAD_PART_BYTES,
        UPLOAD_PARTS_IN_FLIGHT,
    },
};
use serde::Serialize;

use super::workload::{Workload, units};

/// The share of the machine's memory a plan may take; the rest is page cache and the system.
pub const USABLE_MEMORY: f64 = 0.9;

/// Returns how many of a machine's or device's bytes a plan may take.
pub fn budget(bytes: u64) -> u64 {
    (bytes as f64 * USABLE_MEMORY) as u64
}

/// fp32 weight and gradient, per trained parameter.
pub const STATE_BYTES: u64 = 8;

/// What the process holds beside tensors: allocator, tokenizer, token file, threads.
///
/// # Source
/// Fitted to the measured steps of `docs/memory.csv`.
pub const RUNTIME_BYTES: u64 = 75_000_000;

/// The same where tensors are on a device: its context, libraries' workspaces, buffers of
/// collectives, and the part of the optimizer's state worked on at once.
///
/// # Source
/// An estimate: 0.8 GB of context and workspaces, 0.4 GB of NCCL's, 0.3 GB of the optimizer's. Not
/// measured.
pub const DEVICE_RUNTIME_BYTES: u64 = 1_500_000_000;

/// What is in memory, at most, of a checkpoint that is uploaded from local disk.
pub const UPLOAD_BYTES: u64 = UPLOAD_PART_BYTES * UPLOAD_PARTS_IN_FLIGHT;

/// Memory of a run by term, in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Memory {
    /// Base weights read in place from the file: reclaimable, not part of the total.
    pub mapped_weights: u64,
    /// Base weights converted to the compute type.
    pub weights: u64,
    /// Trained parameters: masters, gradients, moments, and the compute copy; of a rank, its part.
    pub trained_state: u64,
    /// Units gathered whole while they are used, and their gradients.
    pub gathered: u64,
    /// What the forward pass keeps for the backward pass.
    pub activations: u64,
    /// Logits of one chunk; their gradient takes their place.
    pub head: u64,
    /// The backward pass of one block.
    pub temporaries: u64,
    /// The checkpoint that is written while training goes on: of adapters a copy, else what is on
    /// its way from local disk.
    pub checkpoint: u64,
    /// The process itself.
    pub runtime: u64,
}

impl Memory {
    /// Returns the peak of anonymous memory.
    pub fn total(&self) -> u64 {
        let Self {
            mapped_weights: _,
            weights,
            trained_state,
            gathered,
            activations,
            head,
            temporaries,
            checkpoint,
            runtime,
        } = self;
        weights + trained_state + gathered + activations + head + temporaries + checkpoint + runtime
    }

    /// Returns the terms with their names, in the order shown.
    pub fn terms(&self) -> [(&'static str, u64); 8] {
        [
            ("weights, converted", self.weights),
            ("trained state", self.trained_state),
            ("gathered units", self.gathered),
            ("activations", self.activations),
            ("output head", self.head),
            ("temporaries", self.temporaries),
            ("checkpoint", self.checkpoint),
            ("runtime", self.runtime),
        ]
    }
}

/// Returns whether weights are computed with as they are in the file, so that none is converted.
pub fn is_computed_as_stored(model: &ModelFacts, dtype: Dtype) -> bool {
    match dtype {
        Dtype::Bf16 => model.weight_dtype == "BF16",
        Dtype::Fp32 => model.weight_dtype == "F32",
    }
}

/// Predicts the memory of a run on `model`, of each rank.
pub fn memory(model: &ModelFacts, workload: &Workload) -> Memory {
    let Workload { trained, is_full, dtype, recompute, micro_batch, context, is_device, .. } =
        *workload;
    let cost = model.cost();
    let s = dtype.bytes();
    let t = micro_batch * context;
    let on_disk_is_compute = is_computed_as_stored(model, dtype);
    let activations = match recompute {
        Recompute::None => t * (s * cost.saved_elements + cost.saved_bytes),
        // What the block at work saves fits where the head's logits were.
        Recompute::Block => t * s * cost.checkpointed_elements,
    };
    // The gradient of the largest weight in the computation's type, before it is added in fp32.
    let weight_gradient = if is_full && dtype == Dtype::Bf16 { cost.largest_weight * s } else { 0 };
    let is_sharded = workload.strategy == Strategy::Zero3;
    let divides = |is_divided: bool, bytes: u64| {
        if is_divided { bytes.div_ceil(workload.ranks) } else { bytes }
    };
    let divides_state = is_full && !matches!(workload.strategy, Strategy::None | Strategy::Ddp);
    // Room for the outer unit and two blocks, or for all; in full also for gradients, and for what
    // the other ranks send of the largest unit.
    let [outer, block] = units(model);
    let turns = outer + 2 * block;
    let received = outer.max(block);
    let gathered = match (workload.strategy, is_full) {
        (Strategy::None | Strategy::Ddp, _) | (Strategy::Zero1 | Strategy::Zero2, false) => 0,
        (Strategy::Zero1, true) => s * model.parameters + 4 * (model.parameters + received),
        (Strategy::Zero2, true) => s * model.parameters + 4 * (turns + received),
        (Strategy::Zero3, true) => s * turns + 4 * (turns + received),
        (Strategy::Zero3, false) => s * turns,
    };
    let is_fp32 = dtype == Dtype::Fp32;
    let temporaries = if is_device {
        let scores = if is_fp32 { cost.device_score_bytes * context } else { 0 };
        t * (s * cost.device_temporary_elements + cost.device_temporary_bytes + scores)
    } else {
        let attention = if is_fp32 { cost.fp32_attention_elements } else { 0 };
        t * s * (cost.temporary_elements + attention)
    };
    // On a device the loss is computed on a copy in fp32, whose gradient is converted back.
    let of_logit = if is_device { 2 * s + 4 } else { s };
    // Only what is predicted has logits. Held-out rows may have more targets, but then no activations
    // are kept.
    let logits = |rows: u64| HEAD_ROWS.min(rows) * cost.logits * of_logit;
    let evaluated = logits(t).saturating_sub(activations);
    let head = logits(micro_batch * workload.targets.min(context)).max(evaluated);
    // A device's state is copied to the host's memory.
    let checkpoint = if is_device { 0 } else { trained * CHECKPOINT_BYTES_PER_PARAMETER };
    let moments = match workload.optimizer {
        Optimizer::Adamw => 2 * 4 * trained,
        Optimizer::Adamw8bit => 2 * trained + (2 * 4 * trained).div_ceil(MOMENTS_BLOCK),
    };
    let state = trained * (STATE_BYTES + if dtype == Dtype::Bf16 { s } else { 0 }) + moments;
    Memory {
        mapped_weights: if is_device || is_sharded || divides_state {
            0
        } else {
            model.weight_bytes
        },
        weights: if is_full || (on_disk_is_compute && !is_device && !is_sharded) {
            0
        } else {
            divides(is_sharded, model.parameters * s)
        },
        trained_state: divides(divides_state, state),
        gathered,
        activations,
        head,
        temporaries: temporaries + weight_gradient,
        checkpoint: if is_full { checkpoint.min(UPLOAD_BYTES) } else { checkpoint },
        runtime: if is_device { DEVICE_RUNTIME_BYTES } else { RUNTIME_BYTES },
    }
}

#[cfg(test)]
mod tests {
    use finetune_contract::{Dtype, Optimizer, Recompute, Strategy};
    use proptest::prelude::{prop_assert, proptest};

    use super::{HEAD_ROWS, memory};
    use crate::{
        sizing::{Workload, sent_bytes},
        testing,
    };

    fn workload(trained: u64, is_full: bool, recompute: Recompute) -> Workload {
        Workload {
            trained,
            is_full,
            dtype: Dtype::Bf16,
            optimizer: Optimizer::Adamw,
            recompute,
            micro_batch: 4,
            context: 256,
            targets: 256,
            is_device: false,
            ranks: 1,
            strategy: Strategy::None,
        }
    }

    /// Steps measured by `cargo xtask bench memory`.
    const MEASURED: &str = include_str!("../../../../docs/memory.csv");

    #[test]
    fn predictions_are_at_most_5_percent_over_and_2_under_what_was_measured() {
        let model = testing::smollm2();
        let mut lines = MEASURED.lines();
        assert_eq!(lines.next(), Some("method,dtype,recompute,rows,tokens,peak_anonymous_bytes"));
        let mut count = 0;
        for line in lines {
            let cells: Vec<&str> = line.split(',').collect();
            let [method, dtype, recompute, rows, tokens, bytes] = cells[..] else {
                panic!("{line:?} has not 6 cells");
            };
            let is_full = method == "full";
            let policy = if recompute == "block" { Recompute::Block } else { Recompute::None };
            let workload = Workload {
                dtype: if dtype == "bf16" { Dtype::Bf16 } else { Dtype::Fp32 },
                micro_batch: rows.parse().unwrap(),
                context: tokens.parse().unwrap(),
                targets: tokens.parse().unwrap(),
                ..workload(if is_full { model.parameters } else { 2_442_240 }, is_full, policy)
            };
            // The steps were measured without checkpoints.
            let predicted = memory(&model, &workload);
            let predicted = (predicted.total() - predicted.checkpoint) as f64;
            let ratio = predicted / bytes.parse::<f64>().unwrap();
            assert!(
                (0.98..=1.05).contains(&ratio),
                "{line}: predicted {predicted}, {ratio:.3} of it"
            );
            count += 1;
        }
        assert!(count >= 30, "only {count} steps were measured");
    }

    #[test]
    fn moments_of_a_byte_save_six_bytes_a_parameter() {
        let model = testing::smollm2();
        let full = workload(model.parameters, true, Recompute::None);
        let small = Workload { optimizer: Optimizer::Adamw8bit, ..full };
        let saved = memory(&model, &full).total() - memory(&model, &small).total();
        let a_parameter = saved as f64 / model.parameters as f64;
        assert!((5.96..6.0).contains(&a_parameter), "{a_parameter}");
    }

    /// What two ranks took of 4x256 each, by strategy (`docs/log/2026-11.md`).
    #[test]
    fn predicts_measured_divided_runs() {
        let model = testing::smollm2();
        for (strategy, bytes) in
            [(Strategy::Zero1, 2_616e6), (Strategy::Zero2, 2_218e6), (Strategy::Zero3, 2_024e6)]
        {
            let workload = Workload {
                ranks: 2,
                strategy,
                ..workload(model.parameters, true, Recompute::None)
            };
            let predicted = memory(&model, &workload);
            let ratio = (predicted.total() - predicted.checkpoint) as f64 / bytes;
            assert!((0.98..1.05).contains(&ratio), "{strategy:?}: {ratio} {predicted:?}");
        }
    }

    #[test]
    fn only_predicted_positions_have_logits() {
        let model = testing::smollm2();
        let head = |targets, recompute| {
            let workload = Workload { targets, ..workload(2_442_240, false, recompute) };
            memory(&model, &workload).head
        };
        let row = u64::from(model.vocab_size) * 2;
        assert_eq!(head(256, Recompute::None), HEAD_ROWS * row);
        assert_eq!(head(100, Recompute::None), 4 * 100 * row);
        // Where little is kept, held-out rows of nothing but targets need more.
        let kept = 30 * 4 * 256 * 2 * u64::from(model.hidden_size);
        assert_eq!(head(10, Recompute::Block), (HEAD_ROWS * row - kept).max(4 * 10 * row));
    }

    #[test]
    fn sharding_divides_the_state_and_sends_for_each_micro_batch() {
        let model = testing::smollm2();
        let whole = workload(model.parameters, true, Recompute::None);
        let over = |ranks, strategy| Workload { ranks, strategy, ..whole };
        let (ddp, zero3) = (over(4, Strategy::Ddp), over(4, Strategy::Zero3));
        assert_eq!(memory(&model, &ddp), memory(&model, &whole));
        let state = |workload| memory(&model, workload).trained_state;
        assert_eq!(state(&zero3), state(&whole) / 4);
        // bf16 weights gathered twice and fp32 gradients once, over fp32 gradients twice: 8 to 8
        // bytes a parameter, less what need not be gathered again.
        let ratio = sent_bytes(&model, &zero3, 1) as f64 / sent_bytes(&model, &ddp, 1) as f64;
        assert!((0.85..1.0).contains(&ratio), "{ratio}");
        // Measured over two ranks, less the 16 bytes of two numbers.
        let two = |strategy| Workload { ranks: 2, strategy, ..whole };
        assert_eq!(sent_bytes(&model, &two(Strategy::Zero3), 1), 502_667_728 - 16);
        assert_eq!(sent_bytes(&model, &two(Strategy::Ddp), 1), 538_060_040 - 8);
        for strategy in [Strategy::Zero1, Strategy::Zero2] {
            assert_eq!(sent_bytes(&model, &two(strategy), 1), 403_545_040 - 16);
        }
        let ratio = sent_bytes(&model, &zero3, 2) as f64 / sent_bytes(&model, &zero3, 1) as f64;
        assert!((1.6..2.0).contains(&ratio), "{ratio}");
    }

    proptest! {
        #[test]
        fn more_positions_never_need_less(micro in 1_u64..64, context in 16_u64..8192) {
            let model = testing::smollm2();
            for recompute in [Recompute::None, Recompute::Block] {
                let at = |micro_batch, context| {
                    let whole = workload(2_442_240, false, recompute);
                    let workload = Workload { micro_batch, context, targets: context, ..whole };
                    memory(&model, &workload).total()
                };
                prop_assert!(at(micro, context) <= at(micro + 1, context));
                prop_assert!(at(micro, context) <= at(micro, context + 1));
            }
        }
    }
}
