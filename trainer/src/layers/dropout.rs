//! Dropout whose noise is computed from a counter, so that the backward pass replays it for free.
//!
//! Not PEFT's noise: there each adapter draws its own mask, here the layers that share an input
//! (`q_proj`, `k_proj`, `v_proj`; `gate_proj`, `up_proj`) share one mask, drawn once.

use finetune_kernels::dropout::Noise;

use crate::runtime::rng::Counter;

/// The noise of one micro-batch, as a part of its step's: how a step is cut into micro-batches
/// changes nothing.
#[derive(Debug, Clone, Copy)]
pub struct Dropout {
    /// The probability of zeroing, in 1/65536.
    threshold: u16,
    counter: Counter,
    /// Positions of the step that come before.
    tokens_before: u64,
    /// Targets of the step that come before.
    targets_before: u64,
}

impl Dropout {
    /// Makes the noise of a step's first micro-batch; `None` if nothing is ever zeroed.
    ///
    /// # Units
    /// `probability` is in `[0, 1)` and applied in steps of 1/65536.
    pub fn new(probability: f64, counter: Counter) -> Option<Self> {
        let threshold = (probability * 65536.0).round() as u16;
        let start = Self { threshold, counter, tokens_before: 0, targets_before: 0 };
        (threshold > 0).then_some(start)
    }

    /// Returns the noise of the micro-batch that so many positions and targets of the step come
    /// before.
    #[must_use]
    pub const fn after(self, tokens_before: u64, targets_before: u64) -> Self {
        Self { tokens_before, targets_before, ..self }
    }

    /// Returns the noise on the input `[T, width]` at a numbered place of the network.
    pub fn noise(&self, site: u64, width: usize) -> Noise {
        self.at(site).from_element(self.tokens_before * width as u64)
    }

    /// Returns the noise on the head's input `[_, width]`, whose first row is the `row`-th that
    /// predicts a target of the micro-batch.
    pub fn noise_of_head(&self, site: u64, row: usize, width: usize) -> Noise {
        self.at(site).from_element((self.targets_before + row as u64) * width as u64)
    }

    fn at(&self, site: u64) -> Noise {
        Noise { key: self.counter.fold(site).key(), threshold: self.threshold }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_site_and_each_step_has_noise_of_its_own() {
        let dropout = |step| Dropout::new(0.05, Counter::from_seed(7).fold(step)).unwrap();
        assert_eq!(dropout(1).noise(3, 8), dropout(1).noise(3, 8));
        assert_ne!(dropout(1).noise(3, 8), dropout(1).noise(4, 8));
        assert_ne!(dropout(1).noise(3, 8), dropout(2).noise(3, 8));
        assert_ne!(dropout(1).noise(3, 8), dropout(1).after(1, 0).noise(3, 8));
    }

    #[test]
    fn zero_probability_is_no_dropout() {
        assert!(Dropout::new(0.0, Counter::from_seed(7)).is_none());
    }
}
