//! AdamW with 8-bit moments, quantized blockwise, in one pass over memory.
//!
//! The elements of a [`BLOCK`] share a scale, the largest magnitude among them. A code is the
//! fourth root of the ratio of a moment to the scale, so that small moments keep some precision: in
//! steps of 1/127 for the signed first moment, of 1/255 for the second. Rounding is stochastic and
//! unbiased. Rounding to nearest would freeze the second moment, which changes by a thousandth per
//! step.
//!
//! # Source
//! Blockwise scales: Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv
//! 2110.02861. Differs: the code book, and stochastic rounding.

use crate::{
    adamw::{AdamWStep, update},
    dropout::{GOLDEN_GAMMA, mix},
    versions::versions,
};

/// Elements that share a scale.
pub const BLOCK: usize = 256;

/// The largest code of a first moment; its smallest is the negative.
pub const MAX_SIGNED_CODE: f32 = 127.0;
/// The largest code of a second moment.
pub const MAX_UNSIGNED_CODE: f32 = 255.0;

/// Adding this to an integer below 2²² leaves the integer in the lowest bits.
const INTEGER_MAGIC: f32 = 12_582_912.0;

/// The quantized moments of some parameters, which start at a block boundary.
#[derive(Debug)]
pub struct Moments<'a> {
    /// The codes of first moments.
    pub exp_avg: &'a mut [i8],
    /// The scale of each block of them.
    pub exp_avg_scale: &'a mut [f32],
    /// The codes of second moments.
    pub exp_avg_sq: &'a mut [u8],
    /// The scale of each block of them.
    pub exp_avg_sq_scale: &'a mut [f32],
}

versions! {
    /// As [`crate::adamw::step`]; `key` and the index of the first parameter, `first`, seed the
    /// stochastic rounding.
    pub fn step<E>(
        step: AdamWStep,
        key: u64,
        first: usize,
        grad: &[f32],
        master: &mut [f32],
        moments: Moments<'_>,
        compute: &mut [E],
    ) {
        let (mut exp_avg, mut exp_avg_sq) = ([0.0; BLOCK], [0.0; BLOCK]);
        for (block, (grad, master)) in grad.chunks(BLOCK).zip(master.chunks_mut(BLOCK)).enumerate() {
            let (at, length) = (block * BLOCK, grad.len());
            let codes = &mut moments.exp_avg[at..at + length];
            let codes_sq = &mut moments.exp_avg_sq[at..at + length];
            let scale = &mut moments.exp_avg_scale[block];
            let scale_sq = &mut moments.exp_avg_sq_scale[block];
            let (exp_avg, exp_avg_sq) = (&mut exp_avg[..length], &mut exp_avg_sq[..length]);
            for (value, &code) in exp_avg.iter_mut().zip(&*codes) {
                *value = *scale * decode_signed(f32::from(code));
            }
            for (value, &code) in exp_avg_sq.iter_mut().zip(&*codes_sq) {
                *value = *scale_sq * decode(f32::from(code) * (1.0 / MAX_UNSIGNED_CODE));
            }
            update(step, grad, master, exp_avg, exp_avg_sq);
            *scale = largest(exp_avg);
            *scale_sq = largest(exp_avg_sq);
            let [inverse, inverse_sq] = [*scale, *scale_sq].map(reciprocal);
            let uniform = uniform_of_block(key, first + at);
            for ((value, code), &uniform) in exp_avg.iter().zip(codes).zip(&uniform) {
                let root = encode(value.abs() * inverse, MAX_SIGNED_CODE, uniform);
                *code = (root.copysign(*value) + INTEGER_MAGIC).to_bits() as i8;
            }
            for ((&value, code), &uniform) in exp_avg_sq.iter().zip(codes_sq).zip(&uniform) {
                let root = encode(value * inverse_sq, MAX_UNSIGNED_CODE, uniform);
                // A second moment of zero would make the step of a parameter enormous.
                let root = if value > 0.0 { root.max(1.0) } else { root };
                *code = (root + INTEGER_MAGIC).to_bits() as u8;
            }
        }
        for (compute, &master) in compute.iter_mut().zip(master.iter()) {
            *compute = E::from_f32(master);
        }
    }
}

/// Decodes a code that was divided by the largest one: its fourth power.
#[expect(clippy::inline_always, reason = "inlined into every version of a kernel")]
#[inline(always)]
fn decode(root: f32) -> f32 {
    let square = root * root;
    square * square
}

#[expect(clippy::inline_always, reason = "inlined into every version of a kernel")]
#[inline(always)]
fn decode_signed(code: f32) -> f32 {
    let root = code * (1.0 / MAX_SIGNED_CODE);
    decode(root).copysign(root)
}

/// Encodes a ratio from 0 to 1 as one of the two nearest codes, chosen by `uniform`.
#[expect(clippy::inline_always, reason = "inlined into every version of a kernel")]
#[inline(always)]
fn encode(ratio: f32, max_code: f32, uniform: f32) -> f32 {
    let step = 1.0 / max_code;
    let below = (ratio.sqrt().sqrt() * max_code).floor().min(max_code - 1.0);
    let (low, high) = (decode(below * step), decode((below + 1.0) * step));
    if uniform * (high - low) < ratio - low { below + 1.0 } else { below }
}

/// Returns uniform numbers in `[0, 1)` for the block that starts at parameter `first`: four of 16
/// bits from each draw.
#[expect(clippy::inline_always, reason = "inlined into every version of a kernel")]
#[inline(always)]
fn uniform_of_block(key: u64, first: usize) -> [f32; BLOCK] {
    let mut draws = [0_u64; BLOCK / 4];
    for (group, draw) in draws.iter_mut().enumerate() {
        let number = (first / 4 + group) as u64;
        *draw = mix(key.wrapping_add(number.wrapping_mul(GOLDEN_GAMMA)));
    }
    let mut uniform = [0.0; BLOCK];
    for (uniform, draw) in uniform.chunks_exact_mut(4).zip(draws) {
        for (lane, uniform) in uniform.iter_mut().enumerate() {
            *uniform = f32::from((draw >> (16 * lane)) as u16) * (1.0 / 65536.0);
        }
    }
    uniform
}

#[expect(clippy::inline_always, reason = "inlined into every version of a kernel")]
#[inline(always)]
fn largest(values: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; 16];
    for values in values.chunks(16) {
        for (largest, value) in lanes.iter_mut().zip(values) {
            *largest = largest.max(value.abs());
        }
    }
    lanes.into_iter().fold(0.0, f32::max)
}

#[expect(clippy::inline_always, reason = "inlined into every version of a kernel")]
#[inline(always)]
fn reciprocal(scale: f32) -> f32 {
    // The ratios in a block of zeros, or of numbers too small to divide by, are zero.
    let inverse = 1.0 / scale;
    if inverse.is_finite() { inverse } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::numbers;

    const STEP: AdamWStep = AdamWStep {
        grad_scale: 1.0,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay_factor: 1.0,
        step_size: 1e-3,
        bias_correction2_sqrt: 1.0,
    };

    /// Masters and quantized moments.
    struct State {
        master: Vec<f32>,
        exp_avg: Vec<i8>,
        exp_avg_sq: Vec<u8>,
        scales: [Vec<f32>; 2],
    }

    impl State {
        fn new(length: usize) -> Self {
            let scales =
                [const { Vec::new() }; 2].map(|_: Vec<f32>| vec![0.0; length.div_ceil(BLOCK)]);
            let (exp_avg, exp_avg_sq) = (vec![0; length], vec![0; length]);
            Self { master: vec![0.0; length], exp_avg, exp_avg_sq, scales }
        }

        fn step(&mut self, key: u64, first: usize, grad: &[f32]) {
            let [exp_avg_scale, exp_avg_sq_scale] = &mut self.scales;
            let (exp_avg, exp_avg_sq) = (&mut self.exp_avg, &mut self.exp_avg_sq);
            let moments = Moments { exp_avg, exp_avg_scale, exp_avg_sq, exp_avg_sq_scale };
            step::<f32>(STEP, key, first, grad, &mut self.master, moments, &mut []);
        }

        fn second(&self, index: usize) -> f32 {
            self.scales[1][index / BLOCK]
                * decode(f32::from(self.exp_avg_sq[index]) / MAX_UNSIGNED_CODE)
        }
    }

    #[test]
    fn the_largest_element_of_a_block_is_exact_and_zeros_stay() {
        let mut state = State::new(2 * BLOCK + 10);
        let mut grad = numbers(2 * BLOCK + 10, 1);
        grad[BLOCK..2 * BLOCK].fill(0.0);
        for key in 0..20 {
            state.step(key, 0, &grad);
        }
        let (mut second, largest) = (0.0_f32, largest(&grad[..BLOCK]));
        for _ in 0..20 {
            second = second * STEP.beta2 + largest * largest * (1.0 - STEP.beta2);
        }
        assert!((state.scales[1][0] - second).abs() < 1e-6 * second);
        assert_eq!(state.exp_avg_sq[..BLOCK].iter().max(), Some(&255));
        assert!(state.master[BLOCK..2 * BLOCK].iter().all(|master| *master == 0.0));
        assert!(state.master.iter().all(|master| master.is_finite()));
    }

    #[test]
    fn moments_follow_gradients_that_change_slowly() {
        // One parameter sets the scale; the second moment of the others has to rise ninefold by
        // steps smaller than half a code.
        let mut state = State::new(BLOCK);
        let mut exact = 0.0_f64;
        for step in 0..6000_u64 {
            let size = if step < 3000 { 0.1 } else { 0.3 };
            let mut grad = vec![size; BLOCK];
            grad[0] = 1.0;
            state.step(mix(step), 0, &grad);
            exact = exact * 0.999 + f64::from(size * size) * 0.001;
        }
        let found: f64 = (1..BLOCK).map(|index| f64::from(state.second(index))).sum();
        let ratio = found / (BLOCK - 1) as f64 / exact;
        assert!((0.97..1.03).contains(&ratio), "{ratio}");
    }

    #[test]
    fn blocks_computed_alone_are_the_same() {
        let grad = numbers(4 * BLOCK, 5);
        let (mut whole, mut part) = (State::new(4 * BLOCK), State::new(2 * BLOCK));
        for key in 0..4 {
            whole.step(key, 0, &grad);
            part.step(key, 2 * BLOCK, &grad[2 * BLOCK..]);
        }
        assert_eq!(whole.exp_avg[2 * BLOCK..], part.exp_avg);
        assert_eq!(whole.master[2 * BLOCK..], part.master);
    }
}
