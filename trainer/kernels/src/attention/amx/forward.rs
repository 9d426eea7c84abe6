//! The forward pass.
//!
//! It is a pipeline of steps, because it takes long until a product is in memory: while the softmax
//! of one step is computed, the scores of the next are under way.

use std::{
    arch::x86_64::{_mm512_mul_ps, _mm512_set1_ps},
    cell::RefCell,
    ops::Range,
};

use half::bf16;

use super::{
    Band, Chunk, ChunkWords,
    pack::{Packed, tiles},
    prefetch::{prefetch_for_writing, prefetch_rows},
    softmax::OnlineSoftmax,
    vector::{load_pair, round, store_bf16},
};
use crate::{
    aligned::{Aligned, Buffer},
    amx::square::{SIDE, configure_squares, product},
    attention::{Shape, Task, rows::Rows},
    pool::Shared,
};

/// Chunks of keys of one step: the scores of two steps fit in the L1 cache.
const GROUP: usize = 4;

/// Computes the queries of a task.
///
/// # Safety
/// The CPU must support AMX and AVX512-BF16, and no other task may have these queries.
#[expect(unsafe_code, reason = "needs certain CPU features")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(in crate::attention) unsafe fn forward(
    task: &Task,
    shape: Shape,
    positions: usize,
    [q, k, v]: [&[bf16]; 3],
    out: &Shared<'_, bf16>,
    logsumexp: &Shared<'_, f32>,
) {
    let band = Band { window: shape.window };
    let lowest = band.first(task.first / SIDE);
    let pass = Pass { task, shape, band, lowest, positions, q, out, logsumexp };
    // SAFETY: the caller's contract.
    BUFFERS.with_borrow_mut(|buffers| unsafe {
        configure_squares();
        pass.run([k, v], buffers);
    });
}

/// The temporary memory of a task, reused by each thread.
#[derive(Default)]
struct Buffers {
    q_rows: Packed,
    k_columns: Packed,
    v_pairs: Packed,
    sums: [Sums; 2],
    scratch: Box<Scratch>,
}

/// The results of a chunk of queries in one head so far.
#[derive(Default)]
struct Sums {
    /// `[queries, E]`, relative to the softmax.
    values: Buffer<f32>,
    softmax: OnlineSoftmax,
}

/// The scores of two steps, and the probabilities of one.
struct Scratch {
    scores: [Box<Aligned<[Chunk; GROUP]>>; 2],
    p: Aligned<[ChunkWords; GROUP]>,
}

impl Default for Scratch {
    fn default() -> Self {
        Self {
            scores: [(); 2].map(|()| Box::new(Aligned([[0.0; SIDE * SIDE]; GROUP]))),
            p: Aligned([[0; SIDE * SIDE / 2]; GROUP]),
        }
    }
}

thread_local! {
    static BUFFERS: RefCell<Buffers> = RefCell::default();
}

/// A chunk of queries of one head, and up to [`GROUP`] chunks of the keys that it attends to.
struct Step {
    head: usize,
    queries: usize,
    keys: Range<usize>,
    /// Which of the two [`Sums`] it adds to.
    sums: usize,
    is_first: bool,
    is_last: bool,
}

/// Returns the steps of some chunks of queries in some heads. Heads come in turn, as their queries
/// are side by side in memory.
fn steps(band: Band, chunks: Range<usize>, heads: Range<usize>) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut sums = 0;
    for queries in chunks {
        let keys = band.first(queries)..queries + 1;
        for head in heads.clone() {
            steps.extend(keys.clone().step_by(GROUP).map(|first| {
                let end = keys.end.min(first + GROUP);
                let (is_first, is_last) = (first == keys.start, end == keys.end);
                Step { head, queries, keys: first..end, sums, is_first, is_last }
            }));
            sums = 1 - sums;
        }
    }
    steps
}

/// What the steps of a task have in common.
struct Pass<'a> {
    task: &'a Task,
    shape: Shape,
    band: Band,
    /// The first chunk of keys.
    lowest: usize,
    positions: usize,
    q: &'a [bf16],
    out: &'a Shared<'a, bf16>,
    logsumexp: &'a Shared<'a, f32>,
}

#[expect(unsafe_code, reason = "needs certain CPU features")]
impl Pass<'_> {
    /// # Safety
    /// As for [`forward`], and tiles must be configured.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn run(&self, [k, v]: [&[bf16]; 2], buffers: &mut Buffers) {
        let Buffers { q_rows, k_columns, v_pairs, sums, scratch } = buffers;
        let Shape { heads, kv_heads, width, .. } = self.shape;
        let Task { start, kv_head, first, queries, .. } = *self.task;
        let rows = Rows {
            start: start + self.lowest * SIDE,
            stride: kv_heads * width,
            column: kv_head * width,
            width,
        };
        let end = first + queries;
        k_columns.transpose(&rows, k, end - self.lowest * SIDE);
        v_pairs.pair(&rows, v, end - self.lowest * SIDE);
        let group = heads / kv_heads;
        let chunks = first / SIDE..end.div_ceil(SIDE);
        let steps = steps(self.band, chunks, kv_head * group..(kv_head + 1) * group);
        let before = |index: usize, distance| steps.get(index.checked_sub(distance)?);
        for index in 0..steps.len() + 2 {
            let (next, this, last) = (steps.get(index), before(index, 1), before(index, 2));
            let [even, odd] = &mut scratch.scores;
            let (next_scores, scores) = if index % 2 == 0 { (even, odd) } else { (odd, even) };
            if let Some(step) = this {
                let softmax = &mut sums[step.sums].softmax;
                if step.is_first {
                    *softmax = OnlineSoftmax::new(1.0 / (width as f32).sqrt());
                }
                softmax.raise(&scores[..step.keys.len()]);
            }
            if let Some(step) = next.filter(|step| step.is_first) {
                let (rows, count) = self.rows(step);
                q_rows.copy(&rows, self.q, count);
            }
            // A product and some rows in turn: the CPU computes them at the same time.
            for (part, next_scores) in next_scores.iter_mut().enumerate() {
                let part_rows = part * SIDE / GROUP..(part + 1) * SIDE / GROUP;
                if let Some(step) = next.filter(|step| part < step.keys.len()) {
                    let key = step.keys.start + part;
                    let k_chunk = k_columns.columns(key - self.lowest);
                    // SAFETY: the caller's contract.
                    unsafe {
                        product::<false>(width / SIDE, q_rows.rows(0), k_chunk, next_scores, SIDE);
                    }
                    self.band.mask(step.queries, key, next_scores);
                }
                if let Some(step) = next.filter(|step| step.is_first) {
                    let following = steps[index + 1..].iter().find(|step| step.is_first);
                    // SAFETY: the caller's contract.
                    unsafe { self.prefetch(step, following, &part_rows) };
                }
                if let Some(Step { keys, sums: at, .. }) = this {
                    let (scores, p) = (&scores[..keys.len()], &mut scratch.p[..keys.len()]);
                    sums[*at].softmax.exponentiate(scores, p, part_rows);
                }
            }
            // SAFETY: the caller's contract.
            unsafe {
                if let Some(step) = last.filter(|step| step.is_last) {
                    self.write(step, &sums[step.sums]);
                }
                if let Some(step) = this {
                    self.add_values(step, &scratch.p[..], v_pairs, &mut sums[step.sums]);
                }
            }
        }
    }

    /// Returns the queries of a step, and their number.
    fn rows(&self, step: &Step) -> (Rows, usize) {
        let Shape { heads, width, .. } = self.shape;
        let first = step.queries * SIDE;
        let (start, column) = (self.task.start + first, step.head * width);
        let rows = Rows { start, stride: heads * width, column, width };
        (rows, SIDE.min(self.task.first + self.task.queries - first))
    }

    /// Prefetches part of the output of a step, and of the queries that follow.
    ///
    /// # Safety
    /// As for [`forward`].
    unsafe fn prefetch(&self, step: &Step, following: Option<&Step>, part: &Range<usize>) {
        let (rows, count) = self.rows(step);
        // SAFETY: these queries of this head belong to this task.
        unsafe {
            prefetch_for_writing(&rows, self.out, part.start.min(count)..part.end.min(count));
        };
        if let Some(step) = following {
            let (rows, count) = self.rows(step);
            prefetch_rows(&rows, self.q, part.start.min(count)..part.end.min(count));
        }
    }

    /// Adds the values of a step's keys, weighted with probabilities.
    ///
    /// # Safety
    /// Tiles must be configured.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    #[inline]
    unsafe fn add_values(&self, step: &Step, p: &[ChunkWords], v_pairs: &Packed, sums: &mut Sums) {
        let width = self.shape.width;
        let Sums { values, softmax } = sums;
        values.grow(SIDE * width);
        let values = &mut values[..SIDE * width];
        softmax.add_sums();
        if !step.is_first {
            softmax.rescale(values);
        }
        let count = step.keys.len();
        let p = tiles(p[..count].as_flattened());
        for column in (0..width).step_by(SIDE) {
            let v_chunk = v_pairs.pairs(step.keys.start - self.lowest, column);
            // SAFETY: the caller's contract.
            unsafe {
                if step.is_first {
                    product::<false>(count, p, v_chunk, &mut values[column..], width);
                } else {
                    product::<true>(count, p, v_chunk, &mut values[column..], width);
                }
            }
        }
    }

    /// Writes the results of a chunk of queries.
    ///
    /// # Safety
    /// As for [`forward`].
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn write(&self, step: &Step, sums: &Sums) {
        let (rows, count) = self.rows(step);
        let (factors, lse) = sums.softmax.finish();
        let at = step.head * self.positions + rows.start;
        // SAFETY: these queries of this head belong to this task.
        unsafe {
            self.logsumexp.range(at..at + count).copy_from_slice(&lse[..count]);
            write(&rows, &sums.values, &factors[..count], self.out);
        }
    }
}

/// Multiplies each row of `[rows, E]` by its factor, rounds it and stores it.
///
/// # Safety
/// No other task may access those rows of this head.
#[expect(unsafe_code, reason = "tasks write to disjoint ranges")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) unsafe fn write(rows: &Rows, sums: &[f32], factors: &[f32], to: &Shared<'_, bf16>) {
    for ((row, sums), &factor) in sums.chunks_exact(rows.width).enumerate().zip(factors) {
        let factor = _mm512_set1_ps(factor);
        let at = (rows.start + row) * rows.stride + rows.column;
        // SAFETY: the caller's contract.
        let to = unsafe { to.range(at..at + rows.width) };
        for (to, sums) in to.as_chunks_mut().0.iter_mut().zip(sums.as_chunks().0) {
            let [a, b] = load_pair(sums);
            store_bf16(to, round([_mm512_mul_ps(a, factor), _mm512_mul_ps(b, factor)]));
        }
    }
}
