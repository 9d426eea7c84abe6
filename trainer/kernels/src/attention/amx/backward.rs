//! The backward pass.
//!
//! Gradients of keys and values are summed transposed, `[E, keys]`: then pairs of queries are words
//! of the right operand, and probabilities need no transposition.

use std::{
    arch::x86_64::{
        __m512i, _mm512_dpbf16_ps, _mm512_fmsub_ps, _mm512_mul_ps, _mm512_set1_ps,
        _mm512_setzero_ps, _mm512_setzero_si512, _mm512_sub_ps,
    },
    cell::RefCell,
    f32::consts::LOG2_E,
    ops::Range,
};

use half::bf16;

use super::{
    Band, Chunk, ChunkWords,
    exp2::exp2_for_bf16,
    forward::write,
    pack::{Packed, tiles},
    prefetch::prefetch_for_writing,
    vector::{load_bf16, load_pair, pairs_of_rows, round, row_of, store, store_words, sums},
};
use crate::{
    aligned::{Aligned, Buffer},
    amx::square::{SIDE, configure_squares, product},
    attention::{BackwardInputs, Shape, Task, rows::Rows},
    gemm::{LANES, words_of},
    pool::Shared,
    transpose::{BLOCK_SIDE, transpose_block},
};

/// Chunks of queries whose products with a chunk of keys are summed in tiles.
const QUERIES: usize = 4;
/// Chunks of keys whose products with a chunk of queries are summed in tiles.
const KEYS: usize = 8;
/// Computes the gradients of a task, which has all queries of a segment.
///
/// # Safety
/// The CPU must support AMX and AVX512-BF16, and no other task may have these heads of the segment.
#[expect(unsafe_code, reason = "needs certain CPU features")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(in crate::attention) unsafe fn backward(
    task: &Task,
    shape: Shape,
    positions: usize,
    [q, k, v]: [&[bf16]; 3],
    backward_inputs: BackwardInputs<'_, bf16>,
    [dq, dk, dv]: &[Shared<'_, bf16>; 3],
) {
    let Shape { heads, kv_heads, width, window } = shape;
    let Task { start, length, kv_head, .. } = *task;
    let pass = Pass { band: Band { window }, width, scale: 1.0 / (width as f32).sqrt() };
    let kv_rows = Rows { start, stride: kv_heads * width, column: kv_head * width, width };
    let group = heads / kv_heads;
    // SAFETY: the caller's contract; the queries and keys of these heads belong to this task.
    BUFFERS.with_borrow_mut(|Buffers { keys, queries, scratch }| unsafe {
        configure_squares();
        keys.load(&kv_rows, [k, v], length);
        for first in (0..length).step_by(QUERIES * SIDE) {
            let count = length.min(first + QUERIES * SIDE) - first;
            let chunks = first / SIDE..(first + count).div_ceil(SIDE);
            for index in 0..group {
                let head = kv_head * group + index;
                let (stride, column) = (heads * width, head * width);
                let rows = Rows { start: start + first, stride, column, width };
                let lse_at = head * positions + rows.start;
                prefetch_for_writing(&rows, dq, 0..count);
                queries.load(&rows, q, backward_inputs, lse_at..lse_at + count);
                let block = Block { queries: chunks.clone(), is_first_head: index == 0 };
                pass.run(&block, queries, keys, scratch);
                write(&rows, &queries.sums, &[pass.scale; QUERIES * SIDE][..count], dq);
            }
        }
        keys.write(&kv_rows, length, pass.scale, [dk, dv]);
    });
}

/// The temporary memory of a task, reused by each thread.
#[derive(Default)]
struct Buffers {
    keys: Keys,
    queries: Queries,
    scratch: Box<Scratch>,
}

thread_local! {
    static BUFFERS: RefCell<Buffers> = RefCell::default();
}

/// The keys and values of a segment in one head.
#[derive(Default)]
struct Keys {
    k_columns: Packed,
    v_columns: Packed,
    k_pairs: Packed,
    /// The gradients of keys: for each chunk `[E, keys]`, in the order of [`pairs_of_rows`].
    k_sums: Buffer<f32>,
    v_sums: Buffer<f32>,
    /// A chunk of gradients, `[keys, E]`.
    rows: Buffer<f32>,
}

impl Keys {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn load(&mut self, rows: &Rows, [k, v]: [&[bf16]; 2], count: usize) {
        self.k_columns.transpose(rows, k, count);
        self.v_columns.transpose(rows, v, count);
        self.k_pairs.pair(rows, k, count);
        // All are written before they are added to.
        self.k_sums.grow(count.next_multiple_of(SIDE) * rows.width);
        self.v_sums.grow(count.next_multiple_of(SIDE) * rows.width);
    }

    /// Writes the gradients of keys, times `scale`, and of values.
    ///
    /// # Safety
    /// No other task may access those rows of this head.
    #[expect(unsafe_code, reason = "tasks write to disjoint ranges")]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn write(
        &mut self,
        rows: &Rows,
        count: usize,
        scale: f32,
        [dk, dv]: [&Shared<'_, bf16>; 2],
    ) {
        self.rows.grow(SIDE * rows.width);
        for first in (0..count).step_by(SIDE) {
            let count = SIDE.min(count - first);
            let chunk = Rows { start: rows.start + first, ..*rows };
            for (sums, factor, to) in [(&self.k_sums, scale, dk), (&self.v_sums, 1.0, dv)] {
                transpose_sums(&sums[first * rows.width..], rows.width, &mut self.rows);
                // SAFETY: the caller's contract.
                unsafe { write(&chunk, &self.rows, &[factor; SIDE][..count], to) };
            }
        }
    }
}

/// Some chunks of queries of one head.
struct Block {
    queries: Range<usize>,
    is_first_head: bool,
}

/// What the blocks of a task have in common.
struct Pass {
    band: Band,
    width: usize,
    scale: f32,
}

#[expect(unsafe_code, reason = "needs certain CPU features")]
impl Pass {
    /// Adds the gradients of a block.
    ///
    /// # Safety
    /// Tiles must be configured.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn run(
        &self,
        block: &Block,
        queries: &mut Queries,
        keys: &mut Keys,
        scratch: &mut Scratch,
    ) {
        let range = self.band.first(block.queries.start)..block.queries.end;
        for first in range.clone().step_by(KEYS) {
            let group = first..range.end.min(first + KEYS);
            // SAFETY: the caller's contract.
            unsafe {
                for key in group.clone() {
                    let seen = self.band.queries(key, block.queries.clone());
                    for query in seen.clone() {
                        let at = [query - block.queries.start, key - first];
                        self.differentiate([query, key], at, queries, keys, scratch);
                    }
                    let rows = seen.start - block.queries.start..seen.end - block.queries.start;
                    if block.is_first_head && key >= block.queries.start {
                        self.add_to_key::<false>(key, rows, queries, keys, scratch);
                    } else {
                        self.add_to_key::<true>(key, rows, queries, keys, scratch);
                    }
                }
                for query in block.queries.clone() {
                    self.add_to_query(
                        query,
                        query - block.queries.start,
                        &group,
                        queries,
                        keys,
                        scratch,
                    );
                }
            }
        }
    }

    /// Computes the probabilities and score gradients of a chunk; `at` is where it is in the block
    /// and in the group of keys.
    ///
    /// # Safety
    /// Tiles must be configured.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn differentiate(
        &self,
        [query, key]: [usize; 2],
        at: [usize; 2],
        queries: &Queries,
        keys: &Keys,
        scratch: &mut Scratch,
    ) {
        let steps = self.width / SIDE;
        let (q_chunk, d_chunk) = (queries.q_rows.rows(at[0]), queries.d_rows.rows(at[0]));
        let (k_chunk, v_chunk) = (keys.k_columns.columns(key), keys.v_columns.columns(key));
        // SAFETY: the caller's contract.
        unsafe {
            product::<false>(steps, q_chunk, k_chunk, &mut *scratch.scores, SIDE);
            product::<false>(steps, d_chunk, v_chunk, &mut *scratch.d_scores, SIDE);
        }
        self.band.mask(query, key, &mut scratch.scores);
        scratch.differentiate(at, self.scale, queries);
    }

    /// Adds to the gradients of a chunk of keys and values, or writes them; `rows` are the block's
    /// chunks of queries that attend to them.
    ///
    /// # Safety
    /// Tiles must be configured.
    unsafe fn add_to_key<const ADD: bool>(
        &self,
        key: usize,
        rows: Range<usize>,
        queries: &Queries,
        keys: &mut Keys,
        scratch: &Scratch,
    ) {
        let p = tiles(scratch.p_pairs[rows.start..].as_flattened());
        let ds = tiles(scratch.ds_pairs[rows.start..].as_flattened());
        for column in (0..self.width).step_by(SIDE) {
            let at = (key * self.width + column) * SIDE;
            let (d_chunk, q_chunk) = (
                queries.d_columns.pairs(rows.start, column),
                queries.q_columns.pairs(rows.start, column),
            );
            // SAFETY: the caller's contract.
            unsafe {
                product::<ADD>(rows.len(), d_chunk, p, &mut keys.v_sums[at..], SIDE);
                product::<ADD>(rows.len(), q_chunk, ds, &mut keys.k_sums[at..], SIDE);
            }
        }
    }

    /// Adds to the gradients of a chunk of queries, which are in a row of the block, those of a
    /// group of keys; the first group writes them.
    ///
    /// # Safety
    /// Tiles must be configured.
    unsafe fn add_to_query(
        &self,
        query: usize,
        row: usize,
        group: &Range<usize>,
        queries: &mut Queries,
        keys: &Keys,
        scratch: &Scratch,
    ) {
        let first = self.band.first(query);
        let seen = group.start.max(first)..group.end.min(query + 1);
        if seen.is_empty() {
            return;
        }
        let ds = tiles(scratch.ds_rows[row][seen.start - group.start..].as_flattened());
        for column in (0..self.width).step_by(SIDE) {
            let k_chunk = keys.k_pairs.pairs(seen.start, column);
            let sums = &mut queries.sums[row * SIDE * self.width + column..];
            // SAFETY: the caller's contract.
            unsafe {
                if seen.start == first {
                    product::<false>(seen.len(), ds, k_chunk, sums, self.width);
                } else {
                    product::<true>(seen.len(), ds, k_chunk, sums, self.width);
                }
            }
        }
    }
}

/// The queries of a block.
#[derive(Default)]
struct Queries {
    q_rows: Packed,
    d_rows: Packed,
    q_columns: Packed,
    d_columns: Packed,
    /// `logsumexp` in base 2.
    lse: Buffer<f32>,
    /// The product of each row of the output and its gradient.
    delta: Buffer<f32>,
    /// The gradients of the queries, `[queries, E]`.
    sums: Buffer<f32>,
}

impl Queries {
    /// Loads queries and the results of their forward pass.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn load(
        &mut self,
        rows: &Rows,
        q: &[bf16],
        BackwardInputs { out, logsumexp, d_out }: BackwardInputs<'_, bf16>,
        lse: Range<usize>,
    ) {
        let count = lse.len();
        self.q_rows.copy(rows, q, count);
        self.d_rows.copy(rows, d_out, count);
        self.q_columns.pair_columns(rows, q, count);
        self.d_columns.pair_columns(rows, d_out, count);
        self.sums.grow(QUERIES * SIDE * rows.width);
        self.lse.set_zero(QUERIES * SIDE);
        for (to, lse) in self.lse.iter_mut().zip(&logsumexp[lse]) {
            *to = lse * LOG2_E;
        }
        self.delta.set_zero(QUERIES * SIDE);
        let (blocks, _) = self.delta.as_chunks_mut::<LANES>();
        for (block, delta) in blocks.iter_mut().enumerate().take(count.div_ceil(LANES)) {
            let mut lanes = [[0.0; LANES]; LANES];
            for (row, lanes) in (block * LANES..count).zip(&mut lanes) {
                let mut sum = _mm512_setzero_ps();
                let (d_out, _) = rows.row(d_out, row).as_chunks();
                let (out, _) = rows.row(out, row).as_chunks();
                for (d_out, out) in d_out.iter().zip(out) {
                    sum = _mm512_dpbf16_ps(sum, load_bf16(d_out), load_bf16(out));
                }
                store(lanes, sum);
            }
            store(delta, sums(&lanes));
        }
    }
}

/// The scores of two chunks and their gradients, and the gradients of a group of chunks.
struct Scratch {
    scores: Aligned<Chunk>,
    d_scores: Aligned<Chunk>,
    /// The probabilities of a chunk of keys, as words of adjacent queries.
    p_pairs: Aligned<[ChunkWords; QUERIES]>,
    ds_pairs: Aligned<[ChunkWords; QUERIES]>,
    /// As rows, `[queries, keys]`.
    ds_rows: Vec<Aligned<[ChunkWords; KEYS]>>,
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
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn differentiate(&mut self, [query, key]: [usize; 2], scale: f32, queries: &Queries) {
        let (lse, delta) = (&queries.lse[query * SIDE..], &queries.delta[query * SIDE..]);
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

/// Transposes a chunk of gradients, `[E, keys]` in the order of [`pairs_of_rows`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn transpose_sums(sums: &[f32], width: usize, to: &mut [f32]) {
    let mut block = [0; BLOCK_SIDE * BLOCK_SIDE];
    for column in (0..width).step_by(BLOCK_SIDE) {
        for half in 0..2 {
            let from = words_of(&sums[column * SIDE + half * BLOCK_SIDE..]);
            transpose_block(from, SIDE, BLOCK_SIDE, &mut block, BLOCK_SIDE);
            for (index, from) in block.chunks_exact(BLOCK_SIDE).enumerate() {
                let key = index / 4 * 8 + half * 4 + index % 4;
                let to = &mut to[key * width + column..][..BLOCK_SIDE];
                for (to, &value) in to.iter_mut().zip(from) {
                    *to = f32::from_bits(value);
                }
            }
        }
    }
}
