//! Rotary position embedding: half of each head rotated against the other half.

use tch::{Device, Kind, Tensor};

use crate::{
    architecture::rope::{Rope, RopeScaling},
    ops,
};

/// The cosines and sines of the rotation angles of some positions.
#[derive(Debug)]
pub struct Rotary {
    cos: Tensor, // [T, 1, E/2]
    sin: Tensor, // [T, 1, E/2]
}

/// The rotation frequencies of a head.
#[derive(Debug, Clone, PartialEq)]
pub struct Frequencies {
    /// The angular frequency of each pair of dimensions, `[E/2]`.
    pub per_pair: Vec<f64>,
    /// The factor on sines and cosines (YaRN's attention factor; else 1).
    pub attention_factor: f64,
}

/// Computes the frequencies for heads of width `head_dim`.
///
/// # Source
/// arXiv 2104.09864, equation 15; scaling as in `transformers/modeling_rope_utils.py`, 5.23.
pub fn frequencies(rope: &Rope, head_dim: usize) -> Frequencies {
    let frequency = |pair: usize| rope.theta.powf(-(2.0 * pair as f64) / head_dim as f64);
    let pairs = 0..head_dim / 2;
    let scaled = |scale: &dyn Fn(f64) -> f64| Frequencies {
        per_pair: pairs.clone().map(|pair| scale(frequency(pair))).collect(),
        attention_factor: 1.0,
    };
    match rope.scaling {
        RopeScaling::None | RopeScaling::Dynamic { .. } => scaled(&|frequency| frequency),
        RopeScaling::Linear { factor } => scaled(&|frequency| frequency / factor),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => scaled(&|frequency| {
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
        }),
        RopeScaling::Yarn {
            factor,
            original_max_position_embeddings,
            beta_fast,
            beta_slow,
            truncate,
            attention_factor,
        } => {
            let width = head_dim as f64;
            // The pair that makes this many rotations within the original context: arXiv
            // 2309.00071, §3.2.
            let pair_of = |rotations: f64| {
                let positions =
                    original_max_position_embeddings / (std::f64::consts::TAU * rotations);
                width * positions.ln() / (2.0 * rope.theta.ln())
            };
            let (mut low, mut high) = (pair_of(beta_fast), pair_of(beta_slow));
            if truncate {
                (low, high) = (low.floor(), high.ceil());
            }
            (low, high) = (low.max(0.0), high.min(width - 1.0));
            if (high - low).abs() < f64::EPSILON {
                high += 0.001;
            }
            let interpolated = |pair: usize| {
                let ramp = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
                frequency(pair) * (ramp / factor + 1.0 - ramp)
            };
            Frequencies { per_pair: pairs.map(interpolated).collect(), attention_factor }
        }
    }
}

impl Rotary {
    /// Computes the angles of positions in f64 and rounds their cosines and sines once, to `kind`.
    ///
    /// bf16 cannot hold 257, so neither frequencies nor positions nor angles may pass through it.
    pub fn new(frequencies: &Frequencies, positions: &[i64], kind: Kind, device: Device) -> Self {
        let Frequencies { per_pair, attention_factor } = frequencies;
        let frequencies = Tensor::from_slice(per_pair);
        let positions = Tensor::from_slice(positions).to_kind(Kind::Double);
        let angles = positions.unsqueeze(1) * frequencies.unsqueeze(0); // [T, E/2]
        let prepare =
            |table: Tensor| table.unsqueeze(1).to_kind(kind).to_device(device).contiguous();
        Self {
            cos: prepare(angles.cos() * *attention_factor),
            sin: prepare(angles.sin() * *attention_factor),
        }
    }

    /// Rotates `[T, heads, E]` in place.
    pub fn rotate(&self, x: Tensor) -> Tensor {
        ops::rotate(x, &self.cos, &self.sin, 1.0)
    }

    /// Returns the gradient of the input of [`Rotary::rotate`], `[T, heads, E]`: the inverse
    /// rotation.
    pub fn rotate_backward(&self, dy: Tensor) -> Tensor {
        ops::rotate(dy, &self.cos, &self.sin, -1.0)
    }
}
