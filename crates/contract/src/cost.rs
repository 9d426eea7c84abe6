//! What the plan's prediction of memory and time depends on: what a model costs to train, as its
//! architecture declares it, and numbers of the trainer's implementation.

use serde::{Deserialize, Serialize};

use crate::ModelFacts;

/// Rows of the output head whose logits are computed at once.
pub const HEAD_ROWS: u64 = 512;

/// Parameters whose optimizer moments share an fp32 scale each, where a moment is one byte.
pub const MOMENTS_BLOCK: u64 = 256;

/// What a checkpoint keeps of a trained parameter, in bytes: the fp32 weight and the two moments.
pub const CHECKPOINT_BYTES_PER_PARAMETER: u64 = 12;

/// The size of one part of a multipart upload, unless the file has too many of them, in bytes.
pub const UPLOAD_PART_BYTES: u64 = 8 << 20;

/// How many parts of one file are uploaded at once.
pub const UPLOAD_PARTS_IN_FLIGHT: u64 = 4;

/// What a model costs to train, per token of a micro-batch where not said otherwise.
///
/// The trainer's architecture declares it beside the layers whose cost it is, so the planner knows no
/// model family. "Elements" are of the computation's type; "bytes" do not depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CostFacts {
    /// Elements that all blocks save for the backward pass.
    pub saved_elements: u64,
    /// Bytes that all blocks save beside them, such as the softmax's logarithms in fp32.
    pub saved_bytes: u64,
    /// Elements that are saved with activation checkpointing: the inputs of all blocks.
    pub checkpointed_elements: u64,
    /// Elements of the temporaries of one block's backward pass, on our CPU kernels.
    pub temporary_elements: u64,
    /// Elements that fp32 attention adds to these on CPUs where libtorch computes it.
    pub fp32_attention_elements: u64,
    /// Elements of the same temporaries on a device, where libtorch's operators run one by one.
    pub device_temporary_elements: u64,
    /// Bytes of fp32 temporaries beside them.
    pub device_temporary_bytes: u64,
    /// Bytes of attention scores per token *and position of the context*, where a device computes
    /// attention in fp32.
    pub device_score_bytes: u64,
    /// Logits of one token.
    pub logits: u64,
    /// Elements of the largest weight, in all.
    pub largest_weight: u64,
    /// Parameters outside the blocks, in all.
    pub outer_parameters: u64,
    /// The number of blocks, which cost alike.
    pub blocks: u64,
}

impl ModelFacts {
    /// Returns what the model costs to train.
    ///
    /// Preflight reports of releases before 0.2 do not say it; they are of Llama-like decoders, for which
    /// the planner of that time had this formula.
    pub fn cost(&self) -> CostFacts {
        if let Some(cost) = self.cost {
            return cost;
        }
        let [d, h, k, e, f, v, blocks] = [
            self.hidden_size,
            self.num_attention_heads,
            self.num_key_value_heads,
            self.head_dim,
            self.intermediate_size,
            self.vocab_size,
            self.num_hidden_layers,
        ]
        .map(u64::from);
        let outer = ["embed_tokens", "norm", "lm_head"];
        let outer = self.modules.iter().filter(|module| outer.contains(&module.name.as_str()));
        CostFacts {
            saved_elements: blocks * (2 * d + 2 * h * e + 2 * k * e + 2 * f),
            saved_bytes: blocks * 4 * h,
            checkpointed_elements: blocks * d,
            temporary_elements: 7 * f + 6 * d,
            fp32_attention_elements: 4 * d,
            device_temporary_elements: 8 * f + 6 * d,
            device_temporary_bytes: 24 * d + 24 * f,
            device_score_bytes: 16 * h,
            logits: v,
            largest_weight: v * d,
            outer_parameters: outer.map(crate::ModuleShape::parameters).sum(),
            blocks: blocks.max(1),
        }
    }
}
