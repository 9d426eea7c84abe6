//! Root-mean-square normalisation.

use tch::Tensor;

use crate::{
    ops,
    params::flat::{Gradient, Param},
};

/// `y = x / rms(x) · weight`, over the last axis.
///
/// # Source
/// arXiv 1910.07467, equation 4; statistics in fp32 as in
/// `transformers/models/llama/modeling_llama.py`.
#[derive(Debug)]
pub struct RmsNorm {
    /// `[width]`.
    pub weight: Param,
    /// Added to the mean square.
    pub eps: f64,
}

impl RmsNorm {
    /// Normalises `[…, width]`.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        ops::rms_norm(x, self.weight.value(), self.eps)
    }

    /// Returns the gradient of the input plus `residual`, and adds the gradient of a trained
    /// weight.
    ///
    /// The result reuses the memory of `dy`.
    pub fn backward(&self, x: &Tensor, dy: Tensor, residual: Option<&Tensor>) -> Tensor {
        let grad = self.weight.grad.as_ref().map(Gradient::sum);
        ops::rms_norm_backward(x, self.weight.value(), self.eps, dy, residual, grad)
    }
}
