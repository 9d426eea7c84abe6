//! The operators of a training step, dispatched by device.
//!
//! Each has two implementations: a fused kernel of our own for CPU tensors (`cpu`), and a
//! composition of libtorch's operators (`aten`), which other devices run and which is the reference
//! in tests. Attention has four: `cpu::attention` and `aten` on CPUs, `aten::flash` and
//! `aten::scores` elsewhere. `backend` chooses between them.

pub mod aten;
mod backend;
mod cpu;
mod quantized;
mod segment_runs;

use finetune_kernels::dropout::DropoutMask;
use tch::{Device, Kind, Tensor};

pub use finetune_kernels::adamw::AdamWStep;

use crate::{
    ops::backend::{Backend, backend_of},
    runtime::profile,
};

pub use quantized::QuantizedState;
pub use segment_runs::SegmentRun;

/// Returns the number of tokens to which a micro-batch is padded: a multiple of 8 for our own
/// kernels, and of 64 for oneDNN.
///
/// oneDNN compiles a kernel for each shape and caches it. Micro-batches without padding have a
/// different number of tokens in every step, each of which added about 20 MB to that cache
/// (`docs/log/2026-11.md`).
pub fn padded_tokens(tokens: usize, kind: Kind, device: Device) -> usize {
    tokens.next_multiple_of(backend_of(device).token_multiple(kind))
}

/// Returns the name of our kernel for bf16 matrix products on this CPU; `None` if libtorch computes
/// them.
pub fn bf16_kernel() -> Option<&'static str> {
    #[cfg(target_arch = "x86_64")]
    {
        <half::bf16 as finetune_kernels::GemmElement>::kernel().map(finetune_kernels::Kernel::name)
    }
    #[cfg(not(target_arch = "x86_64"))]
    None
}

/// Selects the kernel for bf16 matrix products in this process, by name.
///
/// # Errors
/// If there is no kernel of that name, or this CPU lacks its instructions.
pub fn choose_bf16_kernel(name: &str) -> Result<(), String> {
    #[cfg(target_arch = "x86_64")]
    {
        name.parse::<finetune_kernels::Kernel>()?.choose()
    }
    #[cfg(not(target_arch = "x86_64"))]
    Err(format!("the kernel {name:?} needs an x86-64 CPU"))
}

/// Writes `x / rms(x) · weight` over the last axis.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
    profile::time("rms norm", || on(x).rms_norm(x, weight, eps))
}

/// Returns the gradient of `x` plus `residual`, in the memory of `dy`; adds the gradient of the
/// weight to `weight_grad`, fp32, if it is given.
pub fn rms_norm_backward(
    x: &Tensor,
    weight: &Tensor,
    eps: f64,
    dy: Tensor,
    residual: Option<&Tensor>,
    weight_grad: Option<&Tensor>,
) -> Tensor {
    profile::time("rms norm, backward", || {
        on(x).rms_norm_backward(x, weight, eps, dy, residual, weight_grad)
    })
}

/// Returns `silu(gate) ∘ up`.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Tensor {
    profile::time("swiglu", || on(gate).swiglu(gate, up))
}

/// Recomputes the product and returns it with the gradients of `gate` and `up`, each in the memory
/// of an argument.
pub fn swiglu_backward(d_product: Tensor, gate: Tensor, up: Tensor) -> (Tensor, Tensor, Tensor) {
    profile::time("swiglu, backward", || on(&gate).swiglu_backward(d_product, gate, up))
}

/// Rotates `[T, heads, E]` in place by angles whose `cos` and `sin` are `[T, 1, E/2]`.
///
/// `direction` is 1, or −1 for the backward pass.
pub fn rotate(x: Tensor, cos: &Tensor, sin: &Tensor, direction: f64) -> Tensor {
    profile::time("rope", || on(&x).rotate(x, cos, sin, direction))
}

/// Replaces logits `[N, V]` by the gradient of the summed cross-entropy, and returns that sum.
pub fn cross_entropy_backward(logits: Tensor, labels: &Tensor) -> (f64, Tensor) {
    profile::time("cross-entropy", || on(&logits).cross_entropy_backward(logits, labels))
}

/// Returns the summed cross-entropy of logits `[N, V]`.
pub fn cross_entropy(logits: &Tensor, labels: &Tensor) -> f64 {
    on(logits).cross_entropy(logits, labels)
}

/// Returns `x` with a dropout mask applied.
pub fn dropout(x: &Tensor, mask: DropoutMask) -> Tensor {
    profile::time("dropout", || on(x).dropout(x, mask))
}

/// Adds `grad ∘ mask` to `sum`, with the mask of [`dropout`].
pub fn add_masked(sum: &mut Tensor, grad: &Tensor, mask: DropoutMask) {
    profile::time("dropout, backward", || on(sum).add_masked(sum, grad, mask));
}

/// Adds `more`, of any float type, to `sum`, fp32.
pub fn accumulate(sum: &Tensor, more: &Tensor) {
    profile::time("accumulate", || on(sum).accumulate(sum, more));
}

/// The right operand of a product.
#[derive(Debug, Clone, Copy)]
pub enum Factor<'a> {
    /// `[K, N]`.
    Plain(&'a Tensor),
    /// `[N, K]`, to be transposed.
    Transposed(&'a Tensor),
}

impl Factor<'_> {
    fn tensor(&self) -> &Tensor {
        match self {
            Self::Plain(factor) | Self::Transposed(factor) => factor,
        }
    }
}

/// Returns the sum of one or more products and a bias: a linear layer with its adapter, or the
/// input gradient of several layers.
///
/// # Shapes
/// The terms are `[T, K] · [K, N]`, where `K` may differ; the bias is `[N]`, the result `[T, N]`.
pub fn products(terms: &[(&Tensor, Factor<'_>)], bias: Option<&Tensor>) -> Tensor {
    on(terms[0].0).products(terms, bias)
}

/// Writes the low-rank product `scale · left · factor` to `to`.
///
/// # Shapes
/// `left` is `[T, K]`, `to` is `[T, N]`, where `K` or `N` is a LoRA rank; both may be column slices
/// of a wider tensor.
pub fn multiply(left: &Tensor, factor: Factor<'_>, scale: f64, to: &mut Tensor) {
    profile::time("lora", || on(left).multiply(left, factor, scale, to));
}

/// Adds the low-rank product `left · factor` to `to`; shapes as in [`multiply`].
pub fn add_product(left: &Tensor, factor: Factor<'_>, to: &mut Tensor) {
    on(left).add_product(left, factor, to);
}

/// Adds `leftᵀ · right` to a weight gradient, fp32.
///
/// # Shapes
/// `left` is `[T, M]`, `right` is `[T, N]`, `grad` is `[M, N]`.
pub fn add_outer(left: &Tensor, right: &Tensor, grad: &Tensor) {
    on(left).outer(left, right, grad, true);
}

/// Overwrites a weight gradient with `leftᵀ · right`; shapes as in [`add_outer`].
pub fn write_outer(left: &Tensor, right: &Tensor, grad: &Tensor) {
    on(left).outer(left, right, grad, false);
}

/// Updates masters and moments, `[master, exp_avg, exp_avg_sq]` in fp32, and copies the masters to
/// `compute`, which may be the masters themselves. All are flat and of the same length.
pub fn adamw(step: AdamWStep, grad: &Tensor, state: [Tensor; 3], compute: Tensor) {
    profile::time("adamw", || on(grad).adamw(step, grad, state, compute));
}

/// As [`adamw`], with moments that are quantized to 8 bits; `key` seeds their stochastic rounding.
pub fn adamw_8bit(
    step: AdamWStep,
    key: u64,
    grad: &Tensor,
    master: Tensor,
    moments: [&QuantizedState; 2],
    compute: Tensor,
) {
    profile::time("adamw", || {
        on(grad).adamw_8bit(step, key, grad, master, moments, compute);
    });
}

/// Returns the sum of the squares of an fp32 tensor.
pub fn sum_of_squares(values: &Tensor) -> f64 {
    profile::time("gradient norm", || on(values).sum_of_squares(values))
}

/// Which keys a query attends to: causal, inside its segment and window.
#[derive(Debug, Clone, Copy)]
pub struct AttentionMask<'a> {
    /// Runs of segments of equal length, in order, without gaps.
    pub runs: &'a [SegmentRun],
    /// How many positions back a query attends, itself included; `None` means all.
    pub window: Option<usize>,
}

/// Computes causal attention inside each segment: the result, and the logarithms of the softmax
/// denominators in the kernel's own layout.
///
/// # Shapes
/// `inputs` are `q`, `[T, H, E]`, and `k` and `v`, `[T, K, E]`; the result is `[T, H, E]`.
pub fn attention(inputs: [&Tensor; 3], mask: AttentionMask<'_>) -> (Tensor, Vec<Tensor>) {
    profile::time("attention", || on(inputs[0]).attention(inputs, mask))
}

/// Returns the gradients of `q`, `k` and `v`.
///
/// # Shapes
/// Those of the inputs; `d_out` is `[T, H, E]`.
pub fn attention_backward(
    inputs: [&Tensor; 3],
    out: &Tensor,
    logsumexp: &[Tensor],
    d_out: &Tensor,
    mask: AttentionMask<'_>,
) -> [Tensor; 3] {
    profile::time("attention, backward", || {
        on(inputs[0]).attention_backward(inputs, out, logsumexp, d_out, mask)
    })
}

/// Returns the backend that computes on the device of a tensor.
fn on(x: &Tensor) -> &'static dyn Backend {
    backend_of(x.device())
}
