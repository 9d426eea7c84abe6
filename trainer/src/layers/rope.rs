//! Rotary position embedding: half of each head rotated against the other half.

use tch::{Device, Kind, Tensor};

use crate::{
    architecture::rope::{Rope, RopeScaling},
    ops,
};

/// Angles for some positions, ready to multiply.
#[derive(Debug)]
pub struct Rotary {
    cos: Tensor, // [T, 1, E/2]
    sin: Tensor, // [T, 1, E/2]
}

/// What the angles of every position are made of.
#[derive(Debug, Clone, PartialEq)]
pub struct Frequencies {
    /// The angular frequency of each pair of a head, `[E/2]`.
    pub of_pairs: Vec<f64>,
    /// What sines and cosines are multiplied by.
    pub scale: f64,
}

/// Returns the frequencies of a head of some width.
///
/// # Source
/// arXiv 2104.09864, equation 15; stretching as in `transformers/modeling_rope_utils.py`, 5.23.
pub fn frequencies(rope: &Rope, head_dim: usize) -> Frequencies {
    let frequency = |pair: usize| rope.theta.powf(-(2.0 * pair as f64) / head_dim as f64);
    let pairs = 0..head_dim / 2;
    let plain = |stretch: &dyn Fn(f64) -> f64| Frequencies {
        of_pairs: pairs.clone().map(|pair| stretch(frequency(pair))).collect(),
        scale: 1.0,
    };
    match rope.scaling {
        RopeScaling::None | RopeScaling::Dynamic { .. } => plain(&|frequency| frequency),
        RopeScaling::Linear { factor } => plain(&|frequency| frequency / factor),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => plain(&|frequency| {
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
            // The pair that turns so often within the original context: arXiv 2309.00071, §3.2.
            let pair_of = |turns: f64| {
                let positions = original_max_position_embeddings / (std::f64::consts::TAU * turns);
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
            let stretched = |pair: usize| {
                let ramp = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
                frequency(pair) * (ramp / factor + 1.0 - ramp)
            };
            Frequencies { of_pairs: pairs.map(stretched).collect(), scale: attention_factor }
        }
    }
}

impl Rotary {
    /// Computes the angles of positions in f64 and rounds once, to `kind`.
    ///
    /// bf16 cannot hold 257, so neither frequencies nor positions nor angles may pass through it.
    pub fn new(frequencies: &Frequencies, positions: &[i64], kind: Kind, device: Device) -> Self {
        let Frequencies { of_pairs, scale } = frequencies;
        let frequencies = Tensor::from_slice(of_pairs);
        let positions = Tensor::from_slice(positions).to_kind(Kind::Double);
        let angles = positions.unsqueeze(1) * frequencies.unsqueeze(0); // [T, E/2]
        let ready = |table: Tensor| table.unsqueeze(1).to_kind(kind).to_device(device).contiguous();
        Self { cos: ready(angles.cos() * *scale), sin: ready(angles.sin() * *scale) }
    }

    /// Rotates `[T, heads, E]`, in its own memory.
    pub fn rotate(&self, x: Tensor) -> Tensor {
        ops::rotate(x, &self.cos, &self.sin, 1.0)
    }

    /// Takes a gradient `[T, heads, E]` back through [`Rotary::rotate`]: by the transpose of a rotation.
    pub fn rotate_back(&self, dy: Tensor) -> Tensor {
        ops::rotate(dy, &self.cos, &self.sin, -1.0)
    }
}
