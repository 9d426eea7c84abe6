//! What computes the operators: one backend for each kind of device.

use finetune_kernels::{adamw::AdamWStep, dropout::DropoutMask};
use tch::{Device, Kind, Tensor};

use crate::{
    ops::{AttentionMask, Factor, QuantizedState, aten, cpu::Cpu},
    runtime::profile,
};

/// Returns the backend that computes on a device.
pub(super) fn backend_of(device: Device) -> &'static dyn Backend {
    match device {
        Device::Cpu => &Cpu,
        _ => &Aten,
    }
}

/// The operators, as the functions of the same names in [`crate::ops`] describe them.
///
/// By default they are composed of libtorch's, so a backend implements only what it has kernels for.
pub(super) trait Backend {
    /// Returns the multiple to which the tokens of a micro-batch of a type are padded.
    fn token_multiple(&self, _kind: Kind) -> usize {
        64
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
        aten::rms_norm(x, weight, eps)
    }

    fn rms_norm_backward(
        &self,
        x: &Tensor,
        weight: &Tensor,
        eps: f64,
        dy: Tensor,
        residual: Option<&Tensor>,
        weight_grad: Option<&Tensor>,
    ) -> Tensor {
        aten::rms_norm_backward(x, weight, eps, dy, residual, weight_grad)
    }

    fn swiglu(&self, gate: &Tensor, up: &Tensor) -> Tensor {
        aten::swiglu(gate, up)
    }

    fn swiglu_backward(
        &self,
        d_product: Tensor,
        gate: Tensor,
        up: Tensor,
    ) -> (Tensor, Tensor, Tensor) {
        aten::swiglu_backward(d_product, gate, up)
    }

    fn rotate(&self, x: Tensor, cos: &Tensor, sin: &Tensor, direction: f64) -> Tensor {
        aten::rotate(&x, cos, sin, direction)
    }

    fn cross_entropy_backward(&self, logits: Tensor, labels: &Tensor) -> (f64, Tensor) {
        aten::cross_entropy_backward(&logits, labels)
    }

    fn cross_entropy(&self, logits: &Tensor, labels: &Tensor) -> f64 {
        aten::cross_entropy(logits, labels)
    }

    fn dropout(&self, x: &Tensor, mask: DropoutMask) -> Tensor {
        aten::dropout(x, mask)
    }

    fn add_masked(&self, sum: &mut Tensor, grad: &Tensor, mask: DropoutMask) {
        aten::add_masked(sum, grad, mask);
    }

    fn accumulate(&self, sum: &Tensor, more: &Tensor) {
        aten::accumulate(sum, more);
    }

    fn products(&self, terms: &[(&Tensor, Factor<'_>)], bias: Option<&Tensor>) -> Tensor {
        aten::products(terms, bias, aten::add_product)
    }

    fn multiply(&self, left: &Tensor, factor: Factor<'_>, scale: f64, to: &mut Tensor) {
        aten::multiply(left, factor, scale, to);
    }

    fn add_product(&self, left: &Tensor, factor: Factor<'_>, to: &mut Tensor) {
        aten::add_product(left, factor, to);
    }

    /// Adds `leftᵀ · right` to a weight gradient, or overwrites it.
    fn outer(&self, left: &Tensor, right: &Tensor, grad: &Tensor, accumulate: bool) {
        profile::time("weight gradient", || {
            if !accumulate {
                let _ = grad.shallow_clone().zero_();
            }
            aten::add_outer(left, right, grad);
        });
    }

    fn adamw(&self, step: AdamWStep, grad: &Tensor, state: [Tensor; 3], compute: Tensor) {
        aten::adamw(step, grad, state, compute);
    }

    fn adamw_8bit(
        &self,
        step: AdamWStep,
        key: u64,
        grad: &Tensor,
        master: Tensor,
        moments: [&QuantizedState; 2],
        compute: Tensor,
    ) {
        aten::adamw_8bit(step, key, grad, master, moments, compute);
    }

    fn sum_of_squares(&self, values: &Tensor) -> f64 {
        aten::sum_of_squares(values)
    }

    fn attention(&self, inputs: [&Tensor; 3], mask: AttentionMask<'_>) -> (Tensor, Vec<Tensor>) {
        if aten::flash::is_supported(inputs[0]) {
            aten::flash::attention(inputs, mask)
        } else {
            aten::scores::attention(inputs, mask)
        }
    }

    fn attention_backward(
        &self,
        inputs: [&Tensor; 3],
        out: &Tensor,
        logsumexp: &[Tensor],
        d_out: &Tensor,
        mask: AttentionMask<'_>,
    ) -> [Tensor; 3] {
        if aten::flash::is_supported(inputs[0]) {
            aten::flash::attention_backward(inputs, out, logsumexp, d_out, mask)
        } else {
            aten::scores::attention_backward(inputs, out, logsumexp, d_out, mask)
        }
    }
}

/// Every operator composed of libtorch's, for devices without kernels of our own.
pub(super) struct Aten;

impl Backend for Aten {}
