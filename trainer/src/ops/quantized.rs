//! Flat numbers in a byte each.

use finetune_contract::cost::MOMENTS_BLOCK;
use finetune_kernels::adamw_8bit::{BLOCK, LARGEST, LARGEST_SIGNED};
use tch::{Device, Kind, Tensor};

use crate::ops::aten::stretches;

const BLOCK_SIZE: i64 = BLOCK as i64;
// The plan predicts the memory of the scales.
const _: () = assert!(BLOCK as u64 == MOMENTS_BLOCK);

/// Numbers as [`finetune_kernels::adamw_8bit`] stores them: a code each, a scale for each block.
#[derive(Debug)]
pub struct Codes {
    /// `[blocks · BLOCK]`, `i8` if numbers have signs and else `u8`; more than there are numbers.
    pub(super) bytes: Tensor,
    /// `[blocks]`, fp32.
    pub(super) scales: Tensor,
    length: i64,
}

impl Codes {
    /// Makes `length` zeros.
    pub fn zeros(length: i64, has_signs: bool, device: Device) -> Self {
        let blocks = blocks_of(length);
        let kind = if has_signs { Kind::Int8 } else { Kind::Uint8 };
        Self {
            bytes: Tensor::zeros([blocks * BLOCK_SIZE], (kind, device)),
            scales: Tensor::zeros([blocks], (Kind::Float, device)),
            length,
        }
    }

    /// Returns where they are.
    pub fn device(&self) -> Device {
        self.bytes.device()
    }

    /// Returns how many numbers there are.
    pub fn length(&self) -> i64 {
        self.length
    }

    /// Returns `length` numbers from the `start`-th on, `[length]` in fp32.
    pub fn values(&self, start: i64, length: i64) -> Tensor {
        let first = start / BLOCK_SIZE;
        let blocks = blocks_of(start + length) - first;
        let codes = self.bytes.narrow(0, first * BLOCK_SIZE, blocks * BLOCK_SIZE);
        let roots = codes.to_kind(Kind::Float) * (1.0 / self.largest());
        let shares = roots.square().square() * roots.sign();
        let scales = self.scales.narrow(0, first, blocks).unsqueeze(1);
        let values = shares.view([blocks, BLOCK_SIZE]) * scales;
        values.view(-1).narrow(0, start - first * BLOCK_SIZE, length)
    }

    /// Replaces all numbers, each by the nearest there is a code for; `values` is asked for so many
    /// in fp32 from such a one on, a piece at a time.
    ///
    /// What [`Self::values`] returned gives the same codes again.
    pub fn replace(&self, mut values: impl FnMut(i64, i64) -> Tensor) {
        for (start, length) in stretches(self.length) {
            self.set(start, &values(start, length).to_device(self.bytes.device()), None);
        }
    }

    /// Replaces numbers from the `start`-th on, a block's first, up to a block's last: each by one
    /// of the two around it that there are codes for, as its number of `uniform` from 0 to 1 says,
    /// or by the nearest.
    pub(super) fn set(&self, start: i64, values: &Tensor, uniform: Option<&Tensor>) {
        let length = values.size()[0];
        let blocks = blocks_of(length);
        let padded = |flat: &Tensor| {
            flat.constant_pad_nd([0, blocks * BLOCK_SIZE - length]).view([blocks, BLOCK_SIZE])
        };
        let values = padded(values);
        let largest = values.abs().amax([1], true);
        let by = largest.reciprocal().nan_to_num(0.0, 0.0, 0.0);
        let shares = values.abs() * by;
        let roots = shares.sqrt().sqrt() * self.largest();
        let codes = match uniform {
            None => roots.round(),
            Some(uniform) => {
                let below = roots.floor().clamp_max(self.largest() - 1.0);
                let share = |code: &Tensor| (code * (1.0 / self.largest())).square().square();
                let (low, high) = (share(&below), share(&(&below + 1.0)));
                let is_above = (padded(uniform) * (high - &low)).lt_tensor(&(shares - low));
                below + is_above.to_kind(Kind::Float)
            }
        };
        let codes = if self.bytes.kind() == Kind::Int8 {
            codes * values.sign()
        } else {
            // As in the kernel: no second moment becomes zero.
            codes.maximum(&values.sign())
        };
        self.bytes.narrow(0, start, blocks * BLOCK_SIZE).copy_(&codes.view(-1));
        self.scales.narrow(0, start / BLOCK_SIZE, blocks).copy_(&largest.view(-1));
    }

    fn largest(&self) -> f64 {
        f64::from(if self.bytes.kind() == Kind::Int8 { LARGEST_SIGNED } else { LARGEST })
    }
}

/// Returns how many blocks hold `length` numbers.
fn blocks_of(length: i64) -> i64 {
    (length as u64).div_ceil(BLOCK as u64) as i64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::rng::Counter;

    #[test]
    fn what_was_read_is_stored_without_loss() {
        for has_signs in [true, false] {
            let numbers = Counter::from_seed(3).normal_tensor(&[100_003], Device::Cpu);
            // Seven orders of magnitude, and a block of zeros.
            let numbers = &numbers * (numbers.cos() * 8.0).exp();
            let _ = numbers.narrow(0, 512, 256).zero_();
            let numbers = if has_signs { numbers } else { numbers.square() };
            let codes = Codes::zeros(100_003, has_signs, Device::Cpu);
            codes.replace(|start, length| numbers.narrow(0, start, length));
            let read = codes.values(0, 100_003);
            let again = Codes::zeros(100_003, has_signs, Device::Cpu);
            again.replace(|start, length| read.narrow(0, start, length));
            assert_eq!(again.bytes, codes.bytes);
            assert_eq!(again.scales, codes.scales);
            assert_eq!(codes.values(1000, 3000), read.narrow(0, 1000, 3000));
            // The largest of a block is exact, and half a step is the worst for the others.
            let blocks = |flat: &Tensor| flat.narrow(0, 0, 99_840).view([390, 256]);
            let largest = blocks(&numbers.abs()).amax([1], true);
            assert_eq!(blocks(&read.abs()).amax([1], true), largest);
            let off = (blocks(&read) - blocks(&numbers)).abs() / &largest.clamp_min(1e-30);
            let bound = if has_signs { 2.1 / 127.0 } else { 2.1 / 255.0 };
            assert!(off.max().double_value(&[]) < bound);
        }
    }
}
