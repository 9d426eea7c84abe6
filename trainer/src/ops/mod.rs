//! The operators of a training step, dispatched by device.
//!
//! Each has two implementations: a fused kernel of our own for CPU tensors (`cpu`), and a
//! composition of libtorch's operators (`aten`), which other devices run and which is the reference
//! in tests. Attention has four: `cpu::attention` and `aten` on CPUs, `aten::flash` and
//! `aten::scores` elsewhere.

pub mod aten;
mod cpu;
mod quantized;
mod segment_runs;

use finetune_kernels::dropout::DropoutMask;
use tch::{Device, Kind, Tensor};

pub use finetune_kernels::adamw::AdamWStep;

use crate::runtime::profile;

pub use quantized::QuantizedState;
pub use segment_runs::SegmentRun;

/// Returns the number of tokens to which a micro-batch is padded: a multiple of 8 for our own
/// kernels, and of 64 for oneDNN.
///
/// oneDNN compiles a kernel for each shape and caches it. Micro-batches without padding have a
/// different number of tokens in every step, each of which added about 20 MB to that cache
/// (`docs/log/2026-11.md`).
pub fn padded_tokens(tokens: usize, kind: Kind, device: Device) -> usize {
    #[cfg(target_arch = "x86_64")]
    if device == Device::Cpu && cpu::matmul::has_kernel(kind) {
        return tokens.next_multiple_of(8);
    }
    tokens.next_multiple_of(64)
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
    profile::time("rms norm", || {
        if is_cpu(x) { cpu::rms_norm(x, weight, eps) } else { aten::rms_norm(x, weight, eps) }
    })
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
        let backward = if is_cpu(x) { cpu::rms_norm_backward } else { aten::rms_norm_backward };
        backward(x, weight, eps, dy, residual, weight_grad)
    })
}

/// Returns `silu(gate) ∘ up`.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Tensor {
    profile::time("swiglu", || {
        if is_cpu(gate) { cpu::swiglu(gate, up) } else { aten::swiglu(gate, up) }
    })
}

/// Recomputes the product and returns it with the gradients of `gate` and `up`, each in the memory
/// of an argument.
pub fn swiglu_backward(d_product: Tensor, gate: Tensor, up: Tensor) -> (Tensor, Tensor, Tensor) {
    profile::time("swiglu, backward", || {
        let backward = if is_cpu(&gate) { cpu::swiglu_backward } else { aten::swiglu_backward };
        backward(d_product, gate, up)
    })
}

/// Rotates `[T, heads, E]` in place by angles whose `cos` and `sin` are `[T, 1, E/2]`.
///
/// `direction` is 1, or −1 for the backward pass.
pub fn rotate(x: Tensor, cos: &Tensor, sin: &Tensor, direction: f64) -> Tensor {
    profile::time("rope", || {
        if is_cpu(&x) {
            cpu::rotate(x, cos, sin, direction)
        } else {
            aten::rotate(&x, cos, sin, direction)
        }
    })
}

/// Replaces logits `[N, V]` by the gradient of the summed cross-entropy, and returns that sum.
pub fn cross_entropy_backward(logits: Tensor, labels: &Tensor) -> (f64, Tensor) {
    profile::time("cross-entropy", || {
        if is_cpu(&logits) {
            cpu::cross_entropy_backward(logits, labels)
        } else {
            aten::cross_entropy_backward(&logits, labels)
        }
    })
}

/// Returns the summed cross-entropy of logits `[N, V]`.
pub fn cross_entropy(logits: &Tensor, labels: &Tensor) -> f64 {
    if is_cpu(logits) {
        cpu::cross_entropy(logits, labels)
    } else {
        aten::cross_entropy(logits, labels)
    }
}

/// Returns `x` with a dropout mask applied.
pub fn dropout(x: &Tensor, mask: DropoutMask) -> Tensor {
    profile::time(
        "dropout",
        || {
            if is_cpu(x) { cpu::dropout(x, mask) } else { aten::dropout(x, mask) }
        },
    )
}

/// Adds `grad ∘ mask` to `sum`, with the mask of [`dropout`].
pub fn add_masked(sum: &mut Tensor, grad: &Tensor, mask: DropoutMask) {
    profile::time("dropout, backward", || {
        let add = if is_cpu(sum) { cpu::add_masked } else { aten::add_masked };
        add(sum, grad, mask);
    });
}

/// Adds `more`, of any float type, to `sum`, fp32.
pub fn accumulate(sum: &Tensor, more: &Tensor) {
    profile::time("accumulate", || {
        let add = if is_cpu(sum) { cpu::accumulate } else { aten::accumulate };
        add(sum, more);
    });
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
    #[cfg(target_arch = "x86_64")]
    if terms.iter().all(|(left, factor)| cpu::matmul::supports_product(left, factor.tensor())) {
        return cpu::matmul::products(terms, bias);
    }
    let [(left, factor), rest @ ..] = terms else { unreachable!("there is at least one term") };
    let mut sum = aten::product(left, *factor, bias);
    for (left, factor) in rest {
        add_product(left, *factor, &mut sum);
    }
    sum
}

/// Writes the low-rank product `scale · left · factor` to `to`.
///
/// # Shapes
/// `left` is `[T, K]`, `to` is `[T, N]`, where `K` or `N` is a LoRA rank; both may be column slices
/// of a wider tensor.
pub fn multiply(left: &Tensor, factor: Factor<'_>, scale: f64, to: &mut Tensor) {
    profile::time("lora", || {
        #[cfg(target_arch = "x86_64")]
        if cpu::low_rank::supports_multiply(left, factor, to) {
            return cpu::low_rank::multiply(left, factor, scale, to, false);
        }
        aten::multiply(left, factor, scale, to);
    });
}

/// Adds the low-rank product `left · factor` to `to`; shapes as in [`multiply`].
pub fn add_product(left: &Tensor, factor: Factor<'_>, to: &mut Tensor) {
    #[cfg(target_arch = "x86_64")]
    if cpu::low_rank::supports_multiply(left, factor, to) {
        return cpu::low_rank::multiply(left, factor, 1.0, to, true);
    }
    aten::add_product(left, factor, to);
}

/// Adds `leftᵀ · right` to a weight gradient, fp32.
///
/// # Shapes
/// `left` is `[T, M]`, `right` is `[T, N]`, `grad` is `[M, N]`.
pub fn add_outer(left: &Tensor, right: &Tensor, grad: &Tensor) {
    outer(left, right, grad, true);
}

/// Overwrites a weight gradient with `leftᵀ · right`; shapes as in [`add_outer`].
pub fn write_outer(left: &Tensor, right: &Tensor, grad: &Tensor) {
    outer(left, right, grad, false);
}

fn outer(left: &Tensor, right: &Tensor, grad: &Tensor, accumulate: bool) {
    let clear_unless_accumulating = || {
        if !accumulate {
            let _ = grad.shallow_clone().zero_();
        }
    };
    #[cfg(target_arch = "x86_64")]
    if cpu::low_rank::supports_outer(left, right, grad) {
        clear_unless_accumulating();
        return profile::time("lora", || cpu::low_rank::add_outer(left, right, grad));
    }
    profile::time("weight gradient", || {
        #[cfg(target_arch = "x86_64")]
        if cpu::matmul::supports_outer(left, right, grad) {
            return cpu::matmul::outer(left, right, grad, accumulate);
        }
        clear_unless_accumulating();
        aten::add_outer(left, right, grad);
    });
}

/// Updates masters and moments, `[master, exp_avg, exp_avg_sq]` in fp32, and copies the masters to
/// `compute`, which may be the masters themselves. All are flat and of the same length.
pub fn adamw(step: AdamWStep, grad: &Tensor, state: [Tensor; 3], compute: Tensor) {
    profile::time("adamw", || {
        let update = if is_cpu(grad) { cpu::adamw } else { aten::adamw };
        update(step, grad, state, compute);
    });
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
        let update = if is_cpu(grad) { cpu::adamw_8bit } else { aten::adamw_8bit };
        update(step, key, grad, master, moments, compute);
    });
}

/// Returns the sum of the squares of an fp32 tensor.
pub fn sum_of_squares(values: &Tensor) -> f64 {
    profile::time("gradient norm", || {
        if is_cpu(values) { cpu::sum_of_squares(values) } else { aten::sum_of_squares(values) }
    })
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
/// `q` and the result are `[T, H, E]`, `k` and `v` are `[T, K, E]`.
pub fn attention([q, k, v]: [&Tensor; 3], mask: AttentionMask<'_>) -> (Tensor, Vec<Tensor>) {
    profile::time("attention", || {
        #[cfg(target_arch = "x86_64")]
        if cpu::attention::is_supported(q) {
            return cpu::attention::attention([q, k, v], mask);
        }
        match (is_cpu(q), aten::flash::is_supported(q)) {
            (true, _) => aten::attention([q, k, v], mask),
            (false, true) => aten::flash::attention([q, k, v], mask),
            (false, false) => aten::scores::attention([q, k, v], mask),
        }
    })
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
        #[cfg(target_arch = "x86_64")]
        if cpu::attention::is_supported(inputs[0]) {
            return cpu::attention::attention_backward(inputs, out, logsumexp, d_out, mask);
        }
        let backward = match (is_cpu(inputs[0]), aten::flash::is_supported(inputs[0])) {
            (true, _) => aten::attention_backward,
            (false, true) => aten::flash::attention_backward,
            (false, false) => aten::scores::attention_backward,
        };
        backward(inputs, out, logsumexp, d_out, mask)
    })
}

fn is_cpu(x: &Tensor) -> bool {
    x.device() == Device::Cpu
}
