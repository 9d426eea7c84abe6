//! ZeRO stage 3 by block: each rank keeps a part of every unit, and a unit is whole only in use.
//!
//! There is room for three whole units: one for what is outside the blocks, two for blocks, which
//! take turns, so that the next one is on its way while one is computed. Modules hold views of that
//! room and know nothing of it. Gradients of a unit are summed in a room of their own, then each
//! rank adds its part of the sum over ranks to its flat gradient.
//!
//! # Source
//! Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models",
//! arXiv 1910.02054, stage 3; gathering by block as in PyTorch FSDP, arXiv 2304.11277.

use std::cell::{Cell, RefCell};

use tch::{Device, Kind, Tensor};

use super::{
    layout::{Layout, OUTER},
    params::{Flat, FlatParams, Param},
};
use crate::dist::{Error, Pending, Ranks};

/// Rooms for whole units: the outer one's, and two for blocks by turns.
const ROOMS: usize = 3;

/// The divided tensors of a model.
#[derive(Debug)]
pub struct Sharded {
    layout: Layout,
    ranks: Ranks,
    /// This rank's parts, in the computation's dtype.
    values: Tensor,
    rooms: [Tensor; ROOMS],
    gradients: Option<Gradients>,
    holds: [Cell<Option<usize>>; ROOMS],
    /// A unit on its way into its room.
    coming: RefCell<Option<(usize, Pending)>>,
}

/// Rooms for whole units' gradients, and this rank's parts of their sums.
#[derive(Debug)]
struct Gradients {
    outer: Tensor,
    block: Tensor,
    parts: Tensor,
}

impl Sharded {
    /// Makes room for divided tensors that are trained: `trained` has this rank's parts.
    pub fn trained(layout: Layout, ranks: Ranks, trained: &FlatParams) -> Self {
        let device = trained.master().device();
        let room = |length: usize| Tensor::zeros([length as i64], (Kind::Float, device));
        let gradients = Gradients {
            outer: room(layout.whole_length(OUTER)),
            block: room(largest_block(&layout)),
            parts: trained.grad().shallow_clone(),
        };
        Self::new(layout, ranks, trained.compute().shallow_clone(), Some(gradients))
    }

    /// Makes room for divided tensors that stay as they are.
    pub fn frozen(layout: Layout, ranks: Ranks, kind: Kind, device: Device) -> Self {
        let values = Tensor::zeros([layout.part_length() as i64], (kind, device));
        Self::new(layout, ranks, values, None)
    }

    fn new(layout: Layout, ranks: Ranks, values: Tensor, gradients: Option<Gradients>) -> Self {
        let block = largest_block(&layout);
        let rooms = [layout.whole_length(OUTER), block, block]
            .map(|length| Tensor::zeros([length as i64], (values.kind(), values.device())));
        let holds = std::array::from_fn(|_| Cell::new(None));
        Self { layout, ranks, values, rooms, gradients, holds, coming: RefCell::new(None) }
    }

    /// Returns how the tensors are divided.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Tells whether the divided tensors are trained.
    pub fn is_trained(&self) -> bool {
        self.gradients.is_some()
    }

    /// Returns one tensor as a module uses it: a view of the room its unit is gathered in.
    pub fn param(&self, name: &str) -> Option<Param> {
        let place = self.layout.place(name)?;
        let view = |room: &Tensor| {
            room.narrow(0, place.offset as i64, place.length() as i64).view(place.shape.as_slice())
        };
        let grad = self.gradients.as_ref().map(|gradients| view(gradients.room(place.unit)));
        Some(Param { value: view(&self.rooms[room_of(place.unit)]), grad })
    }

    /// Copies this rank's part of a tensor's value into one of its flat tensors.
    pub fn keep(&self, name: &str, value: &Tensor, flat: &Tensor) {
        let Some(place) = self.layout.place(name) else { return };
        let Some((range, start)) = self.layout.kept(place) else { return };
        let part = value.reshape([-1]).narrow(0, range.start as i64, range.len() as i64);
        flat.narrow(0, start as i64, range.len() as i64).copy_(&part);
    }

    /// Copies this rank's part of a frozen tensor.
    pub fn keep_value(&self, name: &str, value: &Tensor) {
        self.keep(name, value, &self.values);
        self.forget();
    }

    /// Makes the next use gather anew, for the parts have changed.
    pub fn forget(&self) {
        self.settle();
        for holds in &self.holds {
            holds.set(None);
        }
    }

    /// Brings a unit into its room. What cannot be brought breaks the group, which says so next
    /// time it is asked for something that can fail.
    pub fn hold(&self, unit: usize) {
        self.settle();
        if self.holds[room_of(unit)].get() == Some(unit) {
            return;
        }
        self.prefetch(unit);
        self.settle();
    }

    /// Lets a unit come while another is computed.
    pub fn prefetch(&self, unit: usize) {
        let room = room_of(unit);
        if self.holds[room].get() == Some(unit) {
            return;
        }
        self.settle();
        self.holds[room].set(None);
        let whole = self.rooms[room].narrow(0, 0, self.layout.whole_length(unit) as i64);
        if let Ok(pending) = self.ranks.start_all_gather(&whole, &self.part(&self.values, unit)) {
            *self.coming.borrow_mut() = Some((unit, pending));
        }
    }

    /// Empties the room of a block's gradients.
    pub fn begin_gradients(&self) {
        if let Some(gradients) = &self.gradients {
            let _ = gradients.block.shallow_clone().zero_();
        }
    }

    /// Sums a unit's gradients over ranks and adds this rank's part to its flat gradient.
    ///
    /// # Errors
    /// [`Error`] if another rank is lost.
    pub fn give_gradients(&self, unit: usize) -> Result<(), Error> {
        let Some(gradients) = &self.gradients else { return Ok(()) };
        let whole = gradients.room(unit).narrow(0, 0, self.layout.whole_length(unit) as i64);
        self.ranks.reduce_scatter_into(&whole, &self.part(&gradients.parts, unit))
    }

    /// Gives the gradients of what is outside the blocks, once for all micro-batches of a step.
    ///
    /// # Errors
    /// [`Error`] if another rank is lost, now or at a block's gradients.
    pub fn give_outer_gradients(&self) -> Result<(), Error> {
        self.give_gradients(OUTER)?;
        if let Some(gradients) = &self.gradients {
            let _ = gradients.outer.shallow_clone().zero_();
        }
        Ok(())
    }

    /// Gathers a whole unit of one of the flat tensors.
    ///
    /// # Errors
    /// [`Error`] if another rank is lost.
    pub fn whole(&self, unit: usize, flat: Flat<'_>) -> Result<Tensor, Error> {
        self.settle();
        let length = self.layout.whole_length(unit) as i64;
        let part = self.layout.part(unit);
        let part = flat.part(part.start as i64, part.len() as i64);
        let whole = Tensor::empty([length], (part.kind(), part.device()));
        let pending = self.ranks.start_all_gather(&whole, &part)?;
        self.ranks.wait(pending)?;
        Ok(whole)
    }

    /// Gathers one of the flat tensors piece by piece, in the order of an undivided one.
    ///
    /// # Errors
    /// What `visit` gives, or an [`Error`] made into one if another rank is lost.
    pub fn for_each_piece<E: From<Error>>(
        &self,
        flat: Flat<'_>,
        mut visit: impl FnMut(&Tensor) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut gathered: Option<(usize, Tensor)> = None;
        for name in self.layout.names() {
            let Some(place) = self.layout.place(name) else { continue };
            let whole = match gathered.take() {
                Some((unit, whole)) if unit == place.unit => whole,
                _ => self.whole(place.unit, flat)?,
            };
            visit(&whole.narrow(0, place.offset as i64, place.length() as i64))?;
            gathered = Some((place.unit, whole));
        }
        Ok(())
    }

    /// Copies this rank's parts out of an undivided flat tensor.
    pub fn restore(&self, undivided: &Tensor, flat: Flat<'_>) {
        match flat {
            Flat::Floats(values) => self.keep_some(undivided, 0, values),
            Flat::Codes(codes) => codes.replace(|start, length| {
                let values = Tensor::zeros([length], (undivided.kind(), undivided.device()));
                self.keep_some(undivided, start, &values);
                values
            }),
        }
    }

    /// Copies a stretch of this rank's parts, from the flat tensor's element `from` on.
    fn keep_some(&self, undivided: &Tensor, from: i64, values: &Tensor) {
        let to = from + values.numel() as i64;
        for name in self.layout.names() {
            let Some(place) = self.layout.place(name) else { continue };
            let Some((range, start)) = self.layout.kept(place) else { continue };
            let (start, end) = (start as i64, (start + range.len()) as i64);
            let (first, last) = (start.max(from), end.min(to));
            if first < last {
                let at = (place.undivided + range.start) as i64 + first - start;
                let some = undivided.narrow(0, at, last - first);
                values.narrow(0, first - from, last - first).copy_(&some);
            }
        }
    }

    fn part(&self, flat: &Tensor, unit: usize) -> Tensor {
        let part = self.layout.part(unit);
        flat.narrow(0, part.start as i64, part.len() as i64)
    }

    /// Waits for the unit that is on its way.
    fn settle(&self) {
        let Some((unit, pending)) = self.coming.borrow_mut().take() else { return };
        if self.ranks.wait(pending).is_ok() {
            self.holds[room_of(unit)].set(Some(unit));
        }
    }
}

impl Gradients {
    fn room(&self, unit: usize) -> &Tensor {
        if unit == OUTER { &self.outer } else { &self.block }
    }
}

const fn room_of(unit: usize) -> usize {
    if unit == OUTER { 0 } else { 1 + unit % 2 }
}

fn largest_block(layout: &Layout) -> usize {
    (OUTER + 1..layout.units()).map(|unit| layout.whole_length(unit)).max().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::config::TensorSpec;

    #[test]
    fn stretches_are_the_parts_of_a_whole() {
        let specs = [("model.embed_tokens.weight", 70), ("model.layers.0.mlp.up_proj.weight", 90)]
            .map(|(name, length)| TensorSpec { name: name.to_owned(), shape: vec![length] });
        let undivided = Tensor::arange(160, (Kind::Float, Device::Cpu)) + 1.0;
        for rank in 0..3 {
            let layout = Layout::new(&specs, [rank, 3]);
            let sharded = Sharded::frozen(layout, Ranks::alone(), Kind::Float, Device::Cpu);
            let whole = sharded.values.zeros_like();
            for (name, first, length) in [(&specs[0].name, 0, 70), (&specs[1].name, 70, 90)] {
                sharded.keep(name, &undivided.narrow(0, first, length), &whole);
            }
            let restored = whole.zeros_like();
            sharded.restore(&undivided, Flat::Floats(&restored));
            assert_eq!(restored, whole, "rank {rank}");
            for length in [7, 16, 1000] {
                let mut found = Vec::new();
                for from in (0..whole.numel() as i64).step_by(length) {
                    let length = (length as i64).min(whole.numel() as i64 - from);
                    let some = Tensor::zeros([length], (Kind::Float, Device::Cpu));
                    sharded.keep_some(&undivided, from, &some);
                    found.push(some);
                }
                assert_eq!(Tensor::cat(&found, 0), whole, "rank {rank}, {length} at once");
            }
        }
    }
}
