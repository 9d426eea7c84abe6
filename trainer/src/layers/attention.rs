//! Causal attention inside each segment of a flat micro-batch.
//!
//! Segments never see each other, and no masked block between segments is ever touched.

use tch::Tensor;

use crate::ops::{self, Run};

/// The segments of a micro-batch as runs of equal length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segments {
    runs: Vec<Run>,
}

/// What attention leaves for its backward pass.
pub struct Attended {
    /// `[T, H, E]`.
    pub out: Tensor,
    /// Logarithms of the softmax's denominators.
    logsumexp: Vec<Tensor>,
}

/// How far queries look.
#[derive(Debug, Clone, Copy)]
pub struct Attention {
    /// How many positions back a query may look; `None` means all.
    pub window: Option<usize>,
}

impl Segments {
    /// Groups segment lengths.
    pub fn new(lengths: &[usize]) -> Self {
        let mut runs: Vec<Run> = Vec::new();
        let mut start = 0;
        for &length in lengths {
            let length = length as i64;
            match runs.last_mut() {
                Some(run) if run.length == length => run.count += 1,
                _ => runs.push(Run { start, count: 1, length }),
            }
            start += length;
        }
        Self { runs }
    }

    /// Returns the runs, in order and without gaps.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }
}

impl Attention {
    /// Computes attention.
    ///
    /// # Shapes
    /// `q` is `[T, H, E]`, `k` and `v` are `[T, K, E]`.
    pub fn forward(self, q: &Tensor, k: &Tensor, v: &Tensor, segments: &Segments) -> Attended {
        let (out, logsumexp) = ops::attention([q, k, v], self.over(segments));
        Attended { out, logsumexp }
    }

    /// Returns the gradients of `q`, `k` and `v`, of their shapes.
    ///
    /// # Shapes
    /// `d_out` is `[T, H, E]`.
    pub fn backward(
        self,
        d_out: &Tensor,
        inputs: [&Tensor; 3],
        attended: &Attended,
        segments: &Segments,
    ) -> [Tensor; 3] {
        let Attended { out, logsumexp } = attended;
        ops::attention_backward(inputs, out, logsumexp, d_out, self.over(segments))
    }

    fn over(self, segments: &Segments) -> ops::Attention<'_> {
        ops::Attention { runs: &segments.runs, window: self.window }
    }
}
