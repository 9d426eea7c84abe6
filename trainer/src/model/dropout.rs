//! Dropout whose noise is computed from a counter, so that the backward pass replays it for free.
//!
//! Not PEFT's noise: there each adapter draws its own mask, here the layers that share an input
//! (`q_proj`, `k_proj`, `v_proj`; `gate_proj`, `up_proj`) share one mask, drawn once.

use finetune_kernels::dropout::Noise;

use crate::seed::Counter;

/// The noise of one micro-batch.
#[derive(Debug, Clone, Copy)]
pub struct Dropout {
    /// The probability of zeroing, in 1/65536.
    threshold: u16,
    counter: Counter,
}

impl Dropout {
    /// Makes the noise of one micro-batch; `None` if nothing is ever zeroed.
    ///
    /// # Units
    /// `probability` is in `[0, 1)` and applied in steps of 1/65536.
    pub fn new(probability: f64, counter: Counter) -> Option<Self> {
        let threshold = (probability * 65536.0).round() as u16;
        (threshold > 0).then_some(Self { threshold, counter })
    }

    /// Returns the noise on the input at a numbered place of the network.
    pub fn noise(&self, site: u64) -> Noise {
        Noise { key: self.counter.fold(site).key(), threshold: self.threshold }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_site_and_each_step_has_noise_of_its_own() {
        let dropout = |step| Dropout::new(0.05, Counter::from_seed(7).fold(step)).unwrap();
        assert_eq!(dropout(1).noise(3), dropout(1).noise(3));
        assert_ne!(dropout(1).noise(3), dropout(1).noise(4));
        assert_ne!(dropout(1).noise(3), dropout(2).noise(3));
    }

    #[test]
    fn zero_probability_is_no_dropout() {
        assert!(Dropout::new(0.0, Counter::from_seed(7)).is_none());
    }
}
