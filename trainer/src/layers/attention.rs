//! Causal attention inside each segment of a flat micro-batch.
//!
//! Tokens never attend across segments, and no score between segments is ever computed.

use tch::Tensor;

use crate::ops::{self, AttentionMask, SegmentRun};

/// The segments of a micro-batch, grouped into runs of equal length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segments {
    runs: Vec<SegmentRun>,
}

/// The result of attention, and what its backward pass needs.
pub struct AttentionOutput {
    /// `[T, H, E]`.
    pub out: Tensor,
    /// The logarithms of the softmax denominators; their layout is the kernel's own.
    logsumexp: Vec<Tensor>,
}

/// The attention of one block.
#[derive(Debug, Clone, Copy)]
pub struct Attention {
    /// How many positions back a query attends, itself included; `None` means all.
    pub window: Option<usize>,
}

impl Segments {
    /// Groups segment lengths into runs.
    pub fn new(lengths: &[usize]) -> Self {
        let mut runs: Vec<SegmentRun> = Vec::new();
        let mut start = 0;
        for &length in lengths {
            let length = length as i64;
            match runs.last_mut() {
                Some(run) if run.length == length => run.count += 1,
                _ => runs.push(SegmentRun { start, count: 1, length }),
            }
            start += length;
        }
        Self { runs }
    }

    /// Returns the runs, in order and without gaps.
    pub fn runs(&self) -> &[SegmentRun] {
        &self.runs
    }
}

impl AttentionOutput {
    /// Returns what is saved beside the output.
    #[cfg(test)]
    pub(crate) fn logsumexp(&self) -> &[Tensor] {
        &self.logsumexp
    }
}

impl Attention {
    /// Computes attention.
    ///
    /// # Shapes
    /// `q` is `[T, H, E]`, `k` and `v` are `[T, K, E]`.
    pub fn forward(
        self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        segments: &Segments,
    ) -> AttentionOutput {
        let (out, logsumexp) = ops::attention([q, k, v], self.mask(segments));
        AttentionOutput { out, logsumexp }
    }

    /// Returns the gradients of `q`, `k` and `v`, in their shapes.
    ///
    /// # Shapes
    /// `d_out` is `[T, H, E]`.
    pub fn backward(
        self,
        d_out: &Tensor,
        inputs: [&Tensor; 3],
        output: &AttentionOutput,
        segments: &Segments,
    ) -> [Tensor; 3] {
        let AttentionOutput { out, logsumexp } = output;
        ops::attention_backward(inputs, out, logsumexp, d_out, self.mask(segments))
    }

    fn mask(self, segments: &Segments) -> AttentionMask<'_> {
        AttentionMask { runs: &segments.runs, window: self.window }
    }
}
