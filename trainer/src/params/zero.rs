//! ZeRO by block: each rank keeps a part of every unit's state, and what is whole of it follows from
//! the stage.
//!
//! Modules hold views of rooms for whole units and know nothing of the division. At stage 3 there is
//! room for the outer unit and two blocks, which take turns, so that the next one is on its way while
//! one is computed. At stages 1 and 2 every unit has a room of its own and is gathered once a step.
//! Gradients are summed in rooms alike (each unit has one at stage 1, two blocks share at 2 and 3);
//! then each rank adds its part of the sum over ranks to its flat gradient: at stage 1 once a step,
//! else once a micro-batch.
//!
//! # Source
//! Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models",
//! arXiv 1910.02054; gathering by block as in PyTorch FSDP, arXiv 2304.11277.

use std::cell::{Cell, RefCell};

use tch::{Device, Kind, Tensor};

use crate::{
    distributed::{Error, Pending, Ranks, Reducing},
    params::{
        flat::{Flat, FlatParams, Gradient, Param},
        layout::{Layout, OUTER},
    },
};

/// Blocks there is room for where they take turns: one is used while another is on its way.
const TURNS: usize = 2;

/// What a rank has whole of a model whose state is divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ZeroStage {
    /// Weights and gradients: masters and moments are divided.
    One,
    /// Weights: gradients too are divided.
    Two,
    /// Only what is in use.
    Three,
}

/// The divided tensors of a model.
#[derive(Debug)]
pub struct Sharded {
    layout: Layout,
    ranks: Ranks,
    /// This rank's parts, in the computation's dtype.
    values: Tensor,
    rooms: Rooms,
    /// The unit each room holds.
    holds: Vec<Cell<Option<usize>>>,
    /// A unit on its way into its room.
    coming: RefCell<Option<(usize, Pending)>>,
    gradients: Option<Gradients>,
}

/// Rooms for whole units, the outer one's first; blocks take turns where there are too few.
#[derive(Debug)]
struct Rooms(Vec<Tensor>);

impl Rooms {
    /// Makes zeroed rooms for the outer unit and for so many blocks at once, or for all there are.
    fn new(layout: &Layout, blocks: usize, kind: Kind, device: Device) -> Self {
        let mut lengths = vec![0; layout.units().min(OUTER + 1 + blocks)];
        for unit in 0..layout.units() {
            let room = turn(unit, lengths.len());
            lengths[room] = lengths[room].max(layout.whole_length(unit));
        }
        let room = |length| Tensor::zeros([length as i64], (kind, device));
        Self(lengths.into_iter().map(room).collect())
    }

    /// Returns the room of a unit.
    fn of(&self, unit: usize) -> usize {
        turn(unit, self.0.len())
    }

    /// Returns a unit's room.
    fn room(&self, unit: usize) -> &Tensor {
        &self.0[self.of(unit)]
    }

    /// Returns a whole unit in its room.
    fn whole(&self, layout: &Layout, unit: usize) -> Tensor {
        self.room(unit).narrow(0, 0, layout.whole_length(unit) as i64)
    }
}

/// Returns which of so many rooms a unit takes.
const fn turn(unit: usize, rooms: usize) -> usize {
    if unit == OUTER { 0 } else { 1 + (unit - 1) % (rooms - 1) }
}

/// Rooms for whole units' gradients, and this rank's parts of their sums.
#[derive(Debug)]
struct Gradients {
    rooms: Rooms,
    parts: Tensor,
    /// Whether a room waits for the step's last micro-batch.
    waits: bool,
    is_last: Cell<bool>,
    /// Units whose rooms have something to give.
    full: Vec<Cell<bool>>,
    /// A unit whose sum is under way.
    leaving: RefCell<Option<(usize, Reducing)>>,
}

impl Sharded {
    /// Makes room for divided tensors that are trained: `trained` has this rank's parts.
    pub fn trained(layout: Layout, ranks: Ranks, stage: ZeroStage, trained: &FlatParams) -> Self {
        let device = trained.master().device();
        let turns = if stage == ZeroStage::One { layout.units() } else { TURNS };
        let gradients = Gradients {
            rooms: Rooms::new(&layout, turns, Kind::Float, device),
            parts: trained.grad().shallow_clone(),
            waits: stage == ZeroStage::One,
            is_last: Cell::new(false),
            full: vec![Cell::new(false); layout.units()],
            leaving: RefCell::new(None),
        };
        let turns = if stage == ZeroStage::Three { TURNS } else { layout.units() };
        Self::new(layout, ranks, turns, trained.compute().shallow_clone(), Some(gradients))
    }

    /// Makes room for divided tensors that stay as they are.
    pub fn frozen(layout: Layout, ranks: Ranks, kind: Kind, device: Device) -> Self {
        let values = Tensor::zeros([layout.part_length() as i64], (kind, device));
        Self::new(layout, ranks, TURNS, values, None)
    }

    fn new(
        layout: Layout,
        ranks: Ranks,
        turns: usize,
        values: Tensor,
        gradients: Option<Gradients>,
    ) -> Self {
        let rooms = Rooms::new(&layout, turns, values.kind(), values.device());
        let holds = vec![Cell::new(None); rooms.0.len()];
        Self { layout, ranks, values, rooms, holds, coming: RefCell::new(None), gradients }
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
        let view = |rooms: &Rooms| {
            let whole = rooms.room(place.unit);
            whole.narrow(0, place.offset as i64, place.length() as i64).view(place.shape.as_slice())
        };
        let grad = self.gradients.as_ref().map(|gradients| Gradient::new(view(&gradients.rooms)));
        Some(Param { value: view(&self.rooms), grad })
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
        if self.holds[self.rooms.of(unit)].get() == Some(unit) {
            return;
        }
        self.prefetch(unit);
        self.settle();
    }

    /// Lets a unit come while another is computed.
    pub fn prefetch(&self, unit: usize) {
        let room = self.rooms.of(unit);
        if self.holds[room].get() == Some(unit) {
            return;
        }
        self.settle();
        self.holds[room].set(None);
        let whole = self.rooms.whole(&self.layout, unit);
        if let Ok(pending) = self.ranks.start_all_gather(&whole, &self.part(&self.values, unit)) {
            *self.coming.borrow_mut() = Some((unit, pending));
        }
    }

    /// Says that the step's last micro-batch comes.
    pub fn expect_last(&self) {
        if let Some(gradients) = &self.gradients {
            gradients.is_last.set(true);
        }
    }

    /// Makes sure that a unit's gradients can be added to.
    ///
    /// # Errors
    /// [`Error`] if another rank is lost.
    pub fn begin_gradients(&self, unit: usize) -> Result<(), Error> {
        let Some(gradients) = &self.gradients else { return Ok(()) };
        let leaving = gradients.leaving.borrow().as_ref().map(|(unit, _)| *unit);
        if leaving.is_some_and(|leaving| gradients.rooms.of(leaving) == gradients.rooms.of(unit)) {
            self.settle_gradients(gradients)?;
        }
        Ok(())
    }

    /// Says that a micro-batch has added all it adds to a block's gradients: unless more of them
    /// wait for the same sum, it is taken over ranks while the blocks below are computed.
    ///
    /// # Errors
    /// [`Error`] if another rank is lost.
    pub fn finished(&self, unit: usize) -> Result<(), Error> {
        let Some(gradients) = &self.gradients else { return Ok(()) };
        gradients.full[unit].set(true);
        if gradients.waits && !gradients.is_last.get() {
            return Ok(());
        }
        self.give(gradients, unit)
    }

    /// Gives what no micro-batch has given: the outer unit's gradients, and of a step without a last
    /// micro-batch all that waited for it. Waits until all has arrived.
    ///
    /// # Errors
    /// [`Error`] if another rank is lost.
    pub fn finish_gradients(&self) -> Result<(), Error> {
        let Some(gradients) = &self.gradients else { return Ok(()) };
        gradients.full[OUTER].set(true);
        gradients.is_last.set(false);
        for unit in (0..self.layout.units()).rev() {
            if gradients.full[unit].get() {
                self.give(gradients, unit)?;
            }
        }
        self.settle_gradients(gradients)
    }

    /// Starts to sum a unit's gradients over ranks, when the one before has arrived.
    fn give(&self, gradients: &Gradients, unit: usize) -> Result<(), Error> {
        self.settle_gradients(gradients)?;
        let whole = gradients.rooms.whole(&self.layout, unit);
        let reducing = self.ranks.start_reduce_scatter(&whole)?;
        *gradients.leaving.borrow_mut() = Some((unit, reducing));
        gradients.full[unit].set(false);
        Ok(())
    }

    /// Adds this rank's part of the sum that is under way, and empties the room it came from.
    fn settle_gradients(&self, gradients: &Gradients) -> Result<(), Error> {
        let Some((unit, reducing)) = gradients.leaving.borrow_mut().take() else { return Ok(()) };
        self.ranks.finish_reduce_scatter(reducing, &self.part(&gradients.parts, unit))?;
        let _ = gradients.rooms.whole(&self.layout, unit).zero_();
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

    fn part(&self, flat: &Tensor, unit: usize) -> Tensor {
        let part = self.layout.part(unit);
        flat.narrow(0, part.start as i64, part.len() as i64)
    }

    /// Waits for the unit that is on its way.
    fn settle(&self) {
        let Some((unit, pending)) = self.coming.borrow_mut().take() else { return };
        if self.ranks.wait(pending).is_ok() {
            self.holds[self.rooms.of(unit)].set(Some(unit));
        }
    }
}
