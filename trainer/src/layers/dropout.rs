//! Dropout whose mask is computed from a counter, so that the backward pass replays it for free.
//!
//! Differs from PEFT, where each adapter draws its own mask: here the layers that share an input
//! (`q_proj`, `k_proj`, `v_proj`; `gate_proj`, `up_proj`) share one mask.

use finetune_kernels::dropout::DropoutMask;

use crate::runtime::rng::RngKey;

/// The dropout of one micro-batch, addressed by its offset in the step: how a step is divided into
/// micro-batches does not change any mask.
#[derive(Debug, Clone, Copy)]
pub struct Dropout {
    /// The probability of zeroing, in 1/65536.
    threshold: u16,
    key: RngKey,
    /// Tokens of the step before this micro-batch.
    tokens_before: u64,
    /// Target tokens of the step before this micro-batch.
    targets_before: u64,
}

impl Dropout {
    /// Creates the dropout of a step's first micro-batch; `None` if the probability rounds to zero.
    ///
    /// # Units
    /// `probability` is in `[0, 1)` and applied in steps of 1/65536.
    pub fn new(probability: f64, key: RngKey) -> Option<Self> {
        let threshold = (probability * 65536.0).round() as u16;
        let first = Self { threshold, key, tokens_before: 0, targets_before: 0 };
        (threshold > 0).then_some(first)
    }

    /// Returns the dropout of the micro-batch at this offset in the step.
    #[must_use]
    pub const fn at_offset(self, tokens_before: u64, targets_before: u64) -> Self {
        Self { tokens_before, targets_before, ..self }
    }

    /// Returns the mask of an input `[T, width]` at a dropout site of the network.
    pub fn mask(&self, site: u64, width: usize) -> DropoutMask {
        self.site_mask(site).starting_at(self.tokens_before * width as u64)
    }

    /// Returns the mask of a chunk of the head's input `[C, width]` whose first row belongs to the
    /// micro-batch's target `row`.
    pub fn head_mask(&self, site: u64, row: usize, width: usize) -> DropoutMask {
        self.site_mask(site).starting_at((self.targets_before + row as u64) * width as u64)
    }

    fn site_mask(&self, site: u64) -> DropoutMask {
        DropoutMask { key: self.key.fold_in(site).to_bits(), threshold: self.threshold }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_site_and_each_step_has_its_own_mask() {
        let dropout = |step| Dropout::new(0.05, RngKey::from_seed(7).fold_in(step)).unwrap();
        assert_eq!(dropout(1).mask(3, 8), dropout(1).mask(3, 8));
        assert_ne!(dropout(1).mask(3, 8), dropout(1).mask(4, 8));
        assert_ne!(dropout(1).mask(3, 8), dropout(2).mask(3, 8));
        assert_ne!(dropout(1).mask(3, 8), dropout(1).at_offset(1, 0).mask(3, 8));
    }

    #[test]
    fn zero_probability_is_no_dropout() {
        assert!(Dropout::new(0.0, RngKey::from_seed(7)).is_none());
    }
}
