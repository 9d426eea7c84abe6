//! Optimizer state that is quantized blockwise to 8 bits.

use finetune_contract::cost::MOMENTS_BLOCK;
use finetune_kernels::adamw_8bit::{BLOCK, MAX_SIGNED_CODE, MAX_UNSIGNED_CODE};
use tch::{Device, Kind, Tensor};

use crate::ops::aten::chunks;

const BLOCK_SIZE: i64 = BLOCK as i64;
// The plan predicts the memory of the scales.
const _: () = assert!(BLOCK as u64 == MOMENTS_BLOCK);

/// A flat state tensor in the format of [`finetune_kernels::adamw_8bit`]: an 8-bit code per
/// element, a scale per block.
#[derive(Debug)]
pub struct QuantizedState {
    /// `[blocks · BLOCK]`, `i8` if elements are signed and else `u8`; padded to whole blocks.
    pub(super) codes: Tensor,
    /// `[blocks]`, fp32.
    pub(super) scales: Tensor,
    length: i64,
}

impl QuantizedState {
    /// Creates a state of zeros.
    pub fn zeros(length: i64, is_signed: bool, device: Device) -> Self {
        let blocks = blocks_of(length);
        let kind = if is_signed { Kind::Int8 } else { Kind::Uint8 };
        Self {
            codes: Tensor::zeros([blocks * BLOCK_SIZE], (kind, device)),
            scales: Tensor::zeros([blocks], (Kind::Float, device)),
            length,
        }
    }

    /// Returns the device of the state.
    pub fn device(&self) -> Device {
        self.codes.device()
    }

    /// Returns the number of elements.
    pub fn length(&self) -> i64 {
        self.length
    }

    /// Dequantizes `length` elements from `start` on, `[length]` in fp32.
    pub fn dequantize(&self, start: i64, length: i64) -> Tensor {
        let first = start / BLOCK_SIZE;
        let blocks = blocks_of(start + length) - first;
        let codes = self.codes.narrow(0, first * BLOCK_SIZE, blocks * BLOCK_SIZE);
        let roots = codes.to_kind(Kind::Float) * (1.0 / self.max_code());
        let shares = roots.square().square() * roots.sign();
        let scales = self.scales.narrow(0, first, blocks).unsqueeze(1);
        let values = shares.view([blocks, BLOCK_SIZE]) * scales;
        values.view(-1).narrow(0, start - first * BLOCK_SIZE, length)
    }

    /// Quantizes all elements, rounding to nearest. `values(start, length)` is called for one chunk
    /// after another and returns fp32 values.
    ///
    /// Values from [`Self::dequantize`] quantize to the same codes again.
    pub fn quantize(&self, mut values: impl FnMut(i64, i64) -> Tensor) {
        for (start, length) in chunks(self.length) {
            self.quantize_blocks(
                start,
                &values(start, length).to_device(self.codes.device()),
                None,
            );
        }
    }

    /// Quantizes whole blocks from element `start` on: with stochastic rounding by `uniform`
    /// numbers in `[0, 1)`, or to nearest.
    pub(super) fn quantize_blocks(&self, start: i64, values: &Tensor, uniform: Option<&Tensor>) {
        let length = values.size()[0];
        let blocks = blocks_of(length);
        let padded = |flat: &Tensor| {
            flat.constant_pad_nd([0, blocks * BLOCK_SIZE - length]).view([blocks, BLOCK_SIZE])
        };
        let values = padded(values);
        let scales = values.abs().amax([1], true);
        let inverse = scales.reciprocal().nan_to_num(0.0, 0.0, 0.0);
        let shares = values.abs() * inverse; // relative to the block's scale
        let roots = shares.sqrt().sqrt() * self.max_code();
        let codes = match uniform {
            None => roots.round(),
            Some(uniform) => {
                let below = roots.floor().clamp_max(self.max_code() - 1.0);
                let share = |code: &Tensor| (code * (1.0 / self.max_code())).square().square();
                let (low, high) = (share(&below), share(&(&below + 1.0)));
                let is_above = (padded(uniform) * (high - &low)).lt_tensor(&(shares - low));
                below + is_above.to_kind(Kind::Float)
            }
        };
        let codes = if self.codes.kind() == Kind::Int8 {
            codes * values.sign()
        } else {
            // As in the kernel: a positive second moment is never rounded to zero.
            codes.maximum(&values.sign())
        };
        self.codes.narrow(0, start, blocks * BLOCK_SIZE).copy_(&codes.view(-1));
        self.scales.narrow(0, start / BLOCK_SIZE, blocks).copy_(&scales.view(-1));
    }

    fn max_code(&self) -> f64 {
        f64::from(if self.codes.kind() == Kind::Int8 { MAX_SIGNED_CODE } else { MAX_UNSIGNED_CODE })
    }
}

/// Returns the number of blocks of `length` elements.
fn blocks_of(length: i64) -> i64 {
    (length as u64).div_ceil(BLOCK as u64) as i64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::rng::RngKey;

    #[test]
    fn dequantized_values_quantize_to_the_same_codes() {
        for is_signed in [true, false] {
            let numbers = RngKey::from_seed(3).normal_tensor(&[100_003], Device::Cpu);
            // Seven orders of magnitude, and a block of zeros.
            let numbers = &numbers * (numbers.cos() * 8.0).exp();
            let _ = numbers.narrow(0, 512, 256).zero_();
            let numbers = if is_signed { numbers } else { numbers.square() };
            let state = QuantizedState::zeros(100_003, is_signed, Device::Cpu);
            state.quantize(|start, length| numbers.narrow(0, start, length));
            let read = state.dequantize(0, 100_003);
            let again = QuantizedState::zeros(100_003, is_signed, Device::Cpu);
            again.quantize(|start, length| read.narrow(0, start, length));
            assert_eq!(again.codes, state.codes);
            assert_eq!(again.scales, state.scales);
            assert_eq!(state.dequantize(1000, 3000), read.narrow(0, 1000, 3000));
            // The largest element of a block is exact, the others are off by half a code at most.
            let blocks = |flat: &Tensor| flat.narrow(0, 0, 99_840).view([390, 256]);
            let largest = blocks(&numbers.abs()).amax([1], true);
            assert_eq!(blocks(&read.abs()).amax([1], true), largest);
            let off = (blocks(&read) - blocks(&numbers)).abs() / &largest.clamp_min(1e-30);
            let bound = if is_signed { 2.1 / 127.0 } else { 2.1 / 255.0 };
            assert!(off.max().double_value(&[]) < bound);
        }
    }
}
