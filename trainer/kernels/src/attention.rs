//! Causal attention of one segment and its gradient, tile by tile, without the matrix of scores.
//!
//! # Source
//! FlashAttention (arXiv 2205.14135), algorithms 1 and 4. Differs: query heads that share a key
//! head are computed together, so that keys are packed once and their gradients need no second
//! sum; scores are computed transposed, keys by queries, so that whatever belongs to a query is a
//! lane of a register and nothing is summed across lanes.

use std::{
    arch::x86_64::{
        __m256bh, __m256i, _mm256_storeu_si256, _mm512_cvtepu16_epi32, _mm512_cvtneps_pbh,
        _mm512_loadu_ps, _mm512_or_si512, _mm512_slli_epi32, _mm512_storeu_si512,
    },
    cell::RefCell,
};

use half::bf16;

use crate::{
    Element,
    exp::exp,
    gemm::{self, LANES, Pairs, product},
    pairs::{bits_of, pair_of, pairs_of},
    pool::{Pool, Shared},
    transpose::{SIDE, transpose, transpose_block},
};

/// Queries and keys of one tile: its scores, its probabilities and its four factors fit the first
/// caches.
const TILE: usize = 64;
/// Queries of one unit of the forward pass. Its keys are packed once for them.
const QUERIES: usize = 256;
/// The widest head there is room for.
const WIDEST: usize = 256;

/// The numbers attention needs beside its inputs.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Query heads, `H`.
    pub heads: usize,
    /// Key and value heads, `K`.
    pub kv_heads: usize,
    /// Width of a head, `E`.
    pub width: usize,
    /// How many positions back a query may look, itself included.
    pub window: usize,
}

/// Tells whether this processor can, for heads of a width.
pub fn is_supported(width: usize) -> bool {
    width.is_multiple_of(2 * LANES) && width <= WIDEST && gemm::is_supported()
}

/// Computes attention inside each segment.
///
/// # Shapes
/// `q` and `out` are `[T, H · E]`, `k` and `v` are `[T, K · E]`, all bf16; `logsumexp` is `[H, T]`.
/// `lengths` sum to `T` at most.
///
/// # Panics
/// If a size is wrong, or the processor cannot ([`is_supported`]).
pub fn forward(
    pool: &dyn Pool,
    shape: Shape,
    lengths: &[usize],
    [q, k, v]: [&[bf16]; 3],
    out: &mut [bf16],
    logsumexp: &mut [f32],
) {
    assert!(is_supported(shape.width), "heads of {}", shape.width);
    let positions = logsumexp.len() / shape.heads;
    let mut units = Vec::new();
    for (start, length) in starts(lengths) {
        for first in (0..length).step_by(QUERIES) {
            let queries = QUERIES.min(length - first);
            for kv_head in 0..shape.kv_heads {
                units.push(Unit { start, length, kv_head, first, queries });
            }
        }
    }
    // Long ones first, so that no thread is left with one at the end.
    units.sort_by_key(|unit| std::cmp::Reverse(unit.first + unit.queries));
    let (out, logsumexp) = (Shared::new(out), Shared::new(logsumexp));
    pool.run(units.len(), &|unit| {
        #[expect(unsafe_code, reason = "for certain processors")]
        // SAFETY: the processor was asked.
        BUFFERS.with_borrow_mut(|buffers| unsafe {
            units[unit].forward(shape, positions, [q, k, v], &out, &logsumexp, buffers);
        });
    });
}

/// What the forward pass left, and the gradient it is asked with.
#[derive(Debug, Clone, Copy)]
pub struct Attended<'a> {
    /// Its result, `[T, H · E]`.
    pub out: &'a [bf16],
    /// Its denominators' logarithms, `[H, T]`.
    pub logsumexp: &'a [f32],
    /// The gradient of `out`.
    pub d_out: &'a [bf16],
}

/// Writes the gradients of `q`, `k` and `v`.
///
/// # Shapes
/// As in [`forward`]; gradients are of their inputs' shapes.
///
/// # Panics
/// If a size is wrong, or the processor cannot ([`is_supported`]).
pub fn backward(
    pool: &dyn Pool,
    shape: Shape,
    lengths: &[usize],
    [q, k, v]: [&[bf16]; 3],
    attended: Attended<'_>,
    [dq, dk, dv]: [&mut [bf16]; 3],
) {
    assert!(is_supported(shape.width), "heads of {}", shape.width);
    let positions = attended.logsumexp.len() / shape.heads;
    let mut units: Vec<Unit> = starts(lengths)
        .flat_map(|(start, length)| {
            (0..shape.kv_heads).map(move |kv_head| Unit {
                start,
                length,
                kv_head,
                first: 0,
                queries: length,
            })
        })
        .collect();
    units.sort_by_key(|unit| std::cmp::Reverse(unit.length));
    let grads = [dq, dk, dv].map(Shared::new);
    pool.run(units.len(), &|unit| {
        #[expect(unsafe_code, reason = "for certain processors")]
        // SAFETY: the processor was asked.
        BUFFERS.with_borrow_mut(|buffers| unsafe {
            units[unit].backward(shape, positions, [q, k, v], attended, &grads, buffers);
        });
    });
}

/// Returns the first position and the length of each segment.
fn starts(lengths: &[usize]) -> impl Iterator<Item = (usize, usize)> {
    lengths.iter().scan(0, |next, &length| {
        let start = *next;
        *next += length;
        Some((start, length))
    })
}

/// What a unit works in.
///
/// Kept by each thread: fresh memory costs page faults, and freeing it stops the other threads.
#[derive(Default)]
struct Buffers {
    row_pairs: Vec<u32>,
    transposed: Vec<u32>,
    q_columns: Vec<u32>,
    q_pairs: Vec<u32>,
    d_columns: Vec<u32>,
    d_pairs: Vec<u32>,
    q_sums: Vec<f32>,
    k_sums: Vec<f32>,
    v_sums: Vec<f32>,
}

thread_local! {
    static BUFFERS: RefCell<Buffers> = RefCell::default();
}

/// Makes a buffer a number of zeros.
fn set_zero(buffer: &mut Vec<f32>, length: usize) {
    buffer.clear();
    buffer.resize(length, 0.0);
}

/// Some queries of a segment, in all heads that share a key head.
struct Unit {
    start: usize,
    length: usize,
    kv_head: usize,
    /// The first query, counted from the segment's start.
    first: usize,
    queries: usize,
}

impl Unit {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn forward(
        &self,
        shape: Shape,
        positions: usize,
        [q, k, v]: [&[bf16]; 3],
        out: &Shared<'_, bf16>,
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
        let k_pairs = pairs_of(&k[kv_rows.start * kv_rows.stride + kv_rows.column..]);
        let k_stride = kv_rows.stride / 2;
        let Buffers { row_pairs, transposed, q_sums: sums, q_columns, .. } = buffers;
        kv_rows.pack_pairs(v, end - lowest, keys, row_pairs);
        transpose(row_pairs, [keys / 2, width], transposed); // [E, keys/2]
        let mut scores = [0.0; TILE * TILE]; // [keys, queries]
        let mut p_pairs = [0_u32; TILE / 2 * TILE];
        for head in self.kv_head * (heads / kv_heads)..(self.kv_head + 1) * (heads / kv_heads) {
            for first in (self.first..end).step_by(TILE) {
                let count = TILE.min(end - first);
                let rows = Rows {
                    start: self.start + first,
                    stride: heads * width,
                    column: head * width,
                    width,
                };
                rows.pack_columns(q, count, q_columns);
                let mut softmax = OnlineSoftmax::new(scale);
                set_zero(sums, width * TILE); // [E, queries]
                let mut tile = (first + 1).saturating_sub(window) / TILE * TILE;
                while tile < first + count {
                    let keys_here = TILE.min(self.length - tile);
                    let left = &k_pairs[(tile - lowest) * k_stride..];
                    product::<false>(
                        [keys_here, width / 2, TILE],
                        Pairs { data: left, stride: k_stride },
                        Pairs { data: q_columns, stride: TILE },
                        &mut scores,
                    );
                    scores[keys_here * TILE..].fill(f32::NEG_INFINITY);
                    hide(&mut scores, [tile, keys_here], [first, count], window);
                    softmax.add(&scores, &mut p_pairs, sums);
                    product::<true>(
                        [width, TILE / 2, TILE],
                        Pairs { data: &transposed[(tile - lowest) / 2..], stride: keys / 2 },
                        Pairs { data: &p_pairs, stride: TILE },
                        sums,
                    );
                    tile += TILE;
                }
                let at = head * positions + self.start + first;
                #[expect(unsafe_code, reason = "units write side by side")]
                // SAFETY: these queries of this head belong to this unit.
                let lse = unsafe { logsumexp.range(at..at + count) };
                lse.copy_from_slice(&softmax.logsumexp()[..count]);
                scale_columns(sums, &softmax.total.map(|total| 1.0 / total));
                #[expect(unsafe_code, reason = "units write side by side")]
                // SAFETY: as above.
                unsafe {
                    rows.write_transposed(sums, count, out);
                }
            }
        }
    }

    #[expect(clippy::too_many_lines, reason = "one loop nest whose parts share a dozen buffers")]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn backward(
        &self,
        shape: Shape,
        positions: usize,
        [q, k, v]: [&[bf16]; 3],
        attended: Attended<'_>,
        [dq, dk, dv]: &[Shared<'_, bf16>; 3],
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
        let k_stride = kv_heads * width / 2;
        let (k_pairs, v_pairs) = (pairs_of(&k[k_at..]), pairs_of(&v[k_at..]));
        let Buffers { row_pairs, transposed: k_transposed, k_sums, v_sums, q_sums, .. } = buffers;
        let Buffers { q_columns, q_pairs, d_columns, d_pairs, .. } = buffers;
        k_rows.pack_pairs(k, length, padded, row_pairs);
        transpose(row_pairs, [padded / 2, width], k_transposed); // [E, padded/2]
        set_zero(k_sums, padded * width);
        set_zero(v_sums, padded * width);
        let (mut scores, mut d_scores) = ([0.0; TILE * TILE], [0.0; TILE * TILE]);
        let (mut p, mut ds) = ([bf16::ZERO; TILE * TILE], [bf16::ZERO; TILE * TILE]);
        let mut ds_pairs = [0_u32; TILE / 2 * TILE];
        for head in self.kv_head * (heads / kv_heads)..(self.kv_head + 1) * (heads / kv_heads) {
            for first in (0..length).step_by(TILE) {
                let count = TILE.min(length - first);
                let rows = Rows {
                    start: self.start + first,
                    stride: heads * width,
                    column: head * width,
                    width,
                };
                rows.pack_columns(q, count, q_columns);
                rows.pack_pairs(q, count, TILE, q_pairs);
                rows.pack_columns(attended.d_out, count, d_columns);
                rows.pack_pairs(attended.d_out, count, TILE, d_pairs);
                // Queries past the end get probability 0.
                let (mut lse, mut delta) = ([f32::INFINITY; TILE], [0.0; TILE]);
                let at = head * positions + self.start + first;
                lse[..count].copy_from_slice(&attended.logsumexp[at..at + count]);
                for (row, delta) in delta[..count].iter_mut().enumerate() {
                    let (d_out, out) = (rows.row(attended.d_out, row), rows.row(attended.out, row));
                    *delta = crate::sum::of_pairs(d_out, out, |d_out, out| d_out * out);
                }
                set_zero(q_sums, width * TILE); // transposed
                let mut tile = (first + 1).saturating_sub(window) / TILE * TILE;
                while tile < first + count {
                    let keys = TILE.min(length - tile);
                    let of_tile = tile * k_stride..;
                    let sizes = [keys, width / 2, TILE];
                    let columns = |data| Pairs { data, stride: TILE };
                    product::<false>(
                        sizes,
                        Pairs { data: &k_pairs[of_tile.clone()], stride: k_stride },
                        columns(q_columns),
                        &mut scores,
                    );
                    product::<false>(
                        sizes,
                        Pairs { data: &v_pairs[of_tile], stride: k_stride },
                        columns(d_columns),
                        &mut d_scores,
                    );
                    scores[keys * TILE..].fill(f32::NEG_INFINITY);
                    hide(&mut scores, [tile, keys], [first, count], window);
                    for key in (0..keys).step_by(2) {
                        gradients_of_scores(
                            [
                                &scores[key * TILE..][..2 * TILE],
                                &d_scores[key * TILE..][..2 * TILE],
                            ],
                            scale,
                            &lse,
                            &delta,
                            [&mut p[key * TILE..][..2 * TILE], &mut ds[key * TILE..][..2 * TILE]],
                            &mut ds_pairs[key / 2 * TILE..][..TILE],
                        );
                    }
                    let left = |data| Pairs { data: pairs_of(data), stride: TILE / 2 };
                    let right = |data| Pairs { data, stride: width };
                    let sizes = [keys, TILE / 2, width];
                    let sums = tile * width..(tile + keys) * width;
                    product::<true>(sizes, left(&p), right(d_pairs), &mut v_sums[sums.clone()]);
                    product::<true>(sizes, left(&ds), right(q_pairs), &mut k_sums[sums]);
                    let left = Pairs { data: &k_transposed[tile / 2..], stride: padded / 2 };
                    let right = Pairs { data: &ds_pairs, stride: TILE };
                    product::<true>([width, keys.div_ceil(2), TILE], left, right, q_sums);
                    tile += TILE;
                }
                scale_columns(q_sums, &[scale; TILE]);
                #[expect(unsafe_code, reason = "units write side by side")]
                // SAFETY: this head's queries belong to this unit.
                unsafe {
                    rows.write_transposed(q_sums, count, dq);
                }
            }
        }
        for row in 0..length {
            let at = k_at + row * kv_heads * width;
            #[expect(unsafe_code, reason = "units write side by side")]
            // SAFETY: this head's keys and values belong to this unit.
            let (dk, dv) = unsafe { (dk.range(at..at + width), dv.range(at..at + width)) };
            for (dk, &sum) in dk.iter_mut().zip(&k_sums[row * width..]) {
                *dk = Element::from_f32(sum * scale);
            }
            for (dv, &sum) in dv.iter_mut().zip(&v_sums[row * width..]) {
                *dv = Element::from_f32(sum);
            }
        }
    }
}

/// Hides the scores of keys that queries must not see: those after them, and those beyond the window.
#[expect(clippy::inline_always, reason = "compiled with its caller's instructions")]
#[inline(always)]
fn hide(
    scores: &mut [f32; TILE * TILE],
    [tile, keys]: [usize; 2],
    [first, count]: [usize; 2],
    window: usize,
) {
    let all_see_all = tile + keys <= first + 1 && first + count <= tile.saturating_add(window);
    if all_see_all {
        return;
    }
    for key in 0..keys {
        // Query `i` sees key `j` if j ≤ i < j + window.
        let start = (tile + key).saturating_sub(first).min(TILE);
        let end = (tile + key).saturating_add(window).saturating_sub(first).clamp(start, TILE);
        let row = &mut scores[key * TILE..][..TILE];
        row[..start].fill(f32::NEG_INFINITY);
        row[end..].fill(f32::NEG_INFINITY);
    }
}

/// The softmax over keys that come tile by tile, for each query of a tile.
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

    /// Takes a tile of scores `[keys, queries]`: writes its probabilities in pairs of keys and
    /// brings `sums`, `[E, queries]`, to their scale.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    #[inline]
    fn add(
        &mut self,
        scores: &[f32; TILE * TILE],
        pairs: &mut [u32; TILE / 2 * TILE],
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
            // A query that has seen nothing yet keeps its sums, which are zero.
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
        // Hidden scores are -∞; a query that sees nothing subtracts 0, not -∞, from them.
        let subtract = self.largest.map(|largest| if largest < f32::MIN { 0.0 } else { largest });
        let (scale, total) = (self.scale, &mut self.total);
        for (rows, pairs) in scores.chunks_exact(2 * TILE).zip(pairs.chunks_exact_mut(TILE)) {
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
                store_pairs(rounded(&p_low), rounded(&p_high), &mut pairs[lane..]);
            }
        }
    }

    /// Returns the logarithm of the denominators.
    fn logsumexp(&self) -> [f32; TILE] {
        std::array::from_fn(|query| self.largest[query] + self.total[query].ln())
    }
}

/// Multiplies each column of `[rows, TILE]` by its factor.
#[expect(clippy::inline_always, reason = "compiled with its caller's instructions")]
#[inline(always)]
fn scale_columns(matrix: &mut [f32], factors: &[f32; TILE]) {
    for row in matrix.chunks_exact_mut(TILE) {
        for (value, &factor) in row.iter_mut().zip(factors) {
            *value *= factor;
        }
    }
}

/// For two keys: probabilities `p`, `ds = p ∘ (dp − delta)`, and the latter once more as pairs.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
#[inline]
fn gradients_of_scores(
    [scores, d_scores]: [&[f32]; 2],
    scale: f32,
    lse: &[f32; TILE],
    delta: &[f32; TILE],
    [p, ds]: [&mut [bf16]; 2],
    pairs: &mut [u32],
) {
    for lane in (0..TILE).step_by(LANES) {
        let (lse, delta) = (lanes(lse, lane), lanes(delta, lane));
        let both = [0, TILE].map(|key| {
            let (score, d_score) = (lanes(scores, key + lane), lanes(d_scores, key + lane));
            let (mut probability, mut d) = ([0.0; LANES], [0.0; LANES]);
            for query in 0..LANES {
                probability[query] = exp::<true>(score[query] * scale - lse[query]);
                d[query] = probability[query] * (d_score[query] - delta[query]);
            }
            let d = rounded(&d);
            store(rounded(&probability), &mut p[key + lane..]);
            store(d, &mut ds[key + lane..]);
            d
        });
        store_pairs(both[0], both[1], &mut pairs[lane..]);
    }
}

#[expect(clippy::inline_always, reason = "compiled with its caller's instructions")]
#[inline(always)]
fn lanes(values: &[f32], first: usize) -> &[f32; LANES] {
    values[first..].first_chunk().expect("tiles are whole registers")
}

/// Rounds to nearest, ties to even.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
#[inline]
fn rounded(values: &[f32; LANES]) -> __m256i {
    #[expect(unsafe_code, reason = "reads a register; the same 256 bits under another name")]
    // SAFETY: there are 16 values.
    unsafe {
        let rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(values.as_ptr()));
        std::mem::transmute::<__m256bh, __m256i>(rounded)
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
#[inline]
fn store(values: __m256i, to: &mut [bf16]) {
    let to = &mut to[..LANES];
    #[expect(unsafe_code, reason = "writes a register")]
    // SAFETY: there is room for 16 values.
    unsafe {
        _mm256_storeu_si256(to.as_mut_ptr().cast(), values);
    }
}

/// Stores pairs of two rows' neighbours, the first in the low half.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
#[inline]
fn store_pairs(low: __m256i, high: __m256i, to: &mut [u32]) {
    let to = &mut to[..LANES];
    let high = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(high));
    #[expect(unsafe_code, reason = "writes a register")]
    // SAFETY: there is room for 16 pairs.
    unsafe {
        _mm512_storeu_si512(
            to.as_mut_ptr().cast(),
            _mm512_or_si512(_mm512_cvtepu16_epi32(low), high),
        );
    }
}

/// The rows of one head in a matrix that holds all heads side by side.
struct Rows {
    start: usize,
    stride: usize,
    column: usize,
    width: usize,
}

#[expect(clippy::inline_always, reason = "compiled with its caller's instructions")]
impl Rows {
    #[inline(always)]
    fn row<'a>(&self, from: &'a [bf16], row: usize) -> &'a [bf16] {
        &from[(self.start + row) * self.stride + self.column..][..self.width]
    }

    /// Packs up to [`TILE`] rows as columns of pairs, `[E/2, TILE]`; what is missing is zero.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    #[inline]
    fn pack_columns(&self, from: &[bf16], count: usize, to: &mut Vec<u32>) {
        to.clear();
        to.resize(self.width / 2 * TILE, 0);
        let pairs = pairs_of(&from[self.start * self.stride + self.column..]);
        for row in (0..count).step_by(SIDE) {
            for column in (0..self.width / 2).step_by(SIDE) {
                transpose_block(
                    &pairs[row * self.stride / 2 + column..],
                    self.stride / 2,
                    SIDE.min(count - row),
                    &mut to[column * TILE + row..],
                    TILE,
                );
            }
        }
    }

    /// Packs each two rows as pairs, `[padded/2, E]`; what is missing is zero.
    #[inline(always)]
    fn pack_pairs(&self, from: &[bf16], count: usize, padded: usize, to: &mut Vec<u32>) {
        to.clear();
        to.resize(padded / 2 * self.width, 0);
        for (pair, to) in to.chunks_exact_mut(self.width).enumerate().take(count.div_ceil(2)) {
            let low = self.row(from, 2 * pair);
            if 2 * pair + 1 < count {
                let high = self.row(from, 2 * pair + 1);
                for ((to, &low), &high) in to.iter_mut().zip(low).zip(high) {
                    *to = pair_of(low, high);
                }
            } else {
                for (to, &low) in to.iter_mut().zip(low) {
                    *to = pair_of(low, bf16::ZERO);
                }
            }
        }
    }

    /// Rounds the columns of `[E, TILE]` to rows of a matrix.
    ///
    /// # Safety
    /// No other unit may touch those rows of this head.
    #[expect(unsafe_code, reason = "see above")]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    #[inline]
    unsafe fn write_transposed(&self, columns: &[f32], count: usize, to: &Shared<'_, bf16>) {
        let mut block = [0_u32; SIDE * SIDE];
        for row in (0..count).step_by(SIDE) {
            for column in (0..self.width).step_by(SIDE) {
                transpose_block(
                    bits_of(&columns[column * TILE + row..]),
                    TILE,
                    SIDE,
                    &mut block,
                    SIDE,
                );
                for (index, values) in block.chunks_exact(SIDE).enumerate().take(count - row) {
                    let at = (self.start + row + index) * self.stride + self.column + column;
                    // SAFETY: the caller's.
                    let to = unsafe { to.range(at..at + SIDE) };
                    for (to, &value) in to.iter_mut().zip(values) {
                        *to = Element::from_f32(f32::from_bits(value));
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::{Attended, Shape, backward, forward, is_supported};
    use crate::{
        pool::Serial,
        testing::{assert_close, numbers, rounded},
    };

    /// The formulas in f64: result, and gradients of q, k and v.
    fn exact(shape: Shape, lengths: &[usize], [q, k, v, d_out]: [&[bf16]; 4]) -> [Vec<f64>; 4] {
        let Shape { heads, kv_heads, width, window } = shape;
        let [mut out, mut dq] = [vec![0.0; q.len()], vec![0.0; q.len()]];
        let [mut dk, mut dv] = [vec![0.0; k.len()], vec![0.0; k.len()]];
        let scale = 1.0 / (width as f64).sqrt();
        let mut start = 0;
        for &length in lengths {
            for head in 0..heads {
                let kv_head = head / (heads / kv_heads);
                let q_at = |i: usize| ((start + i) * heads + head) * width;
                let k_at = |j: usize| ((start + j) * kv_heads + kv_head) * width;
                let dot = |a: &[bf16], b: &[bf16]| -> f64 {
                    a[..width].iter().zip(b).map(|(a, b)| a.to_f64() * b.to_f64()).sum()
                };
                for i in 0..length {
                    let keys = (i + 1).saturating_sub(window)..i + 1;
                    let weights: Vec<f64> = keys
                        .clone()
                        .map(|j| (dot(&q[q_at(i)..], &k[k_at(j)..]) * scale).exp())
                        .collect();
                    let total: f64 = weights.iter().sum();
                    let dp: Vec<f64> =
                        keys.clone().map(|j| dot(&d_out[q_at(i)..], &v[k_at(j)..])).collect();
                    let delta: f64 = weights.iter().zip(&dp).map(|(w, dp)| w / total * dp).sum();
                    for ((j, weight), dp) in keys.zip(&weights).zip(&dp) {
                        let p = weight / total;
                        let ds = p * (dp - delta) * scale;
                        for e in 0..width {
                            out[q_at(i) + e] += p * v[k_at(j) + e].to_f64();
                            dq[q_at(i) + e] += ds * k[k_at(j) + e].to_f64();
                            dk[k_at(j) + e] += ds * q[q_at(i) + e].to_f64();
                            dv[k_at(j) + e] += p * d_out[q_at(i) + e].to_f64();
                        }
                    }
                }
            }
            start += length;
        }
        [out, dq, dk, dv]
    }

    fn check(shape: Shape, lengths: &[usize]) {
        let positions: usize = lengths.iter().sum();
        let of = |heads: usize, factor: f32, seed| {
            let values = numbers(positions * heads * shape.width, seed);
            rounded(&values.iter().map(|value| factor * value).collect::<Vec<_>>())
        };
        let (q, k) = (of(shape.heads, 2.0, 1), of(shape.kv_heads, 2.0, 2));
        let (v, d_out) = (of(shape.kv_heads, 1.0, 3), of(shape.heads, 1.0, 4));
        let [out, dq, dk, dv] = exact(shape, lengths, [&q, &k, &v, &d_out]);
        let mut found = vec![bf16::NAN; q.len()];
        let mut logsumexp = vec![f32::NAN; positions * shape.heads];
        forward(&Serial, shape, lengths, [&q, &k, &v], &mut found, &mut logsumexp);
        let wide = |values: &[bf16]| values.iter().map(|value| value.to_f32()).collect::<Vec<_>>();
        // bf16 has 8 bits: results, and probabilities on the way, are off by 1/512 each.
        assert_close(&wide(&found), &out, 1.0 / 128.0);
        let mut grads = [q.len(), k.len(), v.len()].map(|length| vec![bf16::NAN; length]);
        let attended = Attended { out: &found, logsumexp: &logsumexp, d_out: &d_out };
        let [a, b, c] = &mut grads;
        backward(&Serial, shape, lengths, [&q, &k, &v], attended, [a, b, c]);
        for (found, exact) in grads.iter().zip([dq, dk, dv]) {
            assert_close(&wide(found), &exact, 1.0 / 64.0);
        }
    }

    #[test]
    fn follows_the_formula_for_all_shapes_of_heads_and_lengths() {
        if !is_supported(64) {
            eprintln!("skipped: this processor has no AVX512-BF16");
            return;
        }
        let all = usize::MAX;
        for (heads, kv_heads, width, window, lengths) in [
            (1, 1, 32, all, &[1][..]),
            (2, 2, 64, all, &[64]),
            (3, 1, 64, all, &[5, 63, 65, 1, 2]),
            (6, 2, 32, all, &[130, 17]),
            (1, 1, 128, all, &[300]),
            (1, 1, 256, all, &[70]),
            (2, 1, 32, 2, &[66]),
            (2, 1, 32, 5, &[150]),
            (2, 1, 32, 64, &[200]),
            (2, 1, 32, 100, &[300, 3]),
        ] {
            check(Shape { heads, kv_heads, width, window }, lengths);
        }
    }
}
