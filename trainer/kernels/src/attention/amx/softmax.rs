//! The online softmax of a chunk of queries.
//!
//! # Source
//! Milakov, Gimelshein: Online normalizer calculation for softmax, arXiv 1805.02867, algorithm 3.
//! Differs: powers of two, so that one multiplication scales a score and changes its base.

use std::{
    arch::x86_64::{
        _CMP_GT_OQ, _mm512_add_ps, _mm512_cmp_ps_mask, _mm512_div_ps, _mm512_fmadd_ps,
        _mm512_fmsub_ps, _mm512_max_ps, _mm512_mul_ps, _mm512_set1_ps, _mm512_setzero_ps,
        _mm512_sub_ps,
    },
    f32::consts::{LN_2, LOG2_E},
    ops::Range,
};

use super::{
    Chunk, ChunkWords,
    exp2::{exp2, ln},
    vector::{load, load_pair, maxima, round, row_of, store, store_words, sums},
};
use crate::{amx::square::SIDE, gemm::LANES};

/// Scores are below it in no practical case; unlike −∞, it can be subtracted from −∞.
const LOWEST: f32 = -1e30;

#[derive(Default)]
pub(super) struct OnlineSoftmax {
    /// Turns a product of a query and a key into the exponent of a power of two.
    scale: f32,
    /// The largest exponent of each query.
    largest: [f32; SIDE],
    /// The sums of the powers, relative to that of the largest exponent.
    total: [f32; SIDE],
    /// What the last [`Self::raise`] multiplied the powers by.
    correction: [f32; SIDE],
    is_raised: bool,
    /// The sums of one step in each lane.
    sums: [[f32; LANES]; SIDE],
}

impl OnlineSoftmax {
    /// Starts with no keys; `scale` is of scores with base e.
    pub(super) fn new(scale: f32) -> Self {
        Self {
            scale: scale * LOG2_E,
            largest: [LOWEST; SIDE],
            total: [0.0; SIDE],
            correction: [1.0; SIDE],
            is_raised: false,
            sums: [[0.0; LANES]; SIDE],
        }
    }

    /// Raises the largest exponents to those of some chunks of scores.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub(super) fn raise(&mut self, scores: &[Chunk]) {
        let mut largest = [[0.0; LANES]; LANES];
        self.is_raised = false;
        for first in (0..SIDE).step_by(LANES) {
            for (row, to) in (first..).zip(&mut largest) {
                let mut both = [_mm512_set1_ps(f32::NEG_INFINITY); 2];
                for chunk in scores {
                    let [a, b] = load_pair(row_of(chunk, row));
                    both = [_mm512_max_ps(both[0], a), _mm512_max_ps(both[1], b)];
                }
                store(to, _mm512_max_ps(both[0], both[1]));
            }
            let largest = _mm512_mul_ps(maxima(&largest), _mm512_set1_ps(self.scale));
            let to = lanes_mut(&mut self.largest, first);
            let old = load(to);
            let new = _mm512_max_ps(largest, old);
            store(to, new);
            self.is_raised |= _mm512_cmp_ps_mask::<_CMP_GT_OQ>(new, old) != 0;
            let correction = exp2(_mm512_sub_ps(old, new));
            store(lanes_mut(&mut self.correction, first), correction);
            let total = lanes_mut(&mut self.total, first);
            store(total, _mm512_mul_ps(load(total), correction));
        }
    }

    /// Makes values that are relative to the largest exponents before [`Self::raise`], `[queries,
    /// E]`, relative to the present ones.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub(super) fn rescale(&self, values: &mut [f32]) {
        if !self.is_raised {
            return;
        }
        let width = values.len() / SIDE;
        for (row, &correction) in values.chunks_exact_mut(width).zip(&self.correction) {
            for value in row {
                *value *= correction;
            }
        }
    }

    /// Computes the probabilities of some queries relative to the largest, and adds to their sums.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub(super) fn exponentiate(
        &mut self,
        scores: &[Chunk],
        probabilities: &mut [ChunkWords],
        rows: Range<usize>,
    ) {
        let scale = _mm512_set1_ps(self.scale);
        for row in rows {
            let largest = _mm512_set1_ps(self.largest[row]);
            let mut sums = [_mm512_setzero_ps(); 2];
            for (chunk, to) in scores.iter().zip(&mut *probabilities) {
                let [a, b] = load_pair(row_of(chunk, row));
                let p = [
                    exp2(_mm512_fmsub_ps(a, scale, largest)),
                    exp2(_mm512_fmsub_ps(b, scale, largest)),
                ];
                sums = [_mm512_add_ps(sums[0], p[0]), _mm512_add_ps(sums[1], p[1])];
                store_words(&mut to.as_chunks_mut().0[row], round(p));
            }
            store(&mut self.sums[row], _mm512_add_ps(sums[0], sums[1]));
        }
    }

    /// Adds the sums of [`Self::exponentiate`] to the totals.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub(super) fn add_sums(&mut self) {
        for (first, rows) in (0..).step_by(LANES).zip(self.sums.as_chunks().0) {
            let total = lanes_mut(&mut self.total, first);
            store(total, _mm512_add_ps(load(total), sums(rows)));
        }
    }

    /// Returns the factors that make probabilities of `sums`, and the natural logarithms of the
    /// denominators.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub(super) fn finish(&self) -> ([f32; SIDE], [f32; SIDE]) {
        let (mut factors, mut logsumexp) = ([0.0; SIDE], [0.0; SIDE]);
        for first in (0..SIDE).step_by(LANES) {
            let (largest, total) =
                (load(lanes(&self.largest, first)), load(lanes(&self.total, first)));
            let factor = _mm512_div_ps(_mm512_set1_ps(1.0), total);
            store(lanes_mut(&mut factors, first), factor);
            let sum = _mm512_fmadd_ps(largest, _mm512_set1_ps(LN_2), ln(total));
            store(lanes_mut(&mut logsumexp, first), sum);
        }
        (factors, logsumexp)
    }
}

#[inline]
fn lanes(values: &[f32; SIDE], first: usize) -> &[f32; LANES] {
    &values.as_chunks().0[first / LANES]
}

#[inline]
fn lanes_mut(values: &mut [f32; SIDE], first: usize) -> &mut [f32; LANES] {
    &mut values.as_chunks_mut().0[first / LANES]
}
