//! Gradient buckets of data-parallel training (DDP): all-reduce overlaps with the backward pass.
//!
//! The backward pass completes gradients from the end of the flat tensor to its start. In the last
//! micro-batch of a step, each bucket of some megabytes is all-reduced as soon as it is complete,
//! while the blocks below are computed.
//!
//! # Source
//! Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", arXiv
//! 2006.15704, section 3.2, which found 25 MB good for most networks.

use std::cell::RefCell;

use tch::Tensor;

use crate::{
    architecture::names,
    distributed::{Error, Pending, Ranks},
    params::{
        flat::FlatParams,
        layout::{ROOT, block_unit, unit_of},
    },
};

/// The least bytes of a bucket, except in tests.
pub const BUCKET_BYTES: u64 = 25 << 20;

/// The gradients of one step, and the all-reduces in flight.
#[derive(Debug)]
pub struct GradientBuckets {
    ranks: Ranks,
    /// All gradients, flat, fp32.
    grad: Tensor,
    /// The first element of each block; the gradients before the first block's are completed last.
    block_starts: Vec<i64>,
    /// The least elements of a bucket.
    min_elements: i64,
    progress: RefCell<Progress>,
}

#[derive(Debug, Default)]
struct Progress {
    /// The end of the elements that are not being reduced; `None` before the last backward pass.
    end: Option<i64>,
    pending: Vec<Pending>,
}

impl GradientBuckets {
    /// Divides the gradients of `params` into buckets; `None` if there are too few of them, or they
    /// are not in the order of blocks.
    pub fn new(params: &FlatParams, blocks: usize, ranks: &Ranks, bytes: u64) -> Option<Self> {
        let block_starts = block_starts(params, blocks)?;
        let min_elements = (bytes / 4) as i64;
        let is_large = params.grad().numel() as i64 >= 2 * min_elements;
        (ranks.world_size() > 1 && is_large).then(|| Self {
            ranks: ranks.clone(),
            grad: params.grad().shallow_clone(),
            block_starts,
            min_elements,
            progress: RefCell::default(),
        })
    }

    /// Marks the next backward pass as the step's last one.
    pub fn mark_last_backward(&self) {
        self.progress.borrow_mut().end = Some(self.grad.numel() as i64);
    }

    /// Starts to all-reduce the gradients of a block and of those above it, after its backward
    /// pass, if they fill a bucket.
    pub fn post_backward(&self, block: usize) {
        let mut progress = self.progress.borrow_mut();
        let (start, Some(end)) = (self.block_starts[block], progress.end) else { return };
        if end - start < self.min_elements {
            return;
        }
        // If it cannot start, `finish_backward` returns the error.
        if let Ok(pending) = self.ranks.start_all_reduce(&self.grad.narrow(0, start, end - start)) {
            progress.pending.push(pending);
        }
        progress.end = Some(start);
    }

    /// All-reduces the gradients that are left, and waits for all buckets.
    ///
    /// # Errors
    /// [`Error`] if another rank is lost.
    pub fn finish_backward(&self) -> Result<(), Error> {
        let Progress { end, mut pending } = self.progress.take();
        let end = end.unwrap_or(self.grad.numel() as i64);
        if end > 0 {
            pending.push(self.ranks.start_all_reduce(&self.grad.narrow(0, 0, end))?);
        }
        pending.into_iter().try_for_each(|pending| self.ranks.wait(pending))
    }
}

/// Returns the first element of each block, or the next block's if it has no trained parameters;
/// `None` if gradients are not completed from the end to the start.
fn block_starts(params: &FlatParams, blocks: usize) -> Option<Vec<i64>> {
    let end = params.grad().numel() as i64;
    let mut starts = vec![end; blocks];
    let mut last = ROOT;
    for name in params.names() {
        let unit = unit_of(name);
        let is_embedding = name.starts_with(names::EMBED_TOKENS);
        if (unit != ROOT && unit < last) || (is_embedding && last != ROOT) {
            return None;
        }
        if unit > last {
            starts[unit - block_unit(0)] = params.first_element(name)?;
            last = unit;
        }
    }
    for block in (0..blocks.saturating_sub(1)).rev() {
        starts[block] = starts[block].min(starts[block + 1]);
    }
    Some(starts)
}

#[cfg(test)]
mod tests {
    use finetune_contract::Dtype;
    use tch::Device;

    use super::*;
    use crate::architecture::modules::TensorSpec;

    #[test]
    fn blocks_begin_where_their_first_parameter_does() {
        let params = |names: &[&str]| {
            let specs =
                names.iter().map(|name| TensorSpec { name: (*name).into(), shape: vec![2] });
            FlatParams::new(&specs.collect::<Vec<_>>(), Dtype::Fp32, Device::Cpu)
        };
        let [a, b, c] = [0, 1, 3].map(|layer| format!("model.layers.{layer}.mlp.up_proj.weight"));
        let in_order = ["model.embed_tokens.weight", &a, &b, &c, "model.norm.weight"];
        assert_eq!(block_starts(&params(&in_order), 4), Some(vec![2, 4, 6, 6]));
        assert_eq!(block_starts(&params(&[&b, &a]), 4), None);
        let params = params(&in_order);
        let buckets = GradientBuckets::new(&params, 4, &Ranks::alone(), 4);
        assert!(buckets.is_none(), "a single rank reduces nothing");
    }
}
