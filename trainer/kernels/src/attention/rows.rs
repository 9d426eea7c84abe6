//! The rows of one head, and how they are packed into operands.

use super::MAX_HEAD_DIM;
use crate::{
    Element,
    aligned::Buffer,
    gemm::{MicroKernel, Words, interleave, words_of, write_words},
    pool::Shared,
    transpose::{BLOCK_SIDE, transpose_block},
};

/// Queries and keys of one tile: its scores, its probabilities and their four factors fit in the L1
/// and L2 caches.
pub(super) const TILE: usize = 64;

/// The rows of one head in a matrix that holds all heads side by side.
pub(super) struct Rows {
    /// The first row.
    pub start: usize,
    /// The distance of rows, in elements.
    pub stride: usize,
    /// The head's first column.
    pub column: usize,
    /// The width of the head.
    pub width: usize,
}

#[expect(clippy::inline_always, reason = "inlined into functions with target features")]
impl Rows {
    #[inline(always)]
    pub(super) fn row<'a, E>(&self, from: &'a [E], row: usize) -> &'a [E] {
        &from[(self.start + row) * self.stride + self.column..][..self.width]
    }

    /// Returns rows as words, in place if they can be read as such.
    #[inline(always)]
    pub(super) fn words<'a, E: Element, K: MicroKernel>(
        &self,
        from: &'a [E],
        count: usize,
        packed: &'a mut Buffer<u32>,
    ) -> Words<'a> {
        if K::reads::<E>() {
            let data = words_of(&from[self.start * self.stride + self.column..]);
            return Words { data, stride: self.stride / K::PER_WORD };
        }
        packed.grow(count * self.width / K::PER_WORD);
        for (row, to) in packed.chunks_exact_mut(self.width / K::PER_WORD).enumerate().take(count) {
            write_words::<E, K>(self.row(from, row), to);
        }
        Words { data: packed, stride: self.width / K::PER_WORD }
    }

    /// Packs up to [`TILE`] rows as columns of words, `[words, TILE]`; missing rows are zero.
    ///
    /// # Safety
    /// The CPU must support the kernel.
    #[expect(unsafe_code, reason = "needs certain CPU features")]
    #[inline(always)]
    pub(super) unsafe fn pack_columns<E: Element, K: MicroKernel>(
        &self,
        from: &[E],
        count: usize,
        to: &mut Buffer<u32>,
    ) {
        let width = self.width / K::PER_WORD;
        to.set_zero(width * TILE);
        let mut block = [0; BLOCK_SIDE * BLOCK_SIDE];
        for row in (0..count).step_by(BLOCK_SIDE) {
            let rows = BLOCK_SIDE.min(count - row);
            for column in (0..width).step_by(BLOCK_SIDE) {
                let to = &mut to[column * TILE + row..];
                if K::reads::<E>() {
                    let at = (self.start + row) * self.stride + self.column;
                    let from = &words_of(&from[at..])[column..];
                    // SAFETY: the caller's contract.
                    unsafe { transpose_block(from, self.stride / K::PER_WORD, rows, to, TILE) };
                } else {
                    for (index, block) in block.chunks_exact_mut(BLOCK_SIDE).enumerate().take(rows)
                    {
                        let from = &self.row(from, row + index)[column * K::PER_WORD..];
                        write_words::<E, K>(from, block);
                    }
                    // SAFETY: the caller's contract.
                    unsafe { transpose_block(&block, BLOCK_SIDE, rows, to, TILE) };
                }
            }
        }
    }

    /// Packs adjacent rows as words, `[words, E]`; missing rows are zero.
    #[inline(always)]
    pub(super) fn pack_words<E: Element, K: MicroKernel>(
        &self,
        from: &[E],
        count: usize,
        padded: usize,
        to: &mut Buffer<u32>,
    ) {
        to.set_zero(padded / K::PER_WORD * self.width);
        let zeros = [E::default(); MAX_HEAD_DIM];
        for (word, to) in to.chunks_exact_mut(self.width).enumerate() {
            let first = word * K::PER_WORD;
            if first >= count {
                break;
            }
            let second = first + K::PER_WORD - 1;
            let second = if second < count { self.row(from, second) } else { &zeros };
            interleave::<E, K>(self.row(from, first), second, to);
        }
    }

    /// Rounds the columns of `[E, TILE]` and stores them as rows of a matrix.
    ///
    /// # Safety
    /// No other task may access those rows of this head, and the CPU must support the kernel.
    #[expect(unsafe_code, reason = "see above")]
    #[inline(always)]
    pub(super) unsafe fn write_transposed<E: Element>(
        &self,
        columns: &[f32],
        count: usize,
        to: &Shared<'_, E>,
    ) {
        let mut block = [0_u32; BLOCK_SIDE * BLOCK_SIDE];
        for row in (0..count).step_by(BLOCK_SIDE) {
            for column in (0..self.width).step_by(BLOCK_SIDE) {
                let from = words_of(&columns[column * TILE + row..]);
                // SAFETY: the caller's contract.
                unsafe { transpose_block(from, TILE, BLOCK_SIDE, &mut block, BLOCK_SIDE) };
                for (index, values) in block.chunks_exact(BLOCK_SIDE).enumerate().take(count - row)
                {
                    let at = (self.start + row + index) * self.stride + self.column + column;
                    // SAFETY: the caller's contract.
                    let to = unsafe { to.range(at..at + BLOCK_SIDE) };
                    for (to, &value) in to.iter_mut().zip(values) {
                        *to = E::from_f32(f32::from_bits(value));
                    }
                }
            }
        }
    }
}
