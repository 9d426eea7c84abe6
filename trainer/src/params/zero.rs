//! ZeRO by block: every rank stores one shard of each unit's state, and the stage decides what is
//! gathered and for how long.
//!
//! Modules hold views of all-gather buffers that fit a whole unit, and know nothing of the
//! sharding. At stage 3 the root unit has a buffer and the blocks share two, so that the next block
//! is prefetched while one is computed. At stages 1 and 2 every unit has its own buffer and is
//! gathered once a step. Gradients are summed in buffers of the same kind (one per unit at stage 1,
//! two shared by the blocks at stages 2 and 3). A reduce-scatter then adds this rank's shard of the
//! sum over ranks to its flat gradient, once a step at stage 1 and once a micro-batch at stages 2
//! and 3.
//!
//! # Source
//! Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models",
//! arXiv 1910.02054; gathering by block as in PyTorch FSDP, arXiv 2304.11277.

use std::cell::{Cell, RefCell};

use tch::{Device, Kind, Tensor};

use crate::{
    distributed::{Error, Pending, PendingReduceScatter, Ranks},
    params::{
        flat::{FlatParams, FlatState, Gradient, Param},
        layout::{Layout, ROOT},
    },
};

/// The buffers that blocks share when they are freed after use: one is computed with while the
/// other is gathered (double buffering).
const SHARED_BLOCK_BUFFERS: usize = 2;

/// The ZeRO stage: what is sharded besides masters and moments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ZeroStage {
    /// Nothing: weights and gradients are complete on every rank.
    One,
    /// Gradients: weights are complete on every rank.
    Two,
    /// Gradients and weights: only the units in use are complete.
    Three,
}

/// Parameters that are sharded over ranks.
#[derive(Debug)]
pub struct ShardedParams {
    layout: Layout,
    ranks: Ranks,
    /// This rank's shards of all units, flat, `[layout.shard_length()]` in the compute dtype.
    shards: Tensor,
    buffers: UnitBuffers,
    /// The unit that each buffer holds, if it is gathered.
    gathered: Vec<Cell<Option<usize>>>,
    /// A unit whose all-gather is in flight.
    prefetching: RefCell<Option<(usize, Pending)>>,
    /// `None` for frozen parameters.
    gradients: Option<ShardedGradients>,
}

/// Flat buffers for gathered units: the root unit's, then those that the blocks take in turn.
#[derive(Debug)]
struct UnitBuffers(Vec<Tensor>);

impl UnitBuffers {
    /// Allocates zeroed buffers for the root unit and for at most `blocks` blocks at once.
    fn new(layout: &Layout, blocks: usize, kind: Kind, device: Device) -> Self {
        let mut lengths = vec![0; layout.units().min(ROOT + 1 + blocks)];
        for unit in 0..layout.units() {
            let index = buffer_index(unit, lengths.len());
            lengths[index] = lengths[index].max(layout.unit_length(unit));
        }
        let buffer = |length| Tensor::zeros([length as i64], (kind, device));
        Self(lengths.into_iter().map(buffer).collect())
    }

    /// Returns the index of a unit's buffer.
    fn index(&self, unit: usize) -> usize {
        buffer_index(unit, self.0.len())
    }

    /// Returns a unit's buffer, which may be longer than the unit.
    fn buffer(&self, unit: usize) -> &Tensor {
        &self.0[self.index(unit)]
    }

    /// Returns a unit in its buffer, `[layout.unit_length(unit)]`.
    fn unit(&self, layout: &Layout, unit: usize) -> Tensor {
        self.buffer(unit).narrow(0, 0, layout.unit_length(unit) as i64)
    }
}

/// Returns which of `count` buffers a unit uses: the root unit has the first, blocks rotate.
const fn buffer_index(unit: usize, count: usize) -> usize {
    if unit == ROOT { 0 } else { 1 + (unit - 1) % (count - 1) }
}

/// Buffers for the gradients of whole units, and this rank's shards of their sums.
#[derive(Debug)]
struct ShardedGradients {
    /// fp32.
    buffers: UnitBuffers,
    /// This rank's shards of all units, flat, `[layout.shard_length()]` in fp32.
    shards: Tensor,
    /// Whether only the last backward pass of a step is followed by a reduce-scatter.
    reduces_once_per_step: bool,
    is_last_backward: Cell<bool>,
    /// Whether a unit's buffer holds gradients that have not been reduced.
    is_unreduced: Vec<Cell<bool>>,
    /// A unit whose reduce-scatter is in flight.
    reducing: RefCell<Option<(usize, PendingReduceScatter)>>,
}

impl ShardedParams {
    /// Creates sharded parameters that are trained; `trained` holds this rank's shards.
    pub fn trained(layout: Layout, ranks: Ranks, stage: ZeroStage, trained: &FlatParams) -> Self {
        let device = trained.master().device();
        let blocks = if stage == ZeroStage::One { layout.units() } else { SHARED_BLOCK_BUFFERS };
        let gradients = ShardedGradients {
            buffers: UnitBuffers::new(&layout, blocks, Kind::Float, device),
            shards: trained.grad().shallow_clone(),
            reduces_once_per_step: stage == ZeroStage::One,
            is_last_backward: Cell::new(false),
            is_unreduced: vec![Cell::new(false); layout.units()],
            reducing: RefCell::new(None),
        };
        let blocks = if stage == ZeroStage::Three { SHARED_BLOCK_BUFFERS } else { layout.units() };
        Self::new(layout, ranks, blocks, trained.compute().shallow_clone(), Some(gradients))
    }

    /// Creates sharded parameters that are frozen; [`Self::store_frozen_shard`] fills them.
    pub fn frozen(layout: Layout, ranks: Ranks, kind: Kind, device: Device) -> Self {
        let shards = Tensor::zeros([layout.shard_length() as i64], (kind, device));
        Self::new(layout, ranks, SHARED_BLOCK_BUFFERS, shards, None)
    }

    fn new(
        layout: Layout,
        ranks: Ranks,
        blocks: usize,
        shards: Tensor,
        gradients: Option<ShardedGradients>,
    ) -> Self {
        let buffers = UnitBuffers::new(&layout, blocks, shards.kind(), shards.device());
        let gathered = vec![Cell::new(None); buffers.0.len()];
        let prefetching = RefCell::new(None);
        Self { layout, ranks, shards, buffers, gathered, prefetching, gradients }
    }

    /// Returns how the parameters are sharded.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Reports whether the parameters are trained.
    pub fn is_trained(&self) -> bool {
        self.gradients.is_some()
    }

    /// Returns one parameter as modules use it: a view of the buffer its unit is gathered in.
    pub fn param(&self, name: &str) -> Option<Param> {
        let slot = self.layout.slot(name)?;
        let view = |buffers: &UnitBuffers| {
            let buffer = buffers.buffer(slot.unit);
            buffer.narrow(0, slot.offset as i64, slot.length() as i64).view(slot.shape.as_slice())
        };
        let grad = self.gradients.as_ref().map(|gradients| Gradient::new(view(&gradients.buffers)));
        Some(Param::new(view(&self.buffers), grad))
    }

    /// Copies this rank's elements of a tensor to their place in `flat`, one of its flat tensors.
    pub fn store_shard(&self, name: &str, value: &Tensor, flat: &Tensor) {
        let Some(slot) = self.layout.slot(name) else { return };
        let Some((range, start)) = self.layout.local_range(slot) else { return };
        let local = value.reshape([-1]).narrow(0, range.start as i64, range.len() as i64);
        flat.narrow(0, start as i64, range.len() as i64).copy_(&local);
    }

    /// Copies this rank's elements of a frozen tensor.
    pub fn store_frozen_shard(&self, name: &str, value: &Tensor) {
        self.store_shard(name, value, &self.shards);
        self.invalidate();
    }

    /// Marks all buffers as stale because the shards have changed: the next use gathers again.
    pub fn invalidate(&self) {
        self.wait_for_all_gather();
        for gathered in &self.gathered {
            gathered.set(None);
        }
    }

    /// Gathers a unit into its buffer and waits for it. A failure breaks the process group, and the
    /// next call that can fail returns its error.
    pub fn all_gather(&self, unit: usize) {
        self.wait_for_all_gather();
        if self.gathered[self.buffers.index(unit)].get() == Some(unit) {
            return;
        }
        self.prefetch(unit);
        self.wait_for_all_gather();
    }

    /// Starts to gather a unit while another is computed.
    pub fn prefetch(&self, unit: usize) {
        let index = self.buffers.index(unit);
        if self.gathered[index].get() == Some(unit) {
            return;
        }
        self.wait_for_all_gather();
        self.gathered[index].set(None);
        let gathered = self.buffers.unit(&self.layout, unit);
        let shard = self.shard(&self.shards, unit);
        if let Ok(pending) = self.ranks.start_all_gather(&gathered, &shard) {
            *self.prefetching.borrow_mut() = Some((unit, pending));
        }
    }

    /// Marks the next backward pass as the step's last one.
    pub fn mark_last_backward(&self) {
        if let Some(gradients) = &self.gradients {
            gradients.is_last_backward.set(true);
        }
    }

    /// Makes sure that a unit's gradient buffer is free.
    ///
    /// # Errors
    /// [`Error`] if another rank is lost.
    pub fn pre_backward(&self, unit: usize) -> Result<(), Error> {
        let Some(gradients) = &self.gradients else { return Ok(()) };
        let reducing = gradients.reducing.borrow().as_ref().map(|(unit, _)| *unit);
        let buffers = &gradients.buffers;
        if reducing.is_some_and(|reducing| buffers.index(reducing) == buffers.index(unit)) {
            self.wait_for_reduce_scatter(gradients)?;
        }
        Ok(())
    }

    /// Starts to reduce a block's gradients, after its backward pass and while the blocks below are
    /// computed, unless later micro-batches add to the same sum.
    ///
    /// # Errors
    /// [`Error`] if another rank is lost.
    pub fn post_backward(&self, unit: usize) -> Result<(), Error> {
        let Some(gradients) = &self.gradients else { return Ok(()) };
        gradients.is_unreduced[unit].set(true);
        if gradients.reduces_once_per_step && !gradients.is_last_backward.get() {
            return Ok(());
        }
        self.start_reduce_scatter(gradients, unit)
    }

    /// Reduces the gradients that are left, which are the root unit's and, in a step without a last
    /// backward pass on this rank, those of all blocks. Waits for all of them.
    ///
    /// # Errors
    /// [`Error`] if another rank is lost.
    pub fn finish_backward(&self) -> Result<(), Error> {
        let Some(gradients) = &self.gradients else { return Ok(()) };
        gradients.is_unreduced[ROOT].set(true);
        gradients.is_last_backward.set(false);
        for unit in (0..self.layout.units()).rev() {
            if gradients.is_unreduced[unit].get() {
                self.start_reduce_scatter(gradients, unit)?;
            }
        }
        self.wait_for_reduce_scatter(gradients)
    }

    /// Starts to reduce a unit's gradients once the reduction before has completed.
    fn start_reduce_scatter(&self, gradients: &ShardedGradients, unit: usize) -> Result<(), Error> {
        self.wait_for_reduce_scatter(gradients)?;
        let buffer = gradients.buffers.unit(&self.layout, unit);
        let pending = self.ranks.start_reduce_scatter(&buffer)?;
        *gradients.reducing.borrow_mut() = Some((unit, pending));
        gradients.is_unreduced[unit].set(false);
        Ok(())
    }

    /// Waits for the reduction in flight, adds this rank's shard of the sum to the flat gradient,
    /// and zeroes the buffer.
    fn wait_for_reduce_scatter(&self, gradients: &ShardedGradients) -> Result<(), Error> {
        let Some((unit, pending)) = gradients.reducing.borrow_mut().take() else { return Ok(()) };
        self.ranks.finish_reduce_scatter(pending, &self.shard(&gradients.shards, unit))?;
        let _ = gradients.buffers.unit(&self.layout, unit).zero_();
        Ok(())
    }

    /// Gathers one unit of a flat state into a new tensor, `[layout.unit_length(unit)]`.
    ///
    /// # Errors
    /// [`Error`] if another rank is lost.
    pub fn gather_unit(&self, unit: usize, flat: FlatState<'_>) -> Result<Tensor, Error> {
        self.wait_for_all_gather();
        let length = self.layout.unit_length(unit) as i64;
        let range = self.layout.shard(unit);
        let shard = flat.slice(range.start as i64, range.len() as i64);
        let gathered = Tensor::empty([length], (shard.kind(), shard.device()));
        let pending = self.ranks.start_all_gather(&gathered, &shard)?;
        self.ranks.wait(pending)?;
        Ok(gathered)
    }

    /// Returns this rank's shard of a unit in one of its flat tensors.
    fn shard(&self, flat: &Tensor, unit: usize) -> Tensor {
        let range = self.layout.shard(unit);
        flat.narrow(0, range.start as i64, range.len() as i64)
    }

    /// Waits for the all-gather in flight.
    fn wait_for_all_gather(&self) {
        let Some((unit, pending)) = self.prefetching.borrow_mut().take() else { return };
        if self.ranks.wait(pending).is_ok() {
            self.gathered[self.buffers.index(unit)].set(Some(unit));
        }
    }
}
