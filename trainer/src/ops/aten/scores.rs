//! Attention that computes all scores of a run of segments at once, in fp32: for devices without a
//! fused operator.

use tch::{Kind, Tensor};

use crate::ops::{AttentionMask, segment_runs};

/// As [`crate::ops::attention`].
pub fn attention(inputs: [&Tensor; 3], mask: AttentionMask<'_>) -> (Tensor, Vec<Tensor>) {
    segment_runs::forward(inputs, mask, |inputs| {
        let [q, k, v] = inputs.map(fp32);
        let scores = scores(&q, &k, mask.window);
        let logsumexp = scores.logsumexp([-1], true); // [S, H, t, 1]
        ((scores - &logsumexp).exp().matmul(&v), logsumexp)
    })
}

/// As [`crate::ops::attention_backward`].
///
/// With `P` the probabilities: `dV = Pᵀ dO`, `dS = P ∘ (dO Vᵀ − rowsum(dO ∘ O))`, `dQ = dS K` and
/// `dK = dSᵀ Q`, the last two times the scale of the scores.
pub fn attention_backward(
    inputs: [&Tensor; 3],
    out: &Tensor,
    logsumexp: &[Tensor],
    d_out: &Tensor,
    mask: AttentionMask<'_>,
) -> [Tensor; 3] {
    segment_runs::backward(inputs, [out, d_out], logsumexp, mask, |inputs, result, logsumexp| {
        let [q, k, v] = inputs.map(fp32);
        let [out, d_out] = result.map(fp32);
        let probabilities = (scores(&q, &k, mask.window) - logsumexp).exp(); // [S, H, t, t]
        let dv = probabilities.transpose(-2, -1).matmul(&d_out);
        let mean = (&d_out * out).sum_dim_intlist(-1, true, Kind::Float); // [S, H, t, 1]
        let d_scores = probabilities * (d_out.matmul(&v.transpose(-2, -1)) - mean) * scale(&q);
        [d_scores.matmul(&k), d_scores.transpose(-2, -1).matmul(&q), dv]
    })
}

fn fp32(tensor: Tensor) -> Tensor {
    tensor.to_kind(Kind::Float)
}

/// Returns `q kᵀ / √E`, `[S, H, t, t]`, with −∞ where a query does not attend.
fn scores(q: &Tensor, k: &Tensor, window: Option<usize>) -> Tensor {
    let length = q.size()[2];
    let causal = Tensor::ones([length, length], (Kind::Bool, q.device())).tril(0);
    let visible = window.map_or(causal.shallow_clone(), |window| causal.triu(1 - window as i64));
    let scores = q.matmul(&k.transpose(-2, -1)) * scale(q);
    scores.masked_fill(&visible.logical_not(), f64::NEG_INFINITY)
}

fn scale(q: &Tensor) -> f64 {
    (q.size()[3] as f64).sqrt().recip()
}
