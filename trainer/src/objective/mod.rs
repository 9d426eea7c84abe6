//! The training objectives: each computes a loss and its gradient from the last hidden states.

pub mod causal_lm;

use std::ops::AddAssign;

use tch::Tensor;

use crate::layers::{dropout::Dropout, linear::Projections};

/// What training minimizes: a loss that is computed from the last hidden states and summed over
/// target tokens.
pub trait Objective {
    /// Computes the summed loss of a micro-batch, and the gradient of its last hidden states.
    ///
    /// Adds the gradients of the head's trained parameters. All gradients are those of the *sum*:
    /// the caller divides once by the number of target tokens of the step.
    ///
    /// # Shapes
    /// `hidden` holds the `N` positions that predict a target, after the last norm: `[N, D]`, as is
    /// its gradient. `labels` is `[N]`, int64.
    fn loss_and_gradient(
        &self,
        lm_head: &Projections<1>,
        hidden: &Tensor,
        labels: &Tensor,
        dropout: Option<&Dropout>,
    ) -> (LossSums, Tensor);

    /// Computes the summed loss of a micro-batch without dropout or gradients.
    ///
    /// # Shapes
    /// `hidden` is `[N, D]`, `labels` is `[N]`, as in [`Objective::loss_and_gradient`].
    fn loss(&self, lm_head: &Projections<1>, hidden: &Tensor, labels: &Tensor) -> LossSums;
}

/// The sums of one or more micro-batches, from which the mean loss follows.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct LossSums {
    /// The loss, summed over target tokens.
    pub loss: f64,
    /// The number of target tokens.
    pub targets: u64,
}

impl LossSums {
    /// Returns the mean loss per target token.
    pub fn mean(self) -> f64 {
        self.loss / self.targets as f64
    }
}

impl AddAssign for LossSums {
    fn add_assign(&mut self, other: Self) {
        self.loss += other.loss;
        self.targets += other.targets;
    }
}
