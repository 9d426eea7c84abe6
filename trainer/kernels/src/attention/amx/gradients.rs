//! The probabilities and score gradients of chunks.

use std::{
    arch::x86_64::{
        __m512i, _mm512_fmsub_ps, _mm512_mul_ps, _mm512_set1_ps, _mm512_setzero_si512,
        _mm512_sub_ps,
    },
    f32::consts::LOG2_E,
};

use super::{
    Chunk, ChunkWords,
    exp2::exp2_for_bf16,
    vector::{load_pair, pairs_of_rows, round, row_of, store_words},
};
use crate::{aligned::Aligned, amx::square::SIDE, gemm::LANES};

/// Chunks of queries whose products with a chunk of keys are summed in tiles.
pub(super) const QUERIES: usize = 4;
/// Chunks of keys whose products with a chunk of queries are summed in tiles.
pub(super) const KEYS: usize = 8;
/// The scores of a chunk and their gradients, and the gradients of a group of chunks.
pub(super) struct Scratch {
    pub scores: Aligned<Chunk>,
    pub d_scores: Aligned<Chunk>,
    /// The probabilities of a chunk of keys, as words of adjacent queries.
    pub p_pairs: Aligned<[ChunkWords; QUERIES]>,
    pub ds_pairs: Aligned<[ChunkWords; QUERIES]>,
    /// As rows, `[queries, keys]`.
    pub ds_rows: Vec<Aligned<[ChunkWords; KEYS]>>,
}

impl Default for Scratch {
    fn default() -> Self {
        let words = [0; SIDE * SIDE / 2];
        Self {
            scores: Aligned([0.0; SIDE * SIDE]),
            d_scores: Aligned([0.0; SIDE * SIDE]),
            p_pairs: Aligned([words; QUERIES]),
            ds_pairs: Aligned([words; QUERIES]),
            ds_rows: vec![Aligned([words; KEYS]); QUERIES],
        }
    }
}

impl Scratch {
    /// Computes probabilities `p` and score gradients `ds = p ∘ (dp − delta)` of a chunk.
    ///
    /// `query` and `key` are its place in the block of queries and in the group of keys; `lse` has
    /// base 2.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub(super) fn differentiate(
        &mut self,
        [query, key]: [usize; 2],
        scale: f32,
        lse: &[f32],
        delta: &[f32],
    ) {
        let scale = scale * LOG2_E;
        let (ds_rows, _) = self.ds_rows[query][key].as_chunks_mut();
        let (p_low, p_high) = halves(&mut self.p_pairs[query]);
        let (ds_low, ds_high) = halves(&mut self.ds_pairs[query]);
        let mut rows = [[_mm512_setzero_si512(); 2]; 2];
        for pair in 0..SIDE / 2 {
            for (row, to) in (2 * pair..).zip(&mut rows) {
                let [score, d_score] = [row_of(&self.scores, row), row_of(&self.d_scores, row)];
                *to = gradients([score, d_score], scale, lse[row], delta[row]);
                store_words(&mut ds_rows[row], to[1]);
            }
            let [[first_p, first_ds], [second_p, second_ds]] = rows;
            let [low, high] = pairs_of_rows(first_p, second_p);
            store_words(&mut p_low[pair], low);
            store_words(&mut p_high[pair], high);
            let [low, high] = pairs_of_rows(first_ds, second_ds);
            store_words(&mut ds_low[pair], low);
            store_words(&mut ds_high[pair], high);
        }
    }
}

/// Returns the probabilities and score gradients of a query, rounded.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
#[inline]
fn gradients(
    [scores, d_scores]: [&[f32; SIDE]; 2],
    scale: f32,
    lse: f32,
    delta: f32,
) -> [__m512i; 2] {
    let (scale, lse, delta) = (_mm512_set1_ps(scale), _mm512_set1_ps(lse), _mm512_set1_ps(delta));
    let [a, b] = load_pair(scores);
    let a = exp2_for_bf16(_mm512_fmsub_ps(a, scale, lse));
    let b = exp2_for_bf16(_mm512_fmsub_ps(b, scale, lse));
    let [da, db] = load_pair(d_scores);
    let da = _mm512_mul_ps(a, _mm512_sub_ps(da, delta));
    let db = _mm512_mul_ps(b, _mm512_sub_ps(db, delta));
    [round([a, b]), round([da, db])]
}

/// Returns the rows of both tiles of a chunk.
#[inline]
fn halves(chunk: &mut ChunkWords) -> (&mut [[u32; LANES]], &mut [[u32; LANES]]) {
    chunk.as_chunks_mut().0.split_at_mut(LANES)
}
