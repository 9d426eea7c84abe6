//! The passes of any micro-kernel.
//!
//! Scores are computed transposed, keys by queries, so that each query is a lane of a register and
//! nothing is summed across lanes.

use std::cell::RefCell;

use super::{
    BackwardInputs, Shape, Task,
    rows::{Rows, TILE},
};
use crate::{
    Element,
    aligned::{Aligned, Buffer},
    exp::exp,
    gemm::{LANES, MicroKernel, Words, interleave, words_of},
    pool::Shared,
    transpose::transpose,
};

/// Computes the queries of a task.
///
/// # Safety
/// The CPU must support the kernel, and no other task may have these queries.
#[expect(unsafe_code, reason = "needs certain CPU features")]
pub(super) unsafe fn forward<E: Element, K: MicroKernel>(
    task: &Task,
    shape: Shape,
    positions: usize,
    inputs: [&[E]; 3],
    out: &Shared<'_, E>,
    logsumexp: &Shared<'_, f32>,
) {
    let forward = if K::PER_WORD == 2 { forward_bf16::<E, K> } else { forward_fp32::<E, K> };
    // SAFETY: the caller's contract.
    BUFFERS.with_borrow_mut(|buffers| unsafe {
        forward(task, shape, positions, inputs, out, logsumexp, buffers);
    });
}

/// Computes the gradients of a task, which has all queries of a segment.
///
/// # Safety
/// The CPU must support the kernel, and no other task may have these heads of the segment.
#[expect(unsafe_code, reason = "needs certain CPU features")]
pub(super) unsafe fn backward<E: Element, K: MicroKernel>(
    task: &Task,
    shape: Shape,
    positions: usize,
    inputs: [&[E]; 3],
    backward_inputs: BackwardInputs<'_, E>,
    grads: &[Shared<'_, E>; 3],
) {
    let backward = if K::PER_WORD == 2 { backward_bf16::<E, K> } else { backward_fp32::<E, K> };
    // SAFETY: the caller's contract.
    BUFFERS.with_borrow_mut(|buffers| unsafe {
        backward(task, shape, positions, inputs, backward_inputs, grads, buffers);
    });
}

/// The temporary memory of a task.
///
/// Reused by each thread: fresh memory costs page faults, and freeing it stalls the other threads.
#[derive(Default)]
struct Buffers {
    k_rows: Buffer<u32>,
    v_rows: Buffer<u32>,
    row_words: Buffer<u32>,
    transposed: Buffer<u32>,
    q_columns: Buffer<u32>,
    q_words: Buffer<u32>,
    d_columns: Buffer<u32>,
    d_words: Buffer<u32>,
    q_sums: Buffer<f32>,
    k_sums: Buffer<f32>,
    v_sums: Buffer<f32>,
}

thread_local! {
    static BUFFERS: RefCell<Buffers> = RefCell::default();
}

/// Compiles the passes of a [`Task`] for certain CPU features.
macro_rules! compiled {
    ($features:literal, $forward:ident, $backward:ident) => {
        #[expect(unsafe_code, reason = "needs certain CPU features")]
        #[target_feature(enable = $features)]
        unsafe fn $forward<E: Element, K: MicroKernel>(
            task: &Task,
            shape: Shape,
            positions: usize,
            inputs: [&[E]; 3],
            out: &Shared<'_, E>,
            logsumexp: &Shared<'_, f32>,
            buffers: &mut Buffers,
        ) {
            // SAFETY: the caller's contract.
            unsafe { task.forward::<E, K>(shape, positions, inputs, out, logsumexp, buffers) }
        }

        #[expect(unsafe_code, reason = "needs certain CPU features")]
        #[target_feature(enable = $features)]
        unsafe fn $backward<E: Element, K: MicroKernel>(
            task: &Task,
            shape: Shape,
            positions: usize,
            inputs: [&[E]; 3],
            backward_inputs: BackwardInputs<'_, E>,
            grads: &[Shared<'_, E>; 3],
            buffers: &mut Buffers,
        ) {
            // SAFETY: the caller's contract.
            unsafe {
                task.backward::<E, K>(shape, positions, inputs, backward_inputs, grads, buffers)
            }
        }
    };
}

// The micro-kernel's loops are compiled separately, with the features they need.
compiled!("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16", forward_bf16, backward_bf16);
compiled!("avx512f,avx512bw,avx512dq,avx512vl", forward_fp32, backward_fp32);

#[expect(unsafe_code, reason = "needs certain CPU features")]
#[expect(clippy::inline_always, reason = "inlined into functions with target features")]
impl Task {
    /// # Safety
    /// The CPU must support the kernel.
    #[inline(always)]
    unsafe fn forward<E: Element, K: MicroKernel>(
        &self,
        shape: Shape,
        positions: usize,
        [q, k, v]: [&[E]; 3],
        out: &Shared<'_, E>,
        logsumexp: &Shared<'_, f32>,
        buffers: &mut Buffers,
    ) {
        let Shape { heads, kv_heads, width, window } = shape;
        let scale = 1.0 / (width as f32).sqrt();
        let end = self.first + self.queries;
        let lowest = (self.first + 1).saturating_sub(window) / TILE * TILE;
        let keys = (end - lowest).next_multiple_of(TILE);
        let kv_rows = Rows {
            start: self.start + lowest,
            stride: kv_heads * width,
            column: self.kv_head * width,
            width,
        };
        let Buffers { row_words, transposed, q_sums: sums, q_columns, k_rows, .. } = buffers;
        let k_words = kv_rows.words::<E, K>(k, end - lowest, k_rows);
        kv_rows.pack_words::<E, K>(v, end - lowest, keys, row_words);
        let key_words = keys / K::PER_WORD;
        // SAFETY: the caller's contract.
        unsafe { transpose(row_words, [key_words, width], transposed) }; // [E, key words]
        let mut scores = Aligned([0.0; TILE * TILE]); // [keys, queries]
        let mut p_words = Aligned([0_u32; TILE * TILE]);
        for head in self.kv_head * (heads / kv_heads)..(self.kv_head + 1) * (heads / kv_heads) {
            for first in (self.first..end).step_by(TILE) {
                let count = TILE.min(end - first);
                let rows = Rows {
                    start: self.start + first,
                    stride: heads * width,
                    column: head * width,
                    width,
                };
                // SAFETY: the caller's contract.
                unsafe { rows.pack_columns::<E, K>(q, count, q_columns) };
                let mut softmax = OnlineSoftmax::new(scale);
                sums.set_zero(width * TILE); // [E, queries]
                let mut tile = (first + 1).saturating_sub(window) / TILE * TILE;
                while tile < first + count {
                    let keys_here = TILE.min(self.length - tile);
                    // SAFETY: the caller's contract.
                    unsafe {
                        K::product::<false>(
                            [keys_here, width / K::PER_WORD, TILE],
                            k_words.below(tile - lowest),
                            Words { data: q_columns, stride: TILE },
                            &mut *scores,
                        );
                    }
                    scores[keys_here * TILE..].fill(f32::NEG_INFINITY);
                    apply_causal_mask(&mut scores, [tile, keys_here], [first, count], window);
                    let first_word = (tile - lowest) / K::PER_WORD;
                    // SAFETY: the caller's contract.
                    unsafe {
                        softmax.add::<K>(&scores, &mut p_words, sums);
                        K::product::<true>(
                            [width, TILE / K::PER_WORD, TILE],
                            Words { data: &transposed[first_word..], stride: key_words },
                            Words { data: &*p_words, stride: TILE },
                            sums,
                        );
                    }
                    tile += TILE;
                }
                let at = head * positions + self.start + first;
                #[expect(unsafe_code, reason = "tasks write to disjoint ranges")]
                // SAFETY: these queries of this head belong to this task.
                let lse = unsafe { logsumexp.range(at..at + count) };
                lse.copy_from_slice(&softmax.logsumexp()[..count]);
                scale_columns(sums, &softmax.total.map(|total| 1.0 / total));
                #[expect(unsafe_code, reason = "tasks write to disjoint ranges")]
                // SAFETY: as above.
                unsafe {
                    rows.write_transposed(sums, count, out);
                }
            }
        }
    }

    /// # Safety
    /// The CPU must support the kernel.
    #[expect(clippy::too_many_lines, reason = "one loop nest whose parts share a dozen buffers")]
    #[inline(always)]
    unsafe fn backward<E: Element, K: MicroKernel>(
        &self,
        shape: Shape,
        positions: usize,
        [q, k, v]: [&[E]; 3],
        backward_inputs: BackwardInputs<'_, E>,
        [dq, dk, dv]: &[Shared<'_, E>; 3],
        buffers: &mut Buffers,
    ) {
        let Shape { heads, kv_heads, width, window } = shape;
        let scale = 1.0 / (width as f32).sqrt();
        let length = self.length;
        let padded = length.next_multiple_of(TILE);
        let k_rows = Rows {
            start: self.start,
            stride: kv_heads * width,
            column: self.kv_head * width,
            width,
        };
        let k_at = self.start * kv_heads * width + self.kv_head * width;
        let Buffers { row_words, transposed: k_transposed, k_sums, v_sums, q_sums, .. } = buffers;
        let Buffers { q_columns, q_words, d_columns, d_words, .. } = buffers;
        let k_words = k_rows.words::<E, K>(k, length, &mut buffers.k_rows);
        let v_words = k_rows.words::<E, K>(v, length, &mut buffers.v_rows);
        k_rows.pack_words::<E, K>(k, length, padded, row_words);
        let key_words = padded / K::PER_WORD;
        // SAFETY: the caller's contract.
        unsafe { transpose(row_words, [key_words, width], k_transposed) }; // [E, key words]
        k_sums.set_zero(padded * width);
        v_sums.set_zero(padded * width);
        let (mut scores, mut d_scores) = (Aligned([0.0; TILE * TILE]), Aligned([0.0; TILE * TILE]));
        let mut p = Aligned([K::Number::default(); TILE * TILE]);
        let mut ds = p;
        let mut ds_words = Aligned([0_u32; TILE * TILE]);
        for head in self.kv_head * (heads / kv_heads)..(self.kv_head + 1) * (heads / kv_heads) {
            for first in (0..length).step_by(TILE) {
                let count = TILE.min(length - first);
                let rows = Rows {
                    start: self.start + first,
                    stride: heads * width,
                    column: head * width,
                    width,
                };
                // SAFETY: the caller's contract.
                unsafe {
                    rows.pack_columns::<E, K>(q, count, q_columns);
                    rows.pack_columns::<E, K>(backward_inputs.d_out, count, d_columns);
                }
                rows.pack_words::<E, K>(q, count, TILE, q_words);
                rows.pack_words::<E, K>(backward_inputs.d_out, count, TILE, d_words);
                // Queries past the end get probability 0.
                let (mut lse, mut delta) = ([f32::INFINITY; TILE], [0.0; TILE]);
                let at = head * positions + self.start + first;
                lse[..count].copy_from_slice(&backward_inputs.logsumexp[at..at + count]);
                for (row, delta) in delta[..count].iter_mut().enumerate() {
                    let (d_out, out) =
                        (rows.row(backward_inputs.d_out, row), rows.row(backward_inputs.out, row));
                    *delta = crate::sum::of_pairs(d_out, out, |d_out, out| d_out * out);
                }
                q_sums.set_zero(width * TILE); // transposed
                let mut tile = (first + 1).saturating_sub(window) / TILE * TILE;
                while tile < first + count {
                    let keys = TILE.min(length - tile);
                    let sizes = [keys, width / K::PER_WORD, TILE];
                    let columns = |data| Words { data, stride: TILE };
                    let (k_left, v_left) = (k_words.below(tile), v_words.below(tile));
                    // SAFETY: the caller's contract.
                    unsafe {
                        K::product::<false>(sizes, k_left, columns(q_columns), &mut *scores);
                        K::product::<false>(sizes, v_left, columns(d_columns), &mut *d_scores);
                    }
                    scores[keys * TILE..].fill(f32::NEG_INFINITY);
                    apply_causal_mask(&mut scores, [tile, keys], [first, count], window);
                    for key in (0..keys).step_by(2) {
                        let both = key * TILE..(key + 2) * TILE;
                        // SAFETY: the caller's contract.
                        unsafe {
                            score_gradients::<K>(
                                [&scores[both.clone()], &d_scores[both.clone()]],
                                scale,
                                &lse,
                                &delta,
                                [&mut p[both.clone()], &mut ds[both]],
                                &mut ds_words[key / K::PER_WORD * TILE..],
                            );
                        }
                    }
                    let left = |data| Words { data: words_of(data), stride: TILE / K::PER_WORD };
                    let right = |data| Words { data, stride: width };
                    let sizes = [keys, TILE / K::PER_WORD, width];
                    let sums = tile * width..(tile + keys) * width;
                    let (v_sums, k_sums) = (&mut v_sums[sums.clone()], &mut k_sums[sums]);
                    let first_word = tile / K::PER_WORD;
                    let k_left = Words { data: &k_transposed[first_word..], stride: key_words };
                    let ds_right = Words { data: &*ds_words, stride: TILE };
                    let q_sizes = [width, keys.div_ceil(K::PER_WORD), TILE];
                    // SAFETY: the caller's contract.
                    unsafe {
                        K::product::<true>(sizes, left(&*p), right(d_words), v_sums);
                        K::product::<true>(sizes, left(&*ds), right(q_words), k_sums);
                        K::product::<true>(q_sizes, k_left, ds_right, q_sums);
                    }
                    tile += TILE;
                }
                scale_columns(q_sums, &[scale; TILE]);
                #[expect(unsafe_code, reason = "tasks write to disjoint ranges")]
                // SAFETY: this head's queries belong to this task.
                unsafe {
                    rows.write_transposed(q_sums, count, dq);
                }
            }
        }
        for row in 0..length {
            let at = k_at + row * kv_heads * width;
            #[expect(unsafe_code, reason = "tasks write to disjoint ranges")]
            // SAFETY: this head's keys and values belong to this task.
            let (dk, dv) = unsafe { (dk.range(at..at + width), dv.range(at..at + width)) };
            for (dk, &sum) in dk.iter_mut().zip(&k_sums[row * width..]) {
                *dk = E::from_f32(sum * scale);
            }
            for (dv, &sum) in dv.iter_mut().zip(&v_sums[row * width..]) {
                *dv = E::from_f32(sum);
            }
        }
    }
}

/// Sets scores to −∞ where a query does not attend: keys after it, and keys beyond the window.
#[expect(clippy::inline_always, reason = "inlined into functions with target features")]
#[inline(always)]
fn apply_causal_mask(
    scores: &mut [f32; TILE * TILE],
    [tile, keys]: [usize; 2],
    [first, count]: [usize; 2],
    window: usize,
) {
    let is_unmasked = tile + keys <= first + 1 && first + count <= tile.saturating_add(window);
    if is_unmasked {
        return;
    }
    for key in 0..keys {
        // Query `i` attends to key `j` if j ≤ i < j + window.
        let start = (tile + key).saturating_sub(first).min(TILE);
        let end = (tile + key).saturating_add(window).saturating_sub(first).clamp(start, TILE);
        let row = &mut scores[key * TILE..][..TILE];
        row[..start].fill(f32::NEG_INFINITY);
        row[end..].fill(f32::NEG_INFINITY);
    }
}

/// The online softmax over tiles of keys, for each query of a tile.
///
/// # Source
/// Milakov, Gimelshein: Online normalizer calculation for softmax, arXiv 1805.02867, algorithm 3.
struct OnlineSoftmax {
    scale: f32,
    largest: [f32; TILE],
    total: [f32; TILE],
}

impl OnlineSoftmax {
    fn new(scale: f32) -> Self {
        Self { scale, largest: [f32::NEG_INFINITY; TILE], total: [0.0; TILE] }
    }

    /// Adds a tile of scores `[keys, queries]`: writes its probabilities as words of adjacent keys,
    /// and rescales `sums`, `[E, queries]`, to the new maximum.
    ///
    /// # Safety
    /// The CPU must support the kernel.
    #[expect(unsafe_code, reason = "needs certain CPU features")]
    #[expect(clippy::inline_always, reason = "inlined into functions with target features")]
    #[inline(always)]
    unsafe fn add<K: MicroKernel>(
        &mut self,
        scores: &[f32; TILE * TILE],
        words: &mut [u32; TILE * TILE],
        sums: &mut [f32],
    ) {
        let mut largest = [f32::NEG_INFINITY; TILE];
        for row in scores.chunks_exact(TILE) {
            for (largest, &score) in largest.iter_mut().zip(row) {
                *largest = if score > *largest { score } else { *largest };
            }
        }
        let mut correction = [1.0; TILE];
        let mut changed = false;
        for ((old, new), correction) in self.largest.iter_mut().zip(largest).zip(&mut correction) {
            let new = new * self.scale;
            // A query that has attended to nothing yet keeps its sums, which are zero.
            if new > *old {
                *correction = exp::<true>(*old - new);
                *old = new;
                changed = true;
            }
        }
        if changed {
            scale_columns(sums, &correction);
            for (total, correction) in self.total.iter_mut().zip(correction) {
                *total *= correction;
            }
        }
        // Masked scores are −∞; a query with only those subtracts 0 from them instead of −∞.
        let subtract = self.largest.map(|largest| if largest < f32::MIN { 0.0 } else { largest });
        let (scale, total) = (self.scale, &mut self.total);
        let words = words.chunks_exact_mut(2 * TILE / K::PER_WORD);
        for (rows, words) in scores.chunks_exact(2 * TILE).zip(words) {
            let (low, high) = rows.split_at(TILE);
            for lane in (0..TILE).step_by(LANES) {
                let (low, high) = (lanes(low, lane), lanes(high, lane));
                let subtract = lanes(&subtract, lane);
                let (mut p_low, mut p_high) = ([0.0; LANES], [0.0; LANES]);
                for query in 0..LANES {
                    p_low[query] = exp::<true>(low[query] * scale - subtract[query]);
                    p_high[query] = exp::<true>(high[query] * scale - subtract[query]);
                }
                for (total, (low, high)) in total[lane..].iter_mut().zip(p_low.iter().zip(p_high)) {
                    *total += low + high;
                }
                // SAFETY: the caller's contract.
                let p = unsafe { [K::round(&p_low), K::round(&p_high)] };
                store_words::<K>(&p, &mut words[lane..]);
            }
        }
    }

    /// Returns the logarithms of the denominators.
    fn logsumexp(&self) -> [f32; TILE] {
        std::array::from_fn(|query| self.largest[query] + self.total[query].ln())
    }
}

/// Multiplies each column of `[rows, TILE]` by its factor.
#[expect(clippy::inline_always, reason = "inlined into functions with target features")]
#[inline(always)]
fn scale_columns(matrix: &mut [f32], factors: &[f32; TILE]) {
    for row in matrix.chunks_exact_mut(TILE) {
        for (value, &factor) in row.iter_mut().zip(factors) {
            *value *= factor;
        }
    }
}

/// For two keys, computes probabilities `p` and score gradients `ds = p ∘ (dp − delta)`, the latter
/// also as words of adjacent keys.
///
/// # Safety
/// The CPU must support the kernel.
#[expect(unsafe_code, reason = "needs certain CPU features")]
#[expect(clippy::inline_always, reason = "inlined into functions with target features")]
#[inline(always)]
unsafe fn score_gradients<K: MicroKernel>(
    [scores, d_scores]: [&[f32]; 2],
    scale: f32,
    lse: &[f32; TILE],
    delta: &[f32; TILE],
    [p, ds]: [&mut [K::Number]; 2],
    words: &mut [u32],
) {
    for lane in (0..TILE).step_by(LANES) {
        let (lse, delta) = (lanes(lse, lane), lanes(delta, lane));
        let mut both = [[K::Number::default(); LANES]; 2];
        for (key, to) in [0, TILE].into_iter().zip(&mut both) {
            let (score, d_score) = (lanes(scores, key + lane), lanes(d_scores, key + lane));
            let (mut probability, mut d) = ([0.0; LANES], [0.0; LANES]);
            for query in 0..LANES {
                probability[query] = exp::<true>(score[query] * scale - lse[query]);
                d[query] = probability[query] * (d_score[query] - delta[query]);
            }
            // SAFETY: the caller's contract.
            let (probability, d) = unsafe { (K::round(&probability), K::round(&d)) };
            p[key + lane..][..LANES].copy_from_slice(&probability);
            ds[key + lane..][..LANES].copy_from_slice(&d);
            *to = d;
        }
        store_words::<K>(&both, &mut words[lane..]);
    }
}

#[expect(clippy::inline_always, reason = "inlined into functions with target features")]
#[inline(always)]
fn lanes(values: &[f32], first: usize) -> &[f32; LANES] {
    values[first..].first_chunk().expect("tiles are whole registers")
}

/// Stores two rows as words: in bf16 one row of pairs, in fp32 two rows.
#[expect(clippy::inline_always, reason = "inlined into functions with target features")]
#[inline(always)]
fn store_words<K: MicroKernel>(rows: &[[K::Number; LANES]; 2], to: &mut [u32]) {
    for (word, rows) in rows.chunks_exact(K::PER_WORD).enumerate() {
        interleave::<K::Number, K>(
            &rows[0],
            &rows[K::PER_WORD - 1],
            &mut to[word * TILE..][..LANES],
        );
    }
}
