//! A micro-batch as tensors on the device.

use tch::Tensor;

use super::{block::BlockContext, network::Model};
use crate::{
    data::sequences::Batch,
    layers::{attention::Segments, dropout::Dropout, rope::Rotary},
    ops,
};

/// Micro-batches whose token counts round up to the same multiple of this need buffers of about the
/// same sizes.
const SIZE_CLASS: usize = 64;

/// A micro-batch as tensors: `T` tokens with padding, `N` targets.
pub(super) struct MicroBatch<'a> {
    /// `[T]`, int64.
    pub(super) tokens: Tensor,
    /// The positions whose output predicts a target, `[N]`, int64.
    pub(super) target_positions: Tensor,
    /// The targets, `[N]`, int64.
    pub(super) labels: Tensor,
    /// The rotations of all positions, `[T, 1, E/2]`.
    pub(super) rotary: Rotary,
    pub(super) segments: Segments,
    pub(super) dropout: Option<&'a Dropout>,
}

impl<'a> MicroBatch<'a> {
    pub(super) fn new(model: &Model, batch: &Batch, dropout: Option<&'a Dropout>) -> Self {
        let on_device = |numbers: &[i64]| Tensor::from_slice(numbers).to_device(model.device());
        // Padding is a segment of its own without targets: no other token attends to it, and its
        // gradients are zero.
        let length = batch.tokens.len();
        let padding = ops::padded_tokens(length, model.kind(), model.device()) - length;
        let mut tokens = batch.tokens.clone();
        tokens.resize(length + padding, 0);
        let mut segment_lengths = batch.segment_lengths.clone();
        segment_lengths.extend((padding > 0).then_some(padding));
        let positions: Vec<i64> =
            segment_lengths.iter().flat_map(|&length| 0..length as i64).collect();
        Self {
            tokens: on_device(&tokens),
            target_positions: on_device(&batch.target_positions),
            labels: on_device(&batch.labels),
            rotary: model.rotary(&positions),
            segments: Segments::new(&segment_lengths),
            dropout,
        }
    }

    /// Returns the number of tokens, rounded up to [`SIZE_CLASS`].
    pub(super) fn size_class(&self) -> i64 {
        self.tokens.numel().next_multiple_of(SIZE_CLASS) as i64
    }

    pub(super) fn block_context(&self) -> BlockContext<'_> {
        BlockContext { rotary: &self.rotary, segments: &self.segments, dropout: self.dropout }
    }
}
