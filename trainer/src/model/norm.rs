//! Root-mean-square normalisation.

use tch::{Kind, Tensor};

use super::params::Param;

/// `y = x / rms(x) · weight`, over the last axis.
///
/// # Source
/// arXiv 1910.07467, equation 4; statistics in fp32 as in `transformers/models/llama/modeling_llama.py`.
#[derive(Debug)]
pub struct RmsNorm {
    /// `[width]`.
    pub weight: Param,
    /// Added to the mean square.
    pub eps: f64,
}

impl RmsNorm {
    /// Computes the norm of `[…, width]`.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let (x_hat, _) = self.normalized(x);
        x_hat.to_kind(x.kind()) * &self.weight.value
    }

    /// Returns the gradient of the input and adds that of a trained weight.
    ///
    /// With `x̂ = x / rms(x)` and `g = dy ∘ weight`: `dx = (g − x̂ · mean(g ∘ x̂)) / rms(x)`.
    pub fn backward(&self, x: &Tensor, dy: &Tensor) -> Tensor {
        let (x_hat, rstd) = self.normalized(x);
        let dy = dy.to_kind(Kind::Float);
        if let Some(grad) = &self.weight.grad {
            let width = grad.size()[0];
            let by_row = (&dy * &x_hat).view([-1, width]);
            let _ = grad.shallow_clone().g_add_(&by_row.sum_dim_intlist(0, false, Kind::Float));
        }
        let g = dy * self.weight.value.to_kind(Kind::Float);
        let mean = (&g * &x_hat).mean_dim(-1, true, Kind::Float);
        ((g - x_hat * mean) * rstd).to_kind(x.kind())
    }

    /// Returns `x / rms(x)` and `1 / rms(x)`, in fp32.
    fn normalized(&self, x: &Tensor) -> (Tensor, Tensor) {
        let x = x.to_kind(Kind::Float);
        let rstd = (x.square().mean_dim(-1, true, Kind::Float) + self.eps).rsqrt();
        (x * &rstd, rstd)
    }
}
