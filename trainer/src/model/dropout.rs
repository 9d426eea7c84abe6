//! Dropout whose noise is computed from a counter, so that the backward pass replays it for free.
//!
//! Not PEFT's noise: there each adapter draws its own mask, here the layers that share an input
//! (`q_proj`, `k_proj`, `v_proj`; `gate_proj`, `up_proj`) share one mask, drawn once.

use tch::{Device, Kind, Tensor};

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

    /// Returns the factors on an input `[T, width]` at a numbered place of the network: zero, or
    /// the reciprocal of the probability to be kept.
    pub fn mask(&self, site: u64, shape: &[i64], kind: Kind, device: Device) -> Tensor {
        let length = shape.iter().product::<i64>() as usize;
        let kept = 65536.0 / (65536.0 - f64::from(self.threshold));
        let key = self.counter.fold(site);
        let tensor = if kind == Kind::BFloat16 {
            let bits = half::bf16::from_f64(kept).to_bits();
            let mask = self.fill(length, key, bits);
            let bytes: Vec<u8> = mask.iter().flat_map(|value| value.to_le_bytes()).collect();
            Tensor::from_data_size(&bytes, shape, kind)
        } else {
            let mask = self.fill(length, key, kept as f32);
            Tensor::from_slice(&mask).view(shape).to_kind(kind)
        };
        tensor.to_device(device)
    }

    /// Fills a mask; four elements share one draw of 64 bits.
    fn fill<E: Copy + Default>(&self, length: usize, key: Counter, kept: E) -> Vec<E> {
        let mut mask = vec![E::default(); length];
        for (index, group) in mask.chunks_mut(4).enumerate() {
            let draw = key.draw(index as u64);
            for (lane, value) in group.iter_mut().enumerate() {
                if (draw >> (16 * lane)) as u16 >= self.threshold {
                    *value = kept;
                }
            }
        }
        mask
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mask(probability: f64, site: u64) -> Vec<f32> {
        let dropout = Dropout::new(probability, Counter::from_seed(7)).unwrap();
        let mask = dropout.mask(site, &[1000, 100], Kind::Float, Device::Cpu);
        Vec::try_from(mask.view(-1)).unwrap()
    }

    #[test]
    fn keeps_the_mean_and_the_rate() {
        for probability in [0.05, 0.5] {
            let mask = mask(probability, 3);
            let zeroed = mask.iter().filter(|value| **value == 0.0).count() as f64 / 1e5;
            let mean = mask.iter().sum::<f32>() / 1e5;
            // Five standard deviations of a binomial of 100,000.
            assert!((zeroed - probability).abs() < 0.008, "{zeroed} of {probability}");
            assert!((mean - 1.0).abs() < 0.02, "{mean}");
        }
    }

    #[test]
    fn replays_a_site_and_differs_between_sites() {
        assert_eq!(mask(0.5, 3), mask(0.5, 3));
        let equal =
            mask(0.5, 3).iter().zip(mask(0.5, 4)).filter(|(a, b)| (**a - *b).abs() < 0.5).count()
                as f64
                / 1e5;
        assert!((equal - 0.5).abs() < 0.008, "{equal}");
    }

    #[test]
    fn zero_probability_is_no_dropout() {
        assert!(Dropout::new(0.0, Counter::from_seed(7)).is_none());
    }
}
