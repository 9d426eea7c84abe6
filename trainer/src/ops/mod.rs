//! The operators a step is made of.
//!
//! Each exists twice: as one pass of our own on CPU tensors (`cpu`), and as a chain of libtorch's
//! operators (`aten`), which is what other devices run and what tests compare the former with.
//! Attention exists more often: `cpu::attention` and `aten` on CPUs, `aten::flash` and `aten::scores` elsewhere.

pub mod aten;
mod cpu;
mod quantized;
mod runs;

use finetune_kernels::dropout::Noise;
use tch::{Device, Kind, Tensor};

pub use finetune_kernels::adamw::Step;

use crate::runtime::profile;

pub use quantized::Codes;
pub use runs::Run;

/// Returns to how many positions a micro-batch is best filled up: to whole blocks of rows, or where
/// oneDNN multiplies to a multiple of 64.
///
/// It compiles and keeps kernels by shape. Micro-batches without padding have ever other numbers of
/// positions, so every step added some 20 MB to what it keeps (`docs/log/2026-11.md`).
pub fn whole_positions(positions: usize, kind: Kind, device: Device) -> usize {
    #[cfg(target_arch = "x86_64")]
    if device == Device::Cpu && cpu::matmul::is_ours(kind) {
        return positions.next_multiple_of(8);
    }
    positions.next_multiple_of(64)
}

/// Returns the name of the kernel that multiplies bf16 on this processor, if it is one of ours.
pub fn bf16_kernel() -> Option<&'static str> {
    #[cfg(target_arch = "x86_64")]
    {
        <half::bf16 as finetune_kernels::Multiplied>::kernel().map(finetune_kernels::Kernel::name)
    }
    #[cfg(not(target_arch = "x86_64"))]
    None
}

/// Makes a kernel multiply bf16 in this process, by its name.
///
/// # Errors
/// If there is no such kernel, this processor lacks its instructions, or another has multiplied before.
pub fn choose_bf16_kernel(name: &str) -> Result<(), String> {
    #[cfg(target_arch = "x86_64")]
    {
        name.parse::<finetune_kernels::Kernel>()?.choose()
    }
    #[cfg(not(target_arch = "x86_64"))]
    Err(format!("{name:?} is for other processors"))
}

/// Writes `x / rms(x) · weight` over the last axis.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
    profile::time("rms norm", || {
        if is_ours(x) { cpu::rms_norm(x, weight, eps) } else { aten::rms_norm(x, weight, eps) }
    })
}

/// Returns the gradient of `x` in the memory of `dy`, with `residual` added.
///
/// Adds the weight's gradient to `weight_grad`, fp32, where there is one.
pub fn rms_norm_backward(
    x: &Tensor,
    weight: &Tensor,
    eps: f64,
    dy: Tensor,
    residual: Option<&Tensor>,
    weight_grad: Option<&Tensor>,
) -> Tensor {
    profile::time("rms norm, backward", || {
        let backward = if is_ours(x) { cpu::rms_norm_backward } else { aten::rms_norm_backward };
        backward(x, weight, eps, dy, residual, weight_grad)
    })
}

/// Returns `silu(gate) ∘ up`.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Tensor {
    profile::time("swiglu", || {
        if is_ours(gate) { cpu::swiglu(gate, up) } else { aten::swiglu(gate, up) }
    })
}

/// Returns the product once more and the gradients of `gate` and `up`, given that of the product,
/// each in the memory of an argument.
pub fn swiglu_backward(d_product: Tensor, gate: Tensor, up: Tensor) -> (Tensor, Tensor, Tensor) {
    profile::time("swiglu, backward", || {
        let backward = if is_ours(&gate) { cpu::swiglu_backward } else { aten::swiglu_backward };
        backward(d_product, gate, up)
    })
}

/// Rotates `[T, heads, E]` in place by angles whose `cos` and `sin` are `[T, 1, E/2]`.
///
/// `direction` is 1, or −1 to rotate a gradient back.
pub fn rotate(x: Tensor, cos: &Tensor, sin: &Tensor, direction: f64) -> Tensor {
    profile::time("rope", || {
        if is_ours(&x) {
            cpu::rotate(x, cos, sin, direction)
        } else {
            aten::rotate(&x, cos, sin, direction)
        }
    })
}

/// Replaces logits `[N, V]` by the gradient of the summed cross-entropy, and returns that sum.
pub fn cross_entropy_backward(logits: Tensor, labels: &Tensor) -> (f64, Tensor) {
    profile::time("cross-entropy", || {
        if is_ours(&logits) {
            cpu::cross_entropy_backward(logits, labels)
        } else {
            aten::cross_entropy_backward(&logits, labels)
        }
    })
}

/// Returns the summed cross-entropy of logits `[N, V]`.
pub fn cross_entropy(logits: &Tensor, labels: &Tensor) -> f64 {
    if is_ours(logits) {
        cpu::cross_entropy(logits, labels)
    } else {
        aten::cross_entropy(logits, labels)
    }
}

/// Returns `x ∘ mask`.
pub fn dropout(x: &Tensor, noise: Noise) -> Tensor {
    profile::time("dropout", || {
        if is_ours(x) { cpu::dropout(x, noise) } else { aten::dropout(x, noise) }
    })
}

/// Adds `grad ∘ mask` to `sum`, with the mask of [`dropout`].
pub fn add_masked(sum: &mut Tensor, grad: &Tensor, noise: Noise) {
    profile::time("dropout, backward", || {
        let add = if is_ours(sum) { cpu::add_masked } else { aten::add_masked };
        add(sum, grad, noise);
    });
}

/// Adds `more`, of any float type, to `sum` in fp32.
pub fn accumulate(sum: &Tensor, more: &Tensor) {
    profile::time("accumulate", || {
        let add = if is_ours(sum) { cpu::accumulate } else { aten::accumulate };
        add(sum, more);
    });
}

/// The right side of a product.
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

/// Returns the sum of some products, one at least, and a bias: a linear layer with its adapter, or the
/// gradient of the input of several.
///
/// # Shapes
/// Each is of `[T, K]` and `[K, N]`, the bias is `[N]`.
pub fn products(terms: &[(&Tensor, Factor<'_>)], bias: Option<&Tensor>) -> Tensor {
    #[cfg(target_arch = "x86_64")]
    if terms.iter().all(|(left, factor)| cpu::matmul::can(left, factor.tensor())) {
        return cpu::matmul::products(terms, bias);
    }
    let [(left, factor), rest @ ..] = terms else { unreachable!("there is one at least") };
    let mut sum = aten::product(left, *factor, bias);
    for (left, factor) in rest {
        add_product(left, *factor, &mut sum);
    }
    sum
}

/// Writes `scale · left · factor` to `to`, where `K` or `N` is low.
///
/// # Shapes
/// `left` is `[T, K]`, `to` is `[T, N]`; both may be some columns of a wider tensor.
pub fn multiply(left: &Tensor, factor: Factor<'_>, scale: f64, to: &mut Tensor) {
    profile::time("adapter", || {
        #[cfg(target_arch = "x86_64")]
        if cpu::low_rank::can_multiply(left, factor, to) {
            return cpu::low_rank::multiply(left, factor, scale, to, false);
        }
        aten::multiply(left, factor, scale, to);
    });
}

/// Adds `left · factor` to `to`, where `K` or `N` is low; shapes as in [`multiply`].
pub fn add_product(left: &Tensor, factor: Factor<'_>, to: &mut Tensor) {
    #[cfg(target_arch = "x86_64")]
    if cpu::low_rank::can_multiply(left, factor, to) {
        return cpu::low_rank::multiply(left, factor, 1.0, to, true);
    }
    aten::add_product(left, factor, to);
}

/// Adds `leftᵀ · right` to a gradient in fp32.
///
/// # Shapes
/// `left` is `[T, M]`, `right` is `[T, N]`, `grad` is `[M, N]`.
pub fn add_outer(left: &Tensor, right: &Tensor, grad: &Tensor) {
    outer(left, right, grad, true);
}

/// Writes `leftᵀ · right` to a gradient of which nothing was computed yet; shapes as in
/// [`add_outer`].
pub fn write_outer(left: &Tensor, right: &Tensor, grad: &Tensor) {
    outer(left, right, grad, false);
}

fn outer(left: &Tensor, right: &Tensor, grad: &Tensor, is_added: bool) {
    let begin = || {
        if !is_added {
            let _ = grad.shallow_clone().zero_();
        }
    };
    #[cfg(target_arch = "x86_64")]
    if cpu::low_rank::can_add_outer(left, right, grad) {
        begin();
        return profile::time("adapter", || cpu::low_rank::add_outer(left, right, grad));
    }
    profile::time("weight gradient", || {
        #[cfg(target_arch = "x86_64")]
        if cpu::matmul::can_outer(left, right, grad) {
            return cpu::matmul::outer(left, right, grad, is_added);
        }
        begin();
        aten::add_outer(left, right, grad);
    });
}

/// Updates masters and moments, `[master, exp_avg, exp_avg_sq]` in fp32, and copies the masters to
/// what is computed with, which may be the masters themselves. All are flat and of one length.
pub fn adamw(step: Step, grad: &Tensor, state: [Tensor; 3], compute: Tensor) {
    profile::time("adamw", || {
        let update = if is_ours(grad) { cpu::adamw } else { aten::adamw };
        update(step, grad, state, compute);
    });
}

/// As [`adamw`], with moments of a byte each; `key` decides how they are rounded.
pub fn adamw_8bit(
    step: Step,
    key: u64,
    grad: &Tensor,
    master: Tensor,
    moments: [&Codes; 2],
    compute: Tensor,
) {
    profile::time("adamw", || {
        let update = if is_ours(grad) { cpu::adamw_8bit } else { aten::adamw_8bit };
        update(step, key, grad, master, moments, compute);
    });
}

/// Sums the squares of an fp32 tensor.
pub fn sum_of_squares(values: &Tensor) -> f64 {
    profile::time("gradient norm", || {
        if is_ours(values) { cpu::sum_of_squares(values) } else { aten::sum_of_squares(values) }
    })
}

/// Segments of a flat micro-batch, with what attention needs to know of the heads.
#[derive(Debug, Clone, Copy)]
pub struct Attention<'a> {
    /// Runs of segments of equal length, in order, without gaps.
    pub runs: &'a [Run],
    /// How many positions back a query may look, itself included; `None` means all.
    pub window: Option<usize>,
}

/// Computes causal attention inside each segment: the result, and the logarithms of its
/// denominators in a form of its own.
///
/// # Shapes
/// `q` and the result are `[T, H, E]`, `k` and `v` are `[T, K, E]`.
pub fn attention([q, k, v]: [&Tensor; 3], how: Attention<'_>) -> (Tensor, Vec<Tensor>) {
    profile::time("attention", || {
        #[cfg(target_arch = "x86_64")]
        if cpu::attention::can(q) {
            return cpu::attention::attention([q, k, v], how);
        }
        match (is_ours(q), aten::flash::can(q)) {
            (true, _) => aten::attention([q, k, v], how),
            (false, true) => aten::flash::attention([q, k, v], how),
            (false, false) => aten::scores::attention([q, k, v], how),
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
    how: Attention<'_>,
) -> [Tensor; 3] {
    profile::time("attention, backward", || {
        #[cfg(target_arch = "x86_64")]
        if cpu::attention::can(inputs[0]) {
            return cpu::attention::attention_backward(inputs, out, logsumexp, d_out, how);
        }
        let backward = match (is_ours(inputs[0]), aten::flash::can(inputs[0])) {
            (true, _) => aten::attention_backward,
            (false, true) => aten::flash::attention_backward,
            (false, false) => aten::scores::attention_backward,
        };
        backward(inputs, out, logsumexp, d_out, how)
    })
}

fn is_ours(x: &Tensor) -> bool {
    x.device() == Device::Cpu
}
