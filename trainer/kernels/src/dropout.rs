//! Dropout whose mask is a function of a key and an element's index, so that it is never stored.

use crate::versions::versions;

/// The increment of the counter from one group of four elements to the next: 2⁶⁴ over the golden
/// ratio, as in SplitMix64.
pub const GOLDEN_GAMMA: u64 = 0x9E37_79B9_7F4A_7C15;

/// The dropout mask of one input.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DropoutMask {
    /// The random key.
    pub key: u64,
    /// The probability of zeroing, in 1/65536.
    pub threshold: u16,
}

versions! {
    /// Writes `x ∘ mask`, where `x` starts at element `first` of the whole input, a multiple of 4.
    pub fn apply<E>(mask: DropoutMask, first: usize, x: &[E], y: &mut [E]) {
        let scale = mask.keep_scale();
        for (group, (x, y)) in x.chunks(4).zip(y.chunks_mut(4)).enumerate() {
            let draw = mask.draw(first / 4 + group);
            for (lane, (x, y)) in x.iter().zip(y).enumerate() {
                *y = E::from_f32(x.to_f32() * mask.factor(draw, lane, scale));
            }
        }
    }
}

versions! {
    /// Adds `grad ∘ mask` to `sum`, with the mask of [`apply`].
    pub fn add_masked<E>(mask: DropoutMask, first: usize, grad: &[E], sum: &mut [E]) {
        let scale = mask.keep_scale();
        for (group, (grad, sum)) in grad.chunks(4).zip(sum.chunks_mut(4)).enumerate() {
            let draw = mask.draw(first / 4 + group);
            for (lane, (grad, sum)) in grad.iter().zip(sum).enumerate() {
                *sum = E::from_f32(sum.to_f32() + grad.to_f32() * mask.factor(draw, lane, scale));
            }
        }
    }
}

#[expect(clippy::inline_always, reason = "inlined into every version of a kernel")]
impl DropoutMask {
    /// Returns the factor of elements that are kept: `1 / (1 − p)`.
    #[inline(always)]
    pub fn keep_scale(self) -> f32 {
        65536.0 / (65536.0 - f32::from(self.threshold))
    }

    /// Returns the mask of the input that starts at element `first` of this one, a multiple of 4.
    #[must_use]
    pub const fn starting_at(self, first: u64) -> Self {
        Self { key: self.key.wrapping_add((first / 4).wrapping_mul(GOLDEN_GAMMA)), ..self }
    }

    /// Returns the 64 random bits of a group of four elements.
    #[inline(always)]
    fn draw(self, group: usize) -> u64 {
        mix(self.key.wrapping_add((group as u64).wrapping_mul(GOLDEN_GAMMA)))
    }

    #[inline(always)]
    fn factor(self, draw: u64, lane: usize, scale: f32) -> f32 {
        if (draw >> (16 * lane)) as u16 >= self.threshold { scale } else { 0.0 }
    }
}

/// Mixes 64 bits so that each output bit depends on every input bit.
///
/// # Source
/// The finaliser of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators,
/// OOPSLA 2014), variant 13 of David Stafford.
#[expect(clippy::inline_always, reason = "inlined into every version of a kernel")]
#[inline(always)]
pub const fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    bits ^ (bits >> 31)
}

#[cfg(test)]
mod tests {
    use super::{DropoutMask, add_masked, apply};

    #[test]
    fn keeps_the_mean_and_the_rate_and_replays() {
        for threshold in [3277, 32768] {
            let mask = DropoutMask { key: 7, threshold };
            let probability = f64::from(threshold) / 65536.0;
            let mut values = vec![0.0_f32; 100_001];
            apply(mask, 0, &vec![1.0; values.len()], &mut values);
            let zeroed = values.iter().filter(|value| **value == 0.0).count() as f64 / 100_001.0;
            let mean = values.iter().sum::<f32>() / 100_001.0;
            // Five standard deviations of a binomial of 100,000.
            assert!((zeroed - probability).abs() < 0.008, "{zeroed} of {probability}");
            assert!((mean - 1.0).abs() < 0.02, "{mean}");
            // A slice computed alone has the same mask.
            let mut part = vec![0.0_f32; 1001];
            add_masked(mask, 4000, &vec![1.0; 1001], &mut part);
            assert_eq!(part, values[4000..5001]);
            let mut alone = vec![0.0_f32; 1001];
            apply(mask.starting_at(4000), 0, &vec![1.0; 1001], &mut alone);
            assert_eq!(alone, part);
        }
    }
}
