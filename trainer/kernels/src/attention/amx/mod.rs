//! The passes in AMX tiles, for bf16.
//!
//! Scores are computed queries by keys, in chunks of 32 by 32. Rounded probabilities are then the
//! left operand of the product with values as they are, and results are rows of the output.

mod backward;
mod exp2;
mod forward;
mod gradients;
mod pack;
mod prefetch;
mod softmax;
mod vector;

use std::ops::Range;

use crate::amx::square::SIDE;

pub(super) use backward::backward;
pub(super) use forward::forward;

/// The scores of a chunk, `[queries, keys]`.
type Chunk = [f32; SIDE * SIDE];
/// A chunk rounded to bf16, as the words of two tiles.
type ChunkWords = [u32; SIDE * SIDE / 2];

/// The chunks that are not masked as a whole. Chunks are counted from the segment's start.
///
/// A query `i` attends to a key `j` if j ≤ i < j + window.
#[derive(Clone, Copy)]
struct Band {
    window: usize,
}

impl Band {
    /// Returns the first chunk of keys that a chunk of queries attends to; the last is its own.
    fn first(self, queries: usize) -> usize {
        (queries * SIDE + 1).saturating_sub(self.window) / SIDE
    }

    /// Returns those chunks of queries that attend to a chunk of keys.
    fn queries(self, keys: usize, of: Range<usize>) -> Range<usize> {
        let start = of.start.max(keys);
        start..(start..of.end).find(|&queries| self.first(queries) > keys).unwrap_or(of.end)
    }

    /// Sets scores to −∞ where a query does not attend.
    fn mask(self, queries: usize, keys: usize, scores: &mut Chunk) {
        let is_unmasked =
            keys < queries && (queries + 1) * SIDE <= (keys * SIDE).saturating_add(self.window);
        if is_unmasked {
            return;
        }
        for (row, scores) in scores.chunks_exact_mut(SIDE).enumerate() {
            let query = queries * SIDE + row;
            let start = (query + 1).saturating_sub(self.window).saturating_sub(keys * SIDE);
            let end = (query + 1 - keys * SIDE).min(SIDE);
            scores[..start.min(SIDE)].fill(f32::NEG_INFINITY);
            scores[end..].fill(f32::NEG_INFINITY);
        }
    }
}
