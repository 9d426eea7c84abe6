//! Packs rows of a head into tiles, in chunks of [`SIDE`] rows; rows past the last are zero.

use std::arch::x86_64::{
    __m512i, _mm512_loadu_si512, _mm512_permutex2var_epi16, _mm512_setzero_si512,
    _mm512_storeu_si512,
};

use half::bf16;

use crate::{
    aligned::Buffer,
    amx::square::{SIDE, Tiles},
    attention::{MAX_HEAD_DIM, rows::Rows},
    gemm::words_of,
    transpose::{BLOCK_SIDE, transpose_block},
};

/// Words of a tile.
const TILE: usize = BLOCK_SIDE * BLOCK_SIDE;

/// Rows as they are: a left operand whose depth is the width, or its transpose as a right operand.
#[derive(Default)]
pub(super) struct Packed {
    words: Buffer<u32>,
    /// The width of a row, in elements.
    width: usize,
}

impl Packed {
    /// Copies rows, `[rows, E]`.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub(super) fn copy(&mut self, rows: &Rows, from: &[bf16], count: usize) {
        self.resize(rows.width, count);
        let words = rows.width / 2;
        for (row, to) in self.words.chunks_exact_mut(words).enumerate() {
            if row < count {
                to.copy_from_slice(words_of(rows.row(from, row)));
            } else {
                to.fill(0);
            }
        }
    }

    /// Transposes rows: for each 16 rows `[E / 2, 16]`, where words are pairs along the width.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub(super) fn transpose(&mut self, rows: &Rows, from: &[bf16], count: usize) {
        self.resize(rows.width, count);
        let words = rows.width / 2;
        for (block, to) in self.words.chunks_exact_mut(words * BLOCK_SIDE).enumerate() {
            let first = block * BLOCK_SIDE;
            if first >= count {
                to.fill(0);
                continue;
            }
            let from = words_of(&from[(rows.start + first) * rows.stride + rows.column..]);
            for (column, to) in to.chunks_exact_mut(TILE).enumerate() {
                let from = &from[column * BLOCK_SIDE..];
                let count = BLOCK_SIDE.min(count - first);
                transpose_block(from, rows.stride / 2, count, to, BLOCK_SIDE);
            }
        }
    }

    /// Packs pairs of adjacent rows: for each chunk `[E / 16, 16 pairs, 16]`.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub(super) fn pair(&mut self, rows: &Rows, from: &[bf16], count: usize) {
        self.resize(rows.width, count);
        let zeros = [bf16::ZERO; MAX_HEAD_DIM];
        let row = |row: usize| if row < count { rows.row(from, row) } else { &zeros };
        for (chunk, to) in self.words.chunks_exact_mut(SIDE / 2 * rows.width).enumerate() {
            for pair in 0..SIDE / 2 {
                let first = chunk * SIDE + 2 * pair;
                let (first, second) = (row(first), row(first + 1));
                for column in (0..rows.width).step_by(SIDE) {
                    let at = column / BLOCK_SIDE * TILE + pair * BLOCK_SIDE;
                    let [low, high] = interleave(&first[column..], &second[column..]);
                    store(&mut to[at..], low);
                    store(&mut to[at + TILE..], high);
                }
            }
        }
    }

    /// Packs columns: for each chunk `[E, 16]`, where words are pairs of adjacent rows.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub(super) fn pair_columns(&mut self, rows: &Rows, from: &[bf16], count: usize) {
        self.pair(rows, from, count);
        let mut transposed = [0; TILE];
        for tile in self.words.chunks_exact_mut(TILE) {
            transpose_block(tile, BLOCK_SIDE, BLOCK_SIDE, &mut transposed, BLOCK_SIDE);
            tile.copy_from_slice(&transposed);
        }
    }

    fn resize(&mut self, width: usize, count: usize) {
        self.width = width;
        self.words.grow(count.next_multiple_of(SIDE) * width / 2);
    }

    /// Returns a chunk of [`Self::copy`] as a left operand with the width as its depth.
    pub(super) fn rows(&self, chunk: usize) -> Tiles<'_> {
        let stride = self.width / 2;
        let data = &self.words[chunk * SIDE * stride..];
        Tiles { data, stride, second: BLOCK_SIDE * stride, step: BLOCK_SIDE }
    }

    /// Returns a chunk of [`Self::transpose`] as a right operand with the width as its depth.
    pub(super) fn columns(&self, chunk: usize) -> Tiles<'_> {
        let block = BLOCK_SIDE * self.width / 2;
        let data = &self.words[chunk * 2 * block..];
        Tiles { data, stride: BLOCK_SIDE, second: block, step: TILE }
    }

    /// Returns [`SIDE`] columns of [`Self::pair`], from a chunk on, as a right operand with the rows
    /// as its depth; or of [`Self::pair_columns`], as a left operand.
    pub(super) fn pairs(&self, chunk: usize, column: usize) -> Tiles<'_> {
        let step = SIDE / 2 * self.width;
        let data = &self.words[chunk * step + column / BLOCK_SIDE * TILE..];
        Tiles { data, stride: BLOCK_SIDE, second: TILE, step }
    }
}

/// Returns rounded chunks as an operand whose depth is their number.
pub(super) fn tiles(data: &[u32]) -> Tiles<'_> {
    Tiles { data, stride: BLOCK_SIDE, second: TILE, step: 2 * TILE }
}

/// Returns the words of 32 columns of two rows.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn interleave(first: &[bf16], second: &[bf16]) -> [__m512i; 2] {
    /// Elements `first, first + 1, …` of the first register, each before that of the second.
    const fn order(first: u16) -> [u16; SIDE] {
        let mut order = [0; SIDE];
        let mut index = 0;
        while index < SIDE {
            order[index] = first + index as u16 / 2 + if index % 2 == 0 { 0 } else { 32 };
            index += 1;
        }
        order
    }
    static ORDERS: [[u16; SIDE]; 2] = [order(0), order(16)];
    let (first, second) = (load(first), load(second));
    let mut both = [_mm512_setzero_si512(); 2];
    for (to, order) in both.iter_mut().zip(&ORDERS) {
        #[expect(unsafe_code, reason = "reads a register")]
        // SAFETY: an array of its size.
        let order = unsafe { _mm512_loadu_si512(order.as_ptr().cast()) };
        *to = _mm512_permutex2var_epi16(first, order, second);
    }
    both
}

#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn load(from: &[bf16]) -> __m512i {
    assert!(from.len() >= SIDE);
    #[expect(unsafe_code, reason = "reads a register")]
    // SAFETY: inside the slice, as asserted.
    unsafe {
        _mm512_loadu_si512(from.as_ptr().cast())
    }
}

#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn store(to: &mut [u32], words: __m512i) {
    assert!(to.len() >= BLOCK_SIDE);
    #[expect(unsafe_code, reason = "writes a register")]
    // SAFETY: inside the slice, as asserted.
    unsafe {
        _mm512_storeu_si512(to.as_mut_ptr().cast(), words);
    }
}
