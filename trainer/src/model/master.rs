//! The fp32 masters of trained parameters, one at a time and unsharded.

use tch::Tensor;

use crate::{distributed, model::Model, params::flat::FlatState};

/// Reads the fp32 masters of a model.
///
/// If parameters are sharded, every rank must ask for the same names in the same order: a unit is
/// gathered when its first parameter is asked for, and freed when another unit is.
pub struct Masters<'a> {
    model: &'a Model,
    gathered: Option<(usize, Tensor)>,
}

impl<'a> Masters<'a> {
    /// Creates a reader.
    pub fn of(model: &'a Model) -> Self {
        Self { model, gathered: None }
    }

    /// Returns the model.
    pub fn model(&self) -> &'a Model {
        self.model
    }

    /// Returns one parameter's master; `None` if it is not trained.
    ///
    /// # Errors
    /// [`distributed::Error`] if another rank is lost.
    pub fn get(&mut self, name: &str) -> Result<Option<Tensor>, distributed::Error> {
        let trained = self.model.trained();
        let Some(sharded) = self.model.sharded_training() else {
            return Ok(trained.master_of(name));
        };
        let Some(slot) = sharded.layout().slot(name) else { return Ok(None) };
        let gathered = match self.gathered.take() {
            Some((unit, gathered)) if unit == slot.unit => gathered,
            _ => sharded.gather_unit(slot.unit, FlatState::Fp32(trained.master()))?,
        };
        let (first, length) = (slot.offset as i64, slot.length() as i64);
        let master = gathered.narrow(0, first, length).view(slot.shape.as_slice());
        self.gathered = Some((slot.unit, gathered));
        Ok(Some(master))
    }
}
