//! Trained parameters one by one, whole, wherever their parts are.

use tch::Tensor;

use crate::{distributed, model::Model, params::flat::Flat};

/// Reads the fp32 masters of a model.
///
/// Of divided parameters every rank must ask for the same names in the same order: a unit is
/// gathered when the first of its parameters is asked for, and kept until another unit's is.
pub struct Masters<'a> {
    model: &'a Model,
    gathered: Option<(usize, Tensor)>,
}

impl<'a> Masters<'a> {
    /// Starts to read.
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
        let Some(place) = sharded.layout().place(name) else { return Ok(None) };
        let whole = match self.gathered.take() {
            Some((unit, whole)) if unit == place.unit => whole,
            _ => sharded.whole(place.unit, Flat::Floats(trained.master()))?,
        };
        let (first, length) = (place.offset as i64, place.length() as i64);
        let master = whole.narrow(0, first, length).view(place.shape.as_slice());
        self.gathered = Some((place.unit, whole));
        Ok(Some(master))
    }
}
