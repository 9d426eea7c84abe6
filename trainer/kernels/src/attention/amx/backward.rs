//! The backward pass.
//!
//! Gradients of keys and values are summed transposed, `[E, keys]`: then pairs of queries are words
//! of the right operand, and probabilities need no transposition.

use std::{
    arch::x86_64::{_mm512_dpbf16_ps, _mm512_setzero_ps},
    cell::RefCell,
    f32::consts::LOG2_E,
    ops::Range,
};

use half::bf16;

use super::{
    Band,
    forward::write,
    gradients::{KEYS, QUERIES, Scratch},
    pack::{Packed, tiles},
    vector::{load_bf16, store, sums},
};
use crate::{
    aligned::Buffer,
    amx::square::{SIDE, configure_squares, product},
    attention::{BackwardInputs, Shape, Task, rows::Rows},
    gemm::{LANES, words_of},
    pool::Shared,
    transpose::{BLOCK_SIDE, transpose_block},
};

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
    /// The gradients of keys: for each chunk `[E, keys]`, in the order of [`pairs_of_rows`](super::vector::pairs_of_rows).
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
        let (lse, delta) = (&queries.lse[at[0] * SIDE..], &queries.delta[at[0] * SIDE..]);
        scratch.differentiate(at, self.scale, lse, delta);
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

/// Transposes a chunk of gradients, `[E, keys]` in the order of [`pairs_of_rows`](super::vector::pairs_of_rows).
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
