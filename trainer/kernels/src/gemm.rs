//! Small matrix products in bf16 with fp32 sums, out of registers and the first caches; larger ones
//! are made of their tiles (`matmul`).
//!
//! # Source
//! The blocking is the usual one for outer products in registers (Goto, van de Geijn: Anatomy of
//! High-Performance Matrix Multiplication, 2008); VDPBF16PS multiplies pairs of neighbours.

use std::arch::x86_64::{
    __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_set1_epi32,
    _mm512_setzero_ps, _mm512_storeu_ps,
};

/// Elements of one register.
pub(crate) const LANES: usize = 16;
/// Rows of one register tile: with two registers each, sums fill half of the registers, with three,
/// what a register of the right side is read for hides its reading.
pub(crate) const ROWS: usize = 8;

/// Tells whether this processor can.
pub(crate) fn is_supported() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512bf16")
}

/// A matrix whose elements are pairs of bf16, the first in the low half.
#[derive(Clone, Copy)]
pub(crate) struct Pairs<'a> {
    /// Its first element starts the slice.
    pub data: &'a [u32],
    /// From one row to the next.
    pub stride: usize,
}

/// Writes `left · right` to `c`, or adds it.
///
/// # Shapes
/// `left` is `[rows, pairs]`: neighbours along a row are a pair. `right` is `[pairs, columns]`:
/// each element is a pair of one column. `c` is `[rows, columns]` with rows `columns` apart, which
/// is a multiple of [`LANES`].
///
/// # Panics
/// If a matrix is too small.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(crate) fn product<const ADD: bool>(
    [rows, pairs, columns]: [usize; 3],
    left: Pairs<'_>,
    right: Pairs<'_>,
    c: &mut [f32],
) {
    assert!(columns.is_multiple_of(LANES) && c.len() >= rows * columns);
    if rows == 0 || pairs == 0 || columns == 0 {
        return;
    }
    assert!(left.data.len() >= (rows - 1) * left.stride + pairs);
    assert!(right.data.len() >= (pairs - 1) * right.stride + columns);
    for column in (0..columns).step_by(2 * LANES) {
        let is_wide = columns - column > LANES;
        let mut row = 0;
        while row < rows {
            let from = Tile {
                pairs,
                left: left.data[row * left.stride..].as_ptr(),
                left_stride: left.stride,
                left_step: 1,
                right: right.data[column..].as_ptr(),
                right_stride: right.stride,
                c: c[row * columns + column..].as_mut_ptr(),
                columns,
            };
            #[expect(unsafe_code, reason = "the inner loop reads through pointers")]
            // SAFETY: the sizes were checked above.
            unsafe {
                row += if is_wide {
                    from.compute_some::<2, ADD>(rows - row)
                } else {
                    from.compute_some::<1, ADD>(rows - row)
                };
            }
        }
    }
}

/// Where a register tile reads and writes.
pub(crate) struct Tile {
    /// Pairs that are multiplied for each sum.
    pub pairs: usize,
    /// The first pair of the first row.
    pub left: *const u32,
    /// From one row to the next.
    pub left_stride: usize,
    /// From one pair of a row to the next.
    pub left_step: usize,
    /// The first pair of the first column.
    pub right: *const u32,
    /// From one pair of a column to the next.
    pub right_stride: usize,
    /// The first sum.
    pub c: *mut f32,
    /// From one row of sums to the next.
    pub columns: usize,
}

impl Tile {
    /// Computes as many rows of `W` registers as there is a tile for, and returns how many.
    ///
    /// # Safety
    /// All of the tile's places must exist.
    #[expect(unsafe_code, reason = "the inner loop reads through pointers")]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    #[inline]
    pub(crate) unsafe fn compute_some<const W: usize, const ADD: bool>(
        &self,
        rows: usize,
    ) -> usize {
        // SAFETY: the caller's.
        unsafe {
            match rows {
                ROWS.. => self.compute::<ROWS, W, ADD>(),
                4.. => self.compute::<4, W, ADD>(),
                2.. => self.compute::<2, W, ADD>(),
                _ => self.compute::<1, W, ADD>(),
            }
        }
    }

    /// Computes `M` rows of `W` registers and returns `M`.
    ///
    /// # Safety
    /// All of the tile's places must exist.
    #[expect(unsafe_code, reason = "the inner loop reads through pointers")]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    #[inline]
    unsafe fn compute<const M: usize, const W: usize, const ADD: bool>(&self) -> usize {
        let bf16s = |bits: __m512i| {
            // SAFETY: the same 512 bits under another name.
            unsafe { std::mem::transmute::<__m512i, __m512bh>(bits) }
        };
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
            for _ in 0..self.pairs {
                let columns: [__m512bh; W] = std::array::from_fn(|part| {
                    bf16s(_mm512_loadu_si512(right.add(LANES * part).cast()))
                });
                for (row, sums) in sums.iter_mut().enumerate() {
                    let pair = *left.add(row * self.left_stride);
                    let pair = bf16s(_mm512_set1_epi32(pair.cast_signed()));
                    for (sum, column) in sums.iter_mut().zip(columns) {
                        *sum = _mm512_dpbf16_ps(*sum, pair, column);
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
    use super::{Pairs, is_supported, product};
    use crate::testing::{assert_close, numbers, rounded};

    #[test]
    fn equals_the_sum_of_products_for_every_remainder_of_rows() {
        if !is_supported() {
            eprintln!("skipped: this processor has no AVX512-BF16");
            return;
        }
        let pairs = 5;
        for (rows, columns) in (1..20).flat_map(|rows| [(rows, 64), (rows, 48)]) {
            let a = rounded(&numbers(rows * 2 * pairs, 1));
            let b = rounded(&numbers(2 * pairs * columns, 2));
            let left: Vec<u32> = a
                .chunks(2)
                .map(|pair| u32::from(pair[0].to_bits()) | u32::from(pair[1].to_bits()) << 16)
                .collect();
            let at = |k: usize, column: usize| u32::from(b[k * columns + column].to_bits());
            let right: Vec<u32> = (0..pairs * columns)
                .map(|index| {
                    let (pair, column) = (index / columns, index % columns);
                    at(2 * pair, column) | at(2 * pair + 1, column) << 16
                })
                .collect();
            let exact: Vec<f64> = (0..rows * columns)
                .map(|index| {
                    let (row, column) = (index / columns, index % columns);
                    (0..2 * pairs)
                        .map(|k| a[row * 2 * pairs + k].to_f64() * b[k * columns + column].to_f64())
                        .sum()
                })
                .collect();
            let mut c = vec![0.0; rows * columns];
            let (left, right) =
                (Pairs { data: &left, stride: pairs }, Pairs { data: &right, stride: columns });
            for times in [1.0, 2.0] {
                #[expect(unsafe_code, reason = "for certain processors")]
                // SAFETY: the processor was asked.
                unsafe {
                    product::<true>([rows, pairs, columns], left, right, &mut c);
                }
                let exact: Vec<f64> = exact.iter().map(|value| times * value).collect();
                assert_close(&c, &exact, 1e-6);
            }
        }
    }
}
