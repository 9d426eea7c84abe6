//! Causal attention inside each segment of a flat micro-batch.
//!
//! Segments never see each other, so neighbours of equal length are computed as one batch and no
//! masked block between segments is ever touched.

use tch::{Kind, Tensor};

/// The segments of a micro-batch as runs of equal length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segments {
    /// (first position, segments, length of each).
    runs: Vec<(i64, i64, i64)>,
}

/// What attention leaves for its backward pass.
pub struct Attended {
    /// `[T, H, E]`.
    pub out: Tensor,
    /// For each run, the logarithm of the softmax's denominator.
    logsumexp: Vec<Tensor>,
}

/// The numbers attention needs beside its inputs.
#[derive(Debug, Clone, Copy)]
pub struct Attention {
    /// Query heads per key/value head.
    pub query_groups: i64,
    /// How many positions back a query may look; `None` means all.
    pub window: Option<usize>,
}

impl Segments {
    /// Groups segment lengths.
    pub fn new(lengths: &[usize]) -> Self {
        let mut runs: Vec<(i64, i64, i64)> = Vec::new();
        let mut start = 0;
        for &length in lengths {
            let length = length as i64;
            match runs.last_mut() {
                Some((_, count, last)) if *last == length => *count += 1,
                _ => runs.push((start, 1, length)),
            }
            start += length;
        }
        Self { runs }
    }
}

impl Attention {
    /// Computes attention.
    ///
    /// # Shapes
    /// `q` is `[T, H, E]`, `k` and `v` are `[T, K, E]`.
    pub fn forward(&self, q: &Tensor, k: &Tensor, v: &Tensor, segments: &Segments) -> Attended {
        let out = q.empty_like();
        let mut logsumexp = Vec::with_capacity(segments.runs.len());
        for &run in &segments.runs {
            let [q, k, v] =
                [batch(q, run), self.repeat(&batch(k, run)), self.repeat(&batch(v, run))];
            let mask = self.mask(run.2, &q);
            let (attended, lse) = Tensor::internal_scaled_dot_product_flash_attention_for_cpu(
                &q,
                &k,
                &v,
                0.0,
                mask.is_none(),
                mask.as_ref(),
                None,
            );
            batch(&out, run).copy_(&attended);
            logsumexp.push(lse);
        }
        Attended { out, logsumexp }
    }

    /// Returns the gradients of `q`, `k` and `v`, of their shapes.
    ///
    /// # Shapes
    /// `d_out` is `[T, H, E]`.
    pub fn backward(
        &self,
        d_out: &Tensor,
        [q, k, v]: [&Tensor; 3],
        attended: &Attended,
        segments: &Segments,
    ) -> [Tensor; 3] {
        let grads = [q.empty_like(), k.empty_like(), v.empty_like()];
        for (&run, lse) in segments.runs.iter().zip(&attended.logsumexp) {
            let [q, k, v] =
                [batch(q, run), self.repeat(&batch(k, run)), self.repeat(&batch(v, run))];
            let mask = self.mask(run.2, &q);
            let (dq, dk, dv) = Tensor::internal_scaled_dot_product_flash_attention_for_cpu_backward(
                &batch(d_out, run),
                &q,
                &k,
                &v,
                &batch(&attended.out, run),
                lse,
                0.0,
                mask.is_none(),
                mask.as_ref(),
                None,
            );
            batch(&grads[0], run).copy_(&dq);
            batch(&grads[1], run).copy_(&self.sum_groups(&dk));
            batch(&grads[2], run).copy_(&self.sum_groups(&dv));
        }
        grads
    }

    /// Repeats each key/value head for its query heads: `[S, K, t, E]` to `[S, H, t, E]`.
    fn repeat(&self, x: &Tensor) -> Tensor {
        if self.query_groups == 1 {
            return x.shallow_clone();
        }
        let [segments, heads, length, width] = sizes(x);
        x.unsqueeze(2).expand([segments, heads, self.query_groups, length, width], false).reshape([
            segments,
            heads * self.query_groups,
            length,
            width,
        ])
    }

    /// Sums the gradients of repeated heads: `[S, H, t, E]` to `[S, K, t, E]`.
    fn sum_groups(&self, grad: &Tensor) -> Tensor {
        if self.query_groups == 1 {
            return grad.shallow_clone();
        }
        let [segments, heads, length, width] = sizes(grad);
        grad.reshape([segments, heads / self.query_groups, self.query_groups, length, width])
            .sum_dim_intlist(2, false, grad.kind())
    }

    /// Returns what is added to the scores when the window is shorter than the segment, `[t, t]`.
    fn mask(&self, length: i64, like: &Tensor) -> Option<Tensor> {
        let window = self.window? as i64;
        if window >= length {
            return None;
        }
        let visible =
            Tensor::ones([length, length], (Kind::Bool, like.device())).tril(0).triu(1 - window);
        let mask = Tensor::zeros([length, length], (like.kind(), like.device()));
        Some(mask.masked_fill(&visible.logical_not(), f64::NEG_INFINITY))
    }
}

/// Views a run of `[T, heads, E]` as `[S, heads, t, E]`.
fn batch(x: &Tensor, (start, count, length): (i64, i64, i64)) -> Tensor {
    let (heads, width) = (x.size()[1], x.size()[2]);
    x.narrow(0, start, count * length).view([count, length, heads, width]).transpose(1, 2)
}

fn sizes(x: &Tensor) -> [i64; 4] {
    let size = x.size();
    [size[0], size[1], size[2], size[3]]
}
