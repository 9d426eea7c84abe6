//! Transposition of 32-bit elements, a block of registers at a time.

use std::arch::x86_64::{
    __m512i, _mm512_loadu_si512, _mm512_setzero_si512, _mm512_shuffle_i32x4, _mm512_storeu_si512,
    _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};

use crate::aligned::Buffer;

/// Rows and columns of a block.
pub(crate) const BLOCK_SIDE: usize = 16;

/// Writes the transpose of `[rows, columns]`, both multiples of [`BLOCK_SIDE`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(crate) fn transpose(from: &[u32], [rows, columns]: [usize; 2], to: &mut Buffer<u32>) {
    to.set_zero(rows * columns);
    for row in (0..rows).step_by(BLOCK_SIDE) {
        for column in (0..columns).step_by(BLOCK_SIDE) {
            let from = &from[row * columns + column..];
            transpose_block(from, columns, BLOCK_SIDE, &mut to[column * rows + row..], rows);
        }
    }
}

/// Writes the transpose of a block whose rows are `stride` apart; rows from `count` on are taken as
/// zero.
///
/// # Panics
/// If a block is out of bounds.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
#[inline]
pub(crate) fn transpose_block(
    from: &[u32],
    stride: usize,
    count: usize,
    to: &mut [u32],
    to_stride: usize,
) {
    assert!((1..=BLOCK_SIDE).contains(&count) && from.len() >= (count - 1) * stride + BLOCK_SIDE);
    assert!(to.len() >= (BLOCK_SIDE - 1) * to_stride + BLOCK_SIDE);
    let mut rows = [_mm512_setzero_si512(); BLOCK_SIDE];
    for (index, row) in rows.iter_mut().enumerate().take(count) {
        #[expect(unsafe_code, reason = "reads a register")]
        // SAFETY: inside `from`, as asserted.
        unsafe {
            *row = _mm512_loadu_si512(from.as_ptr().add(index * stride).cast());
        }
    }
    // First gather the columns of four rows in each quarter of a register,
    let mut quarters = [_mm512_setzero_si512(); BLOCK_SIDE];
    for group in 0..4 {
        let [a, b, c, d] = [0, 1, 2, 3].map(|row| rows[4 * group + row]);
        let (low, high) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
        quarters[4 * group] = _mm512_unpacklo_epi64(low, high);
        quarters[4 * group + 1] = _mm512_unpackhi_epi64(low, high);
        let (low, high) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
        quarters[4 * group + 2] = _mm512_unpacklo_epi64(low, high);
        quarters[4 * group + 3] = _mm512_unpackhi_epi64(low, high);
    }
    // then the quarters of four groups in one register.
    let mut columns = [_mm512_setzero_si512(); BLOCK_SIDE];
    for column in 0..4 {
        let [a, b, c, d] = [0, 1, 2, 3].map(|group| quarters[4 * group + column]);
        let even = [even_quarters(a, b), even_quarters(c, d)];
        let odd = [odd_quarters(a, b), odd_quarters(c, d)];
        columns[column] = even_quarters(even[0], even[1]);
        columns[4 + column] = even_quarters(odd[0], odd[1]);
        columns[8 + column] = odd_quarters(even[0], even[1]);
        columns[12 + column] = odd_quarters(odd[0], odd[1]);
    }
    for (index, column) in columns.iter().enumerate() {
        #[expect(unsafe_code, reason = "writes a register")]
        // SAFETY: inside `to`, as asserted.
        unsafe {
            _mm512_storeu_si512(to.as_mut_ptr().add(index * to_stride).cast(), *column);
        }
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn even_quarters(a: __m512i, b: __m512i) -> __m512i {
    _mm512_shuffle_i32x4::<0x88>(a, b)
}

#[target_feature(enable = "avx512f")]
#[inline]
fn odd_quarters(a: __m512i, b: __m512i) -> __m512i {
    _mm512_shuffle_i32x4::<0xDD>(a, b)
}

#[cfg(test)]
mod tests {
    use super::{BLOCK_SIDE, transpose, transpose_block};
    use crate::aligned::Buffer;
    use crate::gemm::{Avx512, MicroKernel};

    #[test]
    fn swaps_rows_and_columns_and_fills_with_zeros() {
        if !Avx512::is_supported() {
            eprintln!("skipped: this CPU has no AVX-512");
            return;
        }
        let (rows, columns) = (32, 48);
        let from: Vec<u32> = (0..rows * columns).map(|index| index as u32 + 1).collect();
        let mut to = Buffer::new();
        #[expect(unsafe_code, reason = "needs certain CPU features")]
        // SAFETY: the CPU was checked.
        unsafe {
            transpose(&from, [rows, columns], &mut to);
        }
        for (index, value) in to.iter().enumerate() {
            assert_eq!(*value, from[index % rows * columns + index / rows]);
        }
        let mut block = [7; BLOCK_SIDE * BLOCK_SIDE];
        #[expect(unsafe_code, reason = "needs certain CPU features")]
        // SAFETY: the CPU was checked.
        unsafe {
            transpose_block(&from, columns, 3, &mut block, BLOCK_SIDE);
        }
        for (index, value) in block.iter().enumerate() {
            let (row, column) = (index % BLOCK_SIDE, index / BLOCK_SIDE);
            assert_eq!(*value, if row < 3 { from[row * columns + column] } else { 0 });
        }
    }
}
