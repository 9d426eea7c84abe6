//! Dropout whose noise is a function of a key and an element's number, so that it is never stored.

use crate::versions::versions;

/// What the counter of a group of four neighbours is ahead of the one before: 2⁶⁴ over the golden
/// ratio, as in SplitMix64.
pub const NEXT_GROUP: u64 = 0x9E37_79B9_7F4A_7C15;

/// What one input is multiplied with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Noise {
    /// Which noise.
    pub key: u64,
    /// The probability of zeroing, in 1/65536.
    pub threshold: u16,
}

versions! {
    /// Writes `x ∘ mask`, where `x` starts at the whole input's element `first`, a multiple of 4.
    pub fn apply<E>(noise: Noise, first: usize, x: &[E], y: &mut [E]) {
        let kept = noise.kept();
        for (group, (x, y)) in x.chunks(4).zip(y.chunks_mut(4)).enumerate() {
            let draw = noise.draw(first / 4 + group);
            for (lane, (x, y)) in x.iter().zip(y).enumerate() {
                *y = E::from_f32(x.to_f32() * noise.factor(draw, lane, kept));
            }
        }
    }
}

versions! {
    /// Adds `grad ∘ mask` to `sum`, with the mask of [`apply`].
    pub fn add_masked<E>(noise: Noise, first: usize, grad: &[E], sum: &mut [E]) {
        let kept = noise.kept();
        for (group, (grad, sum)) in grad.chunks(4).zip(sum.chunks_mut(4)).enumerate() {
            let draw = noise.draw(first / 4 + group);
            for (lane, (grad, sum)) in grad.iter().zip(sum).enumerate() {
                *sum = E::from_f32(sum.to_f32() + grad.to_f32() * noise.factor(draw, lane, kept));
            }
        }
    }
}

#[expect(clippy::inline_always, reason = "called in every version of a kernel")]
impl Noise {
    /// Returns the factor on what is not zeroed, the reciprocal of its probability.
    #[inline(always)]
    pub fn kept(self) -> f32 {
        65536.0 / (65536.0 - f32::from(self.threshold))
    }

    /// Returns the same noise for an input that starts at element `first` of this one's, a multiple
    /// of 4.
    #[must_use]
    pub const fn from_element(self, first: u64) -> Self {
        Self { key: self.key.wrapping_add((first / 4).wrapping_mul(NEXT_GROUP)), ..self }
    }

    /// Returns the 64 random bits that four neighbours share.
    #[inline(always)]
    fn draw(self, group: usize) -> u64 {
        mix(self.key.wrapping_add((group as u64).wrapping_mul(NEXT_GROUP)))
    }

    #[inline(always)]
    fn factor(self, draw: u64, lane: usize, kept: f32) -> f32 {
        if (draw >> (16 * lane)) as u16 >= self.threshold { kept } else { 0.0 }
    }
}

/// Mixes 64 bits so that each output bit depends on every input bit.
///
/// # Source
/// The finaliser of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators,
/// OOPSLA 2014), variant 13 of David Stafford.
#[expect(clippy::inline_always, reason = "called in every version of a kernel")]
#[inline(always)]
pub const fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    bits ^ (bits >> 31)
}

#[cfg(test)]
mod tests {
    use super::{Noise, add_masked, apply};

    #[test]
    fn keeps_the_mean_and_the_rate_and_replays() {
        for threshold in [3277, 32768] {
            let noise = Noise { key: 7, threshold };
            let probability = f64::from(threshold) / 65536.0;
            let mut mask = vec![0.0_f32; 100_001];
            apply(noise, 0, &vec![1.0; mask.len()], &mut mask);
            let zeroed = mask.iter().filter(|value| **value == 0.0).count() as f64 / 100_001.0;
            let mean = mask.iter().sum::<f32>() / 100_001.0;
            // Five standard deviations of a binomial of 100,000.
            assert!((zeroed - probability).abs() < 0.008, "{zeroed} of {probability}");
            assert!((mean - 1.0).abs() < 0.02, "{mean}");
            // A part computed alone has the part's own noise.
            let mut part = vec![0.0_f32; 1001];
            add_masked(noise, 4000, &vec![1.0; 1001], &mut part);
            assert_eq!(part, mask[4000..5001]);
            let mut alone = vec![0.0_f32; 1001];
            apply(noise.from_element(4000), 0, &vec![1.0; 1001], &mut alone);
            assert_eq!(alone, part);
        }
    }
}
