//! Small matrix products with fp32 sums, out of registers and the first caches; larger ones are made
//! of their tiles (`matmul`).
//!
//! # Source
//! The blocking is the usual one for outer products in registers (Goto, van de Geijn: Anatomy of
//! High-Performance Matrix Multiplication, 2008); VDPBF16PS multiplies pairs of neighbours.

use std::arch::x86_64::{
    __m256bh, __m512, __m512bh, __m512i, _mm512_castsi512_ps, _mm512_cvtneps_pbh, _mm512_dpbf16_ps,
    _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_set1_epi32, _mm512_setzero_ps,
    _mm512_storeu_ps,
};

use half::bf16;

use crate::{Element, versions::Level};

/// Elements of one register.
pub(crate) const LANES: usize = 16;
/// Rows of one register tile: with two registers each, sums fill half of the registers, with three,
/// what a register of the right side is read for hides its reading.
pub(crate) const ROWS: usize = 8;

/// What tiles multiply: words of 32 bits, of one number or of two that are neighbours along the depth.
pub trait Multiplied: Element {
    /// The numbers of a word.
    const PER_WORD: usize;

    /// Tells whether this processor can.
    fn is_supported() -> bool;

    /// Joins neighbours, the first in the low half; a word of one has no second.
    fn word(first: Self, second: Self) -> u32;

    /// Adds the products of words.
    ///
    /// # Safety
    /// The processor can.
    #[expect(unsafe_code, reason = "for certain processors")]
    unsafe fn multiply_add(sum: __m512, left: __m512i, right: __m512i) -> __m512;

    /// Rounds a register of numbers.
    ///
    /// # Safety
    /// The processor can.
    #[expect(unsafe_code, reason = "for certain processors")]
    unsafe fn round(values: &[f32; LANES]) -> [Self; LANES];

    /// Computes as many of a tile's rows as there are instructions for, and returns how many.
    ///
    /// # Safety
    /// All of the tile's places must exist, and the processor can.
    #[expect(unsafe_code, reason = "for certain processors")]
    unsafe fn compute_some<const W: usize, const ADD: bool>(tile: &Tile, rows: usize) -> usize;

    /// Writes a small product to `c`, or adds it; sizes are rows, words and columns.
    ///
    /// # Safety
    /// The processor can.
    #[expect(unsafe_code, reason = "for certain processors")]
    unsafe fn product<const ADD: bool>(
        sizes: [usize; 3],
        left: Words<'_>,
        right: Words<'_>,
        c: &mut [f32],
    );
}

/// Views numbers as words.
///
/// # Panics
/// If they do not start where a word may.
pub(crate) fn words_of<E: Multiplied>(values: &[E]) -> &[u32] {
    const { assert!(size_of::<E>() * E::PER_WORD == size_of::<u32>()) };
    assert!(values.as_ptr().addr().is_multiple_of(align_of::<u32>()));
    #[expect(unsafe_code, reason = "numbers under another name")]
    // SAFETY: aligned as asserted, inside the slice, and any bits are a u32.
    unsafe {
        std::slice::from_raw_parts(values.as_ptr().cast(), values.len() / E::PER_WORD)
    }
}

/// Writes the words of two rows' neighbours, or of the first row.
#[expect(clippy::inline_always, reason = "compiled with its caller's instructions")]
#[inline(always)]
pub(crate) fn interleave<E: Multiplied>(first: &[E], second: &[E], to: &mut [u32]) {
    for ((to, &first), &second) in to.iter_mut().zip(first).zip(second) {
        *to = E::word(first, second);
    }
}

/// Writes the kernels of a type for processors with some features.
macro_rules! compiled {
    ($features:literal) => {
        #[expect(unsafe_code, reason = "for certain processors")]
        #[target_feature(enable = $features)]
        unsafe fn compute_some<const W: usize, const ADD: bool>(tile: &Tile, rows: usize) -> usize {
            // SAFETY: the caller's.
            unsafe { tile.compute_some::<Self, W, ADD>(rows) }
        }

        #[expect(unsafe_code, reason = "for certain processors")]
        #[target_feature(enable = $features)]
        unsafe fn product<const ADD: bool>(
            sizes: [usize; 3],
            left: Words<'_>,
            right: Words<'_>,
            c: &mut [f32],
        ) {
            // SAFETY: the caller's.
            unsafe { product::<Self, ADD>(sizes, left, right, c) }
        }
    };
}

#[expect(clippy::inline_always, reason = "compiled with their callers' instructions")]
impl Multiplied for bf16 {
    const PER_WORD: usize = 2;

    fn is_supported() -> bool {
        f32::is_supported() && is_x86_feature_detected!("avx512bf16")
    }

    #[inline(always)]
    fn word(first: Self, second: Self) -> u32 {
        u32::from(first.to_bits()) | u32::from(second.to_bits()) << 16
    }

    #[expect(unsafe_code, reason = "for certain processors")]
    #[inline(always)]
    unsafe fn multiply_add(sum: __m512, left: __m512i, right: __m512i) -> __m512 {
        // SAFETY: the processor can, and these are the same 512 bits under another name.
        unsafe {
            let [left, right] =
                [left, right].map(|bits| std::mem::transmute::<__m512i, __m512bh>(bits));
            _mm512_dpbf16_ps(sum, left, right)
        }
    }

    #[expect(unsafe_code, reason = "for certain processors")]
    #[inline(always)]
    unsafe fn round(values: &[f32; LANES]) -> [Self; LANES] {
        // SAFETY: the processor can, there are 16 values, and these are the same 256 bits under another
        // name.
        unsafe {
            let rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(values.as_ptr()));
            std::mem::transmute::<__m256bh, [Self; LANES]>(rounded)
        }
    }

    compiled!("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16");
}

#[expect(clippy::inline_always, reason = "compiled with their callers' instructions")]
impl Multiplied for f32 {
    const PER_WORD: usize = 1;

    fn is_supported() -> bool {
        Level::here() == Level::Avx512
    }

    #[inline(always)]
    fn word(first: Self, _: Self) -> u32 {
        first.to_bits()
    }

    #[expect(unsafe_code, reason = "for certain processors")]
    #[inline(always)]
    unsafe fn multiply_add(sum: __m512, left: __m512i, right: __m512i) -> __m512 {
        // SAFETY: the processor can.
        unsafe { _mm512_fmadd_ps(_mm512_castsi512_ps(left), _mm512_castsi512_ps(right), sum) }
    }

    #[expect(unsafe_code, reason = "where bf16 needs a certain processor")]
    #[inline(always)]
    unsafe fn round(values: &[f32; LANES]) -> [Self; LANES] {
        *values
    }

    compiled!("avx512f,avx512bw,avx512dq,avx512vl");
}

/// A matrix of words.
#[derive(Debug, Clone, Copy)]
pub struct Words<'a> {
    /// Its first element starts the slice.
    pub data: &'a [u32],
    /// From one row to the next.
    pub stride: usize,
}

/// Writes `left · right` to `c`, or adds it.
///
/// # Shapes
/// `left` is `[rows, words]`: a word has neighbours along a row. `right` is `[words, columns]`: a word
/// has neighbours along a column. `c` is `[rows, columns]` with rows `columns` apart, which
/// is a multiple of [`LANES`].
///
/// # Panics
/// If a matrix is too small.
///
/// # Safety
/// The processor can ([`Multiplied::is_supported`]).
#[expect(clippy::inline_always, reason = "compiled with its caller's instructions")]
#[expect(unsafe_code, reason = "for certain processors")]
#[inline(always)]
unsafe fn product<E: Multiplied, const ADD: bool>(
    [rows, words, columns]: [usize; 3],
    left: Words<'_>,
    right: Words<'_>,
    c: &mut [f32],
) {
    assert!(columns.is_multiple_of(LANES) && c.len() >= rows * columns);
    if rows == 0 || words == 0 || columns == 0 {
        return;
    }
    assert!(left.data.len() >= (rows - 1) * left.stride + words);
    assert!(right.data.len() >= (words - 1) * right.stride + columns);
    for column in (0..columns).step_by(2 * LANES) {
        let is_wide = columns - column > LANES;
        let mut row = 0;
        while row < rows {
            let from = Tile {
                words,
                left: left.data[row * left.stride..].as_ptr(),
                left_stride: left.stride,
                left_step: 1,
                right: right.data[column..].as_ptr(),
                right_stride: right.stride,
                c: c[row * columns + column..].as_mut_ptr(),
                columns,
            };
            // SAFETY: the sizes were checked above, and the processor can.
            unsafe {
                row += if is_wide {
                    from.compute_some::<E, 2, ADD>(rows - row)
                } else {
                    from.compute_some::<E, 1, ADD>(rows - row)
                };
            }
        }
    }
}

/// Where a register tile reads and writes.
#[derive(Debug)]
pub struct Tile {
    /// Words that are multiplied for each sum.
    pub words: usize,
    /// The first word of the first row.
    pub left: *const u32,
    /// From one row to the next.
    pub left_stride: usize,
    /// From one word of a row to the next.
    pub left_step: usize,
    /// The first word of the first column.
    pub right: *const u32,
    /// From one word of a column to the next.
    pub right_stride: usize,
    /// The first sum.
    pub c: *mut f32,
    /// From one row of sums to the next.
    pub columns: usize,
}

#[expect(clippy::inline_always, reason = "compiled with their callers' instructions")]
impl Tile {
    /// Computes as many rows of `W` registers as there is a tile for, and returns how many.
    ///
    /// # Safety
    /// All of the tile's places must exist, and the processor can.
    #[expect(unsafe_code, reason = "the inner loop reads through pointers")]
    #[inline(always)]
    unsafe fn compute_some<E: Multiplied, const W: usize, const ADD: bool>(
        &self,
        rows: usize,
    ) -> usize {
        // SAFETY: the caller's.
        unsafe {
            match rows {
                ROWS.. => self.compute::<E, ROWS, W, ADD>(),
                4.. => self.compute::<E, 4, W, ADD>(),
                2.. => self.compute::<E, 2, W, ADD>(),
                _ => self.compute::<E, 1, W, ADD>(),
            }
        }
    }

    /// Computes `M` rows of `W` registers and returns `M`.
    ///
    /// # Safety
    /// As [`Self::compute_some`]'s.
    #[expect(unsafe_code, reason = "the inner loop reads through pointers")]
    #[inline(always)]
    unsafe fn compute<E: Multiplied, const M: usize, const W: usize, const ADD: bool>(
        &self,
    ) -> usize {
        // SAFETY: the caller's.
        unsafe {
            let mut sums = [[_mm512_setzero_ps(); W]; M];
            if ADD {
                for (row, sums) in sums.iter_mut().enumerate() {
                    for (part, sum) in sums.iter_mut().enumerate() {
                        *sum = _mm512_loadu_ps(self.c.add(row * self.columns + LANES * part));
                    }
                }
            }
            let (mut left, mut right) = (self.left, self.right);
            for _ in 0..self.words {
                let mut columns = [_mm512_set1_epi32(0); W];
                for (part, column) in columns.iter_mut().enumerate() {
                    *column = _mm512_loadu_si512(right.add(LANES * part).cast());
                }
                for (row, sums) in sums.iter_mut().enumerate() {
                    let word = *left.add(row * self.left_stride);
                    let word = _mm512_set1_epi32(word.cast_signed());
                    for (sum, column) in sums.iter_mut().zip(columns) {
                        *sum = E::multiply_add(*sum, word, column);
                    }
                }
                left = left.wrapping_add(self.left_step);
                right = right.wrapping_add(self.right_stride);
            }
            for (row, sums) in sums.iter().enumerate() {
                for (part, sum) in sums.iter().enumerate() {
                    _mm512_storeu_ps(self.c.add(row * self.columns + LANES * part), *sum);
                }
            }
        }
        M
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::{Multiplied, Words, interleave, words_of};
    use crate::testing::{assert_close, numbers, rounded};

    #[test]
    fn equals_the_sum_of_products_for_every_remainder_of_rows() {
        check::<bf16>();
        check::<f32>();
    }

    fn check<E: Multiplied>() {
        if !E::is_supported() {
            eprintln!("skipped: this processor has no AVX-512 or no AVX512-BF16");
            return;
        }
        let depth = 10;
        let words = depth / E::PER_WORD;
        for (rows, columns) in (1..20).flat_map(|rows| [(rows, 64), (rows, 48)]) {
            let a: Vec<E> = rounded(&numbers(rows * depth, 1));
            let b: Vec<E> = rounded(&numbers(depth * columns, 2));
            let mut right = vec![0; words * columns];
            for (word, to) in right.chunks_mut(columns).enumerate() {
                let row = |k: usize| &b[k * columns..(k + 1) * columns];
                let first = word * E::PER_WORD;
                interleave(row(first), row(first + E::PER_WORD - 1), to);
            }
            let exact: Vec<f64> = (0..rows * columns)
                .map(|index| {
                    let (row, column) = (index / columns, index % columns);
                    (0..depth)
                        .map(|k| {
                            f64::from(a[row * depth + k].to_f32())
                                * f64::from(b[k * columns + column].to_f32())
                        })
                        .sum()
                })
                .collect();
            let mut c = vec![0.0; rows * columns];
            let (left, right) = (
                Words { data: words_of(&a), stride: words },
                Words { data: &right, stride: columns },
            );
            for times in [1.0, 2.0] {
                #[expect(unsafe_code, reason = "for certain processors")]
                // SAFETY: the processor was asked.
                unsafe {
                    E::product::<true>([rows, words, columns], left, right, &mut c);
                }
                let exact: Vec<f64> = exact.iter().map(|value| times * value).collect();
                assert_close(&c, &exact, 1e-6);
            }
        }
    }
}
