//! Gradients that every rank has whole, summed over ranks while the backward pass goes on.
//!
//! The backward pass finishes gradients from the flat tensor's end to its start. In the last
//! micro-batch of a step each stretch of some megabytes that is finished is on its way while the
//! blocks below are computed.
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
        layout::{OUTER, unit_of, unit_of_block},
    },
};

/// What is sent at once, at least, unless a test says otherwise.
pub const BUCKET_BYTES: u64 = 25 << 20;

/// The gradients of one step, some of them on their way.
#[derive(Debug)]
pub struct Buckets {
    ranks: Ranks,
    grad: Tensor,
    /// The first element of each block; below the first lies what is finished last.
    starts: Vec<i64>,
    /// Elements sent at once, at least.
    least: i64,
    step: RefCell<Step>,
}

#[derive(Debug, Default)]
struct Step {
    /// The end of what is not on its way; `None` while more micro-batches come.
    end: Option<i64>,
    pending: Vec<Pending>,
}

impl Buckets {
    /// Prepares to sum the gradients of `params`; `None` if they are too small to be worth it, or
    /// not in the order of blocks.
    pub fn new(params: &FlatParams, blocks: usize, ranks: &Ranks, bytes: u64) -> Option<Self> {
        let starts = starts(params, blocks)?;
        let least = (bytes / 4) as i64;
        let is_large = params.grad().numel() as i64 >= 2 * least;
        (ranks.world_size() > 1 && is_large).then(|| Self {
            ranks: ranks.clone(),
            grad: params.grad().shallow_clone(),
            starts,
            least,
            step: RefCell::default(),
        })
    }

    /// Says that the step's last micro-batch comes.
    pub fn open(&self) {
        self.step.borrow_mut().end = Some(self.grad.numel() as i64);
    }

    /// Says that the gradients of a block, and of all above it, are finished.
    pub fn finished(&self, block: usize) {
        let mut step = self.step.borrow_mut();
        let (start, Some(end)) = (self.starts[block], step.end) else { return };
        if end - start < self.least {
            return;
        }
        // Whoever cannot start is told why when all is waited for.
        if let Ok(pending) = self.ranks.start_all_reduce(&self.grad.narrow(0, start, end - start)) {
            step.pending.push(pending);
        }
        step.end = Some(start);
    }

    /// Sums what is not on its way and waits for all.
    ///
    /// # Errors
    /// [`Error`] if another rank is lost.
    pub fn finish(&self) -> Result<(), Error> {
        let Step { end, mut pending } = self.step.take();
        let end = end.unwrap_or(self.grad.numel() as i64);
        if end > 0 {
            pending.push(self.ranks.start_all_reduce(&self.grad.narrow(0, 0, end))?);
        }
        pending.into_iter().try_for_each(|pending| self.ranks.wait(pending))
    }
}

/// Returns the first element of each block, of one that trains nothing the next one's; `None` if
/// gradients are not finished from the end to the start.
fn starts(params: &FlatParams, blocks: usize) -> Option<Vec<i64>> {
    let end = params.grad().numel() as i64;
    let mut starts = vec![end; blocks];
    let mut last = OUTER;
    for name in params.names() {
        let unit = unit_of(name);
        let is_embedding = name.starts_with(names::EMBED_TOKENS);
        if (unit != OUTER && unit < last) || (is_embedding && last != OUTER) {
            return None;
        }
        if unit > last {
            starts[unit - unit_of_block(0)] = params.first_element(name)?;
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
        assert_eq!(starts(&params(&in_order), 4), Some(vec![2, 4, 6, 6]));
        assert_eq!(starts(&params(&[&b, &a]), 4), None);
        let params = params(&in_order);
        assert!(Buckets::new(&params, 4, &Ranks::alone(), 4).is_none(), "nobody to send to");
    }
}
