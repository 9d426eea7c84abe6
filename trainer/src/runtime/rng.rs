//! The only source of random numbers: counter-based keys derived from the run's seed, as in JAX.
//!
//! There is no generator state to save. Any number can be recomputed from its key and index, which
//! makes resuming exact and lets the backward pass replay dropout.

use finetune_kernels::dropout::mix;
use tch::{Device, Kind, Tensor};

/// A random key: splitting it by numbers and names yields independent streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RngKey(u64);

impl RngKey {
    /// Returns the root key of a seed.
    pub const fn from_seed(seed: u64) -> Self {
        Self(mix(seed ^ 0x5851_F42D_4C95_7F2D))
    }

    /// Derives the key of a number: a step, a layer, a purpose.
    #[must_use]
    pub const fn fold_in(self, number: u64) -> Self {
        Self(mix(self.0 ^ mix(number.wrapping_add(0x9E37_79B9_7F4A_7C15))))
    }

    /// Derives the key of a name.
    #[must_use]
    pub fn fold_in_name(self, name: &str) -> Self {
        name.bytes().fold(self.fold_in(name.len() as u64), |key, byte| key.fold_in(u64::from(byte)))
    }

    /// Returns the key as a number, for kernels that draw their own numbers.
    pub const fn to_bits(self) -> u64 {
        self.0
    }

    /// Returns the `index`-th number of this key, uniform over 64 bits.
    #[inline]
    pub const fn draw(self, index: u64) -> u64 {
        mix(self.0.wrapping_add(index.wrapping_mul(0x9E37_79B9_7F4A_7C15)))
    }

    /// Returns the `index`-th number of this key, uniform in `[0, 1)`.
    pub fn uniform(self, index: u64) -> f64 {
        (self.draw(index) >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Returns an fp32 tensor, uniform in `[-bound, bound)`.
    pub fn uniform_tensor(self, shape: &[i64], bound: f64, device: Device) -> Tensor {
        tensor(shape, device, |index| (2.0 * self.uniform(index) - 1.0) * bound)
    }

    /// Returns an fp32 tensor of normal numbers with mean 0 and variance 1 (Box–Muller).
    pub fn normal_tensor(self, shape: &[i64], device: Device) -> Tensor {
        tensor(shape, device, |index| {
            let radius = (-2.0 * (1.0 - self.uniform(2 * index)).ln()).sqrt();
            radius * (std::f64::consts::TAU * self.uniform(2 * index + 1)).cos()
        })
    }
}

fn tensor(shape: &[i64], device: Device, value: impl Fn(u64) -> f64) -> Tensor {
    let length = shape.iter().product::<i64>() as u64;
    let values: Vec<f32> = (0..length).map(|index| value(index) as f32).collect();
    Tensor::from_slice(&values).view(shape).to_device(device).to_kind(Kind::Float)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_a_pure_function_of_its_path() {
        let root = RngKey::from_seed(1);
        assert_eq!(root.fold_in(3).draw(5), RngKey::from_seed(1).fold_in(3).draw(5));
        assert_ne!(root.fold_in(3).draw(5), root.fold_in(4).draw(5));
        assert_ne!(root.fold_in(3).draw(5), RngKey::from_seed(2).fold_in(3).draw(5));
        assert_ne!(root.fold_in_name("lora_A"), root.fold_in_name("lora_B"));
    }

    #[test]
    fn distributions_have_their_moments() {
        let root = RngKey::from_seed(11);
        let uniform = root.uniform_tensor(&[100_000], 2.0, Device::Cpu);
        assert!(uniform.mean(Kind::Float).double_value(&[]).abs() < 0.02);
        assert!((uniform.std(false).double_value(&[]) - 4.0 / 12.0_f64.sqrt()).abs() < 0.01);
        let normal = root.normal_tensor(&[100_000], Device::Cpu);
        assert!(normal.mean(Kind::Float).double_value(&[]).abs() < 0.016);
        assert!((normal.std(false).double_value(&[]) - 1.0).abs() < 0.012);
    }
}
