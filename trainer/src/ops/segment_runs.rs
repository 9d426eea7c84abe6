//! Attention over runs of segments of equal length, which libtorch's batched operators can compute.

use tch::Tensor;

use crate::ops::AttentionMask;

/// Consecutive segments of equal length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentRun {
    /// The first token of the first segment.
    pub start: i64,
    /// The number of segments, `S`.
    pub count: i64,
    /// Tokens of each segment, `t`.
    pub length: i64,
}

/// Computes attention run by run: `attend` maps queries, keys and values `[S, H, t, E]` to the
/// result `[S, H, t, E]` and the logarithms of the softmax denominators.
pub(super) fn forward(
    [q, k, v]: [&Tensor; 3],
    mask: AttentionMask<'_>,
    attend: impl Fn([Tensor; 3]) -> (Tensor, Tensor),
) -> (Tensor, Vec<Tensor>) {
    let out = q.empty_like();
    let logsumexp = mask
        .runs
        .iter()
        .map(|&run| {
            let (run_out, logsumexp) = attend(batches([q, k, v], run));
            batch(&out, run).copy_(&run_out);
            logsumexp
        })
        .collect();
    (out, logsumexp)
}

/// Computes the gradients of queries, keys and values run by run: `differentiate` maps the inputs,
/// the result with its gradient, and the logarithms of [`forward`] to gradients `[S, H, t, E]`.
pub(super) fn backward(
    inputs: [&Tensor; 3],
    result: [&Tensor; 2],
    logsumexp: &[Tensor],
    mask: AttentionMask<'_>,
    differentiate: impl Fn([Tensor; 3], [Tensor; 2], &Tensor) -> [Tensor; 3],
) -> [Tensor; 3] {
    let grads = inputs.map(Tensor::empty_like);
    let groups = inputs[0].size()[1] / inputs[1].size()[1];
    for (&run, logsumexp) in mask.runs.iter().zip(logsumexp) {
        let result = result.map(|tensor| batch(tensor, run));
        let [dq, dk, dv] = differentiate(batches(inputs, run), result, logsumexp);
        batch(&grads[0], run).copy_(&dq);
        batch(&grads[1], run).copy_(&sum_groups(&dk, groups));
        batch(&grads[2], run).copy_(&sum_groups(&dv, groups));
    }
    grads
}

/// Views a run of queries, keys and values as batches `[S, H, t, E]`, each key/value head repeated
/// for its query heads.
fn batches([q, k, v]: [&Tensor; 3], run: SegmentRun) -> [Tensor; 3] {
    let groups = q.size()[1] / k.size()[1];
    [batch(q, run), repeat(&batch(k, run), groups), repeat(&batch(v, run), groups)]
}

/// Views a run of `[T, heads, E]` as `[S, heads, t, E]`.
fn batch(x: &Tensor, SegmentRun { start, count, length }: SegmentRun) -> Tensor {
    let (heads, width) = (x.size()[1], x.size()[2]);
    x.narrow(0, start, count * length).view([count, length, heads, width]).transpose(1, 2)
}

/// Repeats each key/value head for its query heads: `[S, K, t, E]` to `[S, H, t, E]`.
fn repeat(x: &Tensor, groups: i64) -> Tensor {
    if groups == 1 {
        return x.shallow_clone();
    }
    let [segments, heads, length, width] = sizes(x);
    x.unsqueeze(2).expand([segments, heads, groups, length, width], false).reshape([
        segments,
        heads * groups,
        length,
        width,
    ])
}

/// Sums the gradients of repeated heads: `[S, H, t, E]` to `[S, K, t, E]`.
fn sum_groups(grad: &Tensor, groups: i64) -> Tensor {
    if groups == 1 {
        return grad.shallow_clone();
    }
    let [segments, heads, length, width] = sizes(grad);
    grad.reshape([segments, heads / groups, groups, length, width]).sum_dim_intlist(
        2,
        false,
        grad.kind(),
    )
}

fn sizes(x: &Tensor) -> [i64; 4] {
    let size = x.size();
    [size[0], size[1], size[2], size[3]]
}
