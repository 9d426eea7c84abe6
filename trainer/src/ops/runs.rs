//! Attention run by run: what libtorch computes of batches, of segments of equal length.

use tch::Tensor;

use crate::ops::Attention;

/// Some segments of equal length, one after another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// The first position.
    pub start: i64,
    /// How many segments.
    pub count: i64,
    /// Positions of each.
    pub length: i64,
}

/// Computes attention with what `attend` makes of a run's batches, each `[S, H, t, E]`: the result,
/// and the logarithms of its denominators.
pub(super) fn forward(
    [q, k, v]: [&Tensor; 3],
    how: Attention<'_>,
    attend: impl Fn([Tensor; 3]) -> (Tensor, Tensor),
) -> (Tensor, Vec<Tensor>) {
    let out = q.empty_like();
    let logsumexp = how
        .runs
        .iter()
        .map(|&run| {
            let (attended, logsumexp) = attend(batches([q, k, v], run));
            batch(&out, run).copy_(&attended);
            logsumexp
        })
        .collect();
    (out, logsumexp)
}

/// Computes the gradients of queries, keys and values with what `differentiate` makes of a run's
/// batches: those of [`forward`], of its result and that one's gradient, and its logarithms.
pub(super) fn backward(
    inputs: [&Tensor; 3],
    result: [&Tensor; 2],
    logsumexp: &[Tensor],
    how: Attention<'_>,
    differentiate: impl Fn([Tensor; 3], [Tensor; 2], &Tensor) -> [Tensor; 3],
) -> [Tensor; 3] {
    let grads = inputs.map(Tensor::empty_like);
    let groups = inputs[0].size()[1] / inputs[1].size()[1];
    for (&run, logsumexp) in how.runs.iter().zip(logsumexp) {
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
fn batches([q, k, v]: [&Tensor; 3], run: Run) -> [Tensor; 3] {
    let groups = q.size()[1] / k.size()[1];
    [batch(q, run), repeat(&batch(k, run), groups), repeat(&batch(v, run), groups)]
}

/// Views a run of `[T, heads, E]` as `[S, heads, t, E]`.
fn batch(x: &Tensor, Run { start, count, length }: Run) -> Tensor {
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
