//! Rotary position embedding: half of each head rotated against the other half.

use tch::{Device, Kind, Tensor};

use super::config::{Rope, RopeScaling};
use crate::ops;

/// Angles for some positions, ready to multiply.
#[derive(Debug)]
pub struct Rotary {
    cos: Tensor, // [T, 1, E/2]
    sin: Tensor, // [T, 1, E/2]
}

/// Returns the angular frequency of each pair of a head, `[E/2]`.
///
/// # Source
/// arXiv 2104.09864, equation 15; stretching as in `transformers/modeling_rope_utils.py`, 5.23.
pub fn frequencies(rope: &Rope, head_dim: usize) -> Vec<f64> {
    (0..head_dim / 2)
        .map(|pair| {
            let frequency = rope.theta.powf(-(2.0 * pair as f64) / head_dim as f64);
            stretch(frequency, &rope.scaling)
        })
        .collect()
}

fn stretch(frequency: f64, scaling: &RopeScaling) -> f64 {
    match *scaling {
        RopeScaling::None => frequency,
        RopeScaling::Linear { factor } => frequency / factor,
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => {
            let wavelength = std::f64::consts::TAU / frequency;
            if wavelength > original_max_position_embeddings / low_freq_factor {
                frequency / factor
            } else if wavelength < original_max_position_embeddings / high_freq_factor {
                frequency
            } else {
                let smooth = (original_max_position_embeddings / wavelength - low_freq_factor)
                    / (high_freq_factor - low_freq_factor);
                (1.0 - smooth) * frequency / factor + smooth * frequency
            }
        }
    }
}

impl Rotary {
    /// Computes the angles of positions in f64 and rounds once, to `kind`.
    ///
    /// bf16 cannot hold 257, so neither frequencies nor positions nor angles may pass through it.
    pub fn new(frequencies: &[f64], positions: &[i64], kind: Kind, device: Device) -> Self {
        let frequencies = Tensor::from_slice(frequencies);
        let positions = Tensor::from_slice(positions).to_kind(Kind::Double);
        let angles = positions.unsqueeze(1) * frequencies.unsqueeze(0); // [T, E/2]
        let ready = |table: Tensor| table.unsqueeze(1).to_kind(kind).to_device(device).contiguous();
        Self { cos: ready(angles.cos()), sin: ready(angles.sin()) }
    }

    /// Rotates `[T, heads, E]`, in its own memory.
    pub fn rotate(&self, x: Tensor) -> Tensor {
        ops::rotate(x, &self.cos, &self.sin, 1.0)
    }

    /// Rotates a gradient `[T, heads, E]` back: the inverse of a rotation is its transpose.
    pub fn rotate_back(&self, dy: Tensor) -> Tensor {
        ops::rotate(dy, &self.cos, &self.sin, -1.0)
    }
}
