//! The operators composed of libtorch's own: for every device, and as the reference of our kernels.

pub(super) mod flash;
pub mod scores;

use finetune_kernels::{
    adamw::AdamWStep,
    dropout::{DropoutMask, GOLDEN_GAMMA},
};
use tch::{Device, Kind, Tensor};

use crate::ops::{AttentionMask, Factor, QuantizedState, segment_runs};

/// Elements of a flat tensor in one chunk, so that temporaries stay small beside it.
const CHUNK_ELEMENTS: usize = 1 << 22;

/// Divides a flat tensor into chunks: the first element and the length of each.
pub(super) fn chunks(length: i64) -> impl Iterator<Item = (i64, i64)> {
    let starts = (0..length).step_by(CHUNK_ELEMENTS);
    starts.map(move |start| (start, (CHUNK_ELEMENTS as i64).min(length - start)))
}

/// As [`crate::ops::rms_norm`].
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
    let (x_hat, _) = normalized(x, eps);
    x_hat.to_kind(x.kind()) * weight
}

/// As [`crate::ops::rms_norm_backward`].
///
/// With `x̂ = x / rms(x)` and `g = dy ∘ weight`: `dx = (g − x̂ · mean(g ∘ x̂)) / rms(x)`.
pub fn rms_norm_backward(
    x: &Tensor,
    weight: &Tensor,
    eps: f64,
    dy: Tensor,
    residual: Option<&Tensor>,
    weight_grad: Option<&Tensor>,
) -> Tensor {
    let (x_hat, rstd) = normalized(x, eps);
    let dy = dy.to_kind(Kind::Float);
    if let Some(grad) = weight_grad {
        let row_grads = (&dy * &x_hat).view([-1, grad.size()[0]]);
        accumulate(grad, &row_grads.sum_dim_intlist(0, false, Kind::Float));
    }
    let g = dy * weight.to_kind(Kind::Float);
    let mean = (&g * &x_hat).mean_dim(-1, true, Kind::Float);
    let dx = (g - x_hat * mean) * rstd;
    match residual {
        None => dx.to_kind(x.kind()),
        Some(residual) => (dx + residual).to_kind(x.kind()),
    }
}

/// Returns `x / rms(x)` and `1 / rms(x)`, in fp32.
fn normalized(x: &Tensor, eps: f64) -> (Tensor, Tensor) {
    let x = x.to_kind(Kind::Float);
    let rstd = (x.square().mean_dim(-1, true, Kind::Float) + eps).rsqrt();
    (x * &rstd, rstd)
}

/// As [`crate::ops::swiglu`].
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Tensor {
    gate.silu() * up
}

/// As [`crate::ops::swiglu_backward`].
pub fn swiglu_backward(d_product: Tensor, gate: Tensor, up: Tensor) -> (Tensor, Tensor, Tensor) {
    let silu = gate.silu();
    let (product, d_up) = (&silu * &up, &d_product * silu);
    (product, gate.silu_backward(&(d_product * up)), d_up)
}

/// As [`crate::ops::rotate`], but not in place.
pub fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor, direction: f64) -> Tensor {
    let half = x.size()[2] / 2;
    let (x1, x2) = (x.narrow(2, 0, half), x.narrow(2, half, half));
    let sin = sin * direction;
    Tensor::cat(&[&x1 * cos - &x2 * &sin, &x2 * cos + &x1 * &sin], 2)
}

/// As [`crate::ops::cross_entropy_backward`].
pub fn cross_entropy_backward(logits: &Tensor, labels: &Tensor) -> (f64, Tensor) {
    let mut probabilities = logits.to_kind(Kind::Float);
    let loss = sum_of_losses(&mut probabilities, labels);
    let ones = Tensor::full([labels.size()[0], 1], -1.0, (Kind::Float, labels.device()));
    let _ = probabilities.scatter_add_(1, &labels.unsqueeze(1), &ones);
    (loss, probabilities.to_kind(logits.kind()))
}

/// As [`crate::ops::cross_entropy`].
pub fn cross_entropy(logits: &Tensor, labels: &Tensor) -> f64 {
    sum_of_losses(&mut logits.to_dtype(Kind::Float, false, true), labels)
}

/// Turns fp32 logits into probabilities, in place, and returns the sum of `−log p[label]`.
fn sum_of_losses(logits: &mut Tensor, labels: &Tensor) -> f64 {
    let _ = logits.g_sub_(&logits.amax([1], true));
    let label_logits = logits.gather(1, &labels.unsqueeze(1), false); // [C, 1]
    let _ = logits.exp_();
    let denominator = logits.sum_dim_intlist(1, true, Kind::Float); // [C, 1]
    let _ = logits.g_div_(&denominator);
    (denominator.log() - label_logits).sum(Kind::Double).double_value(&[])
}

/// As [`crate::ops::dropout`].
pub fn dropout(x: &Tensor, mask: DropoutMask) -> Tensor {
    x * mask_values(x, mask)
}

/// As [`crate::ops::add_masked`].
pub fn add_masked(sum: &mut Tensor, grad: &Tensor, mask: DropoutMask) {
    let _ = sum.addcmul_(grad, &mask_values(grad, mask));
}

/// Returns the factors of [`finetune_kernels::dropout`] in the shape of `like`: libtorch's integers
/// wrap around as Rust's `wrapping_mul` does.
fn mask_values(like: &Tensor, mask: DropoutMask) -> Tensor {
    let draws = draws(mask.key, like.numel() as i64, like.device());
    let is_kept = draws.ge(i64::from(mask.threshold)).to_kind(like.kind());
    let values = is_kept * f64::from(mask.keep_scale());
    values.view(like.size().as_slice())
}

/// Returns `count` random numbers of 16 bits, as [`finetune_kernels::dropout`] draws them.
fn draws(key: u64, count: i64, device: Device) -> Tensor {
    let on = (Kind::Int64, device);
    let groups = Tensor::arange((count + 3) / 4, on);
    let draws = mix(groups * GOLDEN_GAMMA.cast_signed() + key.cast_signed());
    let lanes = Tensor::arange(4, on) * 16;
    let draws = draws.unsqueeze(1).bitwise_right_shift(&lanes).bitwise_and(0xFFFF);
    draws.view(-1).narrow(0, 0, count)
}

/// As [`finetune_kernels::dropout::mix`], of each element.
fn mix(bits: Tensor) -> Tensor {
    let fold = |bits: Tensor, by: i64| {
        let shifted =
            bits.bitwise_right_shift_tensor_scalar(by).bitwise_and((1_i64 << (64 - by)) - 1);
        bits.bitwise_xor_tensor(&shifted)
    };
    let bits = fold(bits, 30) * 0xBF58_476D_1CE4_E5B9_u64.cast_signed();
    let bits = fold(bits, 27) * 0x94D0_49BB_1331_11EB_u64.cast_signed();
    fold(bits, 31)
}

/// As [`crate::ops::sum_of_squares`].
pub fn sum_of_squares(values: &Tensor) -> f64 {
    let parts = values.split(CHUNK_ELEMENTS as i64, 0).into_iter();
    let squares = parts.map(|part| part.square().sum(Kind::Double));
    squares.reduce(|one, other| one + other).map_or(0.0, |sum| sum.double_value(&[]))
}

/// As [`crate::ops::accumulate`].
pub fn accumulate(sum: &Tensor, more: &Tensor) {
    let _ = sum.shallow_clone().g_add_(more);
}

/// Returns `left · factor` plus a bias.
pub fn product(left: &Tensor, factor: Factor<'_>, bias: Option<&Tensor>) -> Tensor {
    match bias {
        Some(bias) => bias.addmm(left, &as_right_operand(factor)),
        None => left.mm(&as_right_operand(factor)),
    }
}

/// As [`crate::ops::products`]; `add_product` adds each term but the first.
pub(super) fn products(
    terms: &[(&Tensor, Factor<'_>)],
    bias: Option<&Tensor>,
    add_product: impl Fn(&Tensor, Factor<'_>, &mut Tensor),
) -> Tensor {
    let [(left, factor), rest @ ..] = terms else { unreachable!("there is at least one term") };
    let mut sum = product(left, *factor, bias);
    for (left, factor) in rest {
        add_product(left, *factor, &mut sum);
    }
    sum
}

/// As [`crate::ops::multiply`].
pub fn multiply(left: &Tensor, factor: Factor<'_>, scale: f64, to: &mut Tensor) {
    to.copy_(&(left.mm(&as_right_operand(factor)) * scale));
}

/// As [`crate::ops::add_product`].
pub fn add_product(left: &Tensor, factor: Factor<'_>, to: &mut Tensor) {
    let _ = to.addmm_(left, &as_right_operand(factor));
}

fn as_right_operand(factor: Factor<'_>) -> Tensor {
    match factor {
        Factor::Plain(factor) => factor.shallow_clone(),
        Factor::Transposed(factor) => factor.tr(),
    }
}

/// As [`crate::ops::add_outer`].
pub fn add_outer(left: &Tensor, right: &Tensor, grad: &Tensor) {
    if left.kind() == Kind::Float {
        let _ = grad.shallow_clone().addmm_(&left.tr(), right);
    } else {
        crate::ops::accumulate(grad, &left.tr().mm(right));
    }
}

/// As [`crate::ops::adamw`].
pub fn adamw(step: AdamWStep, grad: &Tensor, state: [Tensor; 3], compute: Tensor) {
    for (start, count) in chunks(grad.numel() as i64) {
        let part = |flat: &Tensor| flat.narrow(0, start, count);
        adamw_chunk(step, &part(grad), state.each_ref().map(part), part(&compute));
    }
}

/// As [`crate::ops::adamw_8bit`].
pub fn adamw_8bit(
    step: AdamWStep,
    key: u64,
    grad: &Tensor,
    master: Tensor,
    [exp_avg, exp_avg_sq]: [&QuantizedState; 2],
    compute: Tensor,
) {
    for (start, count) in chunks(grad.numel() as i64) {
        let part = |flat: &Tensor| flat.narrow(0, start, count);
        let moments = [exp_avg, exp_avg_sq].map(|state| state.dequantize(start, count));
        let [first, second] = moments.each_ref().map(Tensor::shallow_clone);
        adamw_chunk(step, &part(grad), [part(&master), first, second], part(&compute));
        let key = key.wrapping_add((start as u64 / 4).wrapping_mul(GOLDEN_GAMMA));
        let uniform = draws(key, count, grad.device()).to_kind(Kind::Float) * (1.0 / 65536.0);
        for (state, values) in [exp_avg, exp_avg_sq].into_iter().zip(moments) {
            state.quantize_blocks(start, &values, Some(&uniform));
        }
    }
}

fn adamw_chunk(
    step: AdamWStep,
    grad: &Tensor,
    [mut master, mut exp_avg, mut exp_avg_sq]: [Tensor; 3],
    mut compute: Tensor,
) {
    let grad = grad * f64::from(step.grad_scale);
    let _ = master.g_mul_scalar_(f64::from(step.weight_decay_factor));
    let _ = exp_avg.lerp_(&grad, 1.0 - f64::from(step.beta1));
    let _ = exp_avg_sq.g_mul_scalar_(f64::from(step.beta2));
    let _ = exp_avg_sq.addcmul_(&grad, &(&grad * (1.0 - f64::from(step.beta2))));
    let denominator =
        exp_avg_sq.sqrt() / f64::from(step.bias_correction2_sqrt) + f64::from(step.epsilon);
    let _ = master.addcdiv_(&exp_avg, &(denominator * (-1.0 / f64::from(step.step_size))));
    if compute.data_ptr() != master.data_ptr() {
        compute.copy_(&master);
    }
}

/// As [`crate::ops::attention`], on CPUs.
pub fn attention(inputs: [&Tensor; 3], mask: AttentionMask<'_>) -> (Tensor, Vec<Tensor>) {
    segment_runs::forward(inputs, mask, |[q, k, v]| {
        let attn_mask = window_mask(mask.window, &q);
        Tensor::internal_scaled_dot_product_flash_attention_for_cpu(
            &q,
            &k,
            &v,
            0.0,
            attn_mask.is_none(),
            attn_mask.as_ref(),
            None,
        )
    })
}

/// As [`crate::ops::attention_backward`], on CPUs.
pub fn attention_backward(
    inputs: [&Tensor; 3],
    out: &Tensor,
    logsumexp: &[Tensor],
    d_out: &Tensor,
    mask: AttentionMask<'_>,
) -> [Tensor; 3] {
    segment_runs::backward(
        inputs,
        [out, d_out],
        logsumexp,
        mask,
        |[q, k, v], [out, d_out], logsumexp| {
            let attn_mask = window_mask(mask.window, &q);
            Tensor::internal_scaled_dot_product_flash_attention_for_cpu_backward(
                &d_out,
                &q,
                &k,
                &v,
                &out,
                logsumexp,
                0.0,
                attn_mask.is_none(),
                attn_mask.as_ref(),
                None,
            )
            .into()
        },
    )
}

/// Returns the additive mask of the scores, `[t, t]`, if the window is shorter than the segment.
fn window_mask(window: Option<usize>, like: &Tensor) -> Option<Tensor> {
    let (window, length) = (window? as i64, like.size()[2]);
    if window >= length {
        return None;
    }
    let visible =
        Tensor::ones([length, length], (Kind::Bool, like.device())).tril(0).triu(1 - window);
    let mask = Tensor::zeros([length, length], (like.kind(), like.device()));
    Some(mask.masked_fill(&visible.logical_not(), f64::NEG_INFINITY))
}
