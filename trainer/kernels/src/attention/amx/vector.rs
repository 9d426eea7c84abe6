//! Registers of 16 numbers.

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _mm512_add_ps, _mm512_castpd_ps, _mm512_castps_pd,
    _mm512_cvtne2ps_pbh, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_max_ps, _mm512_setzero_ps,
    _mm512_shuffle_f32x4, _mm512_storeu_ps, _mm512_storeu_si512, _mm512_unpackhi_epi16,
    _mm512_unpackhi_pd, _mm512_unpackhi_ps, _mm512_unpacklo_epi16, _mm512_unpacklo_pd,
    _mm512_unpacklo_ps,
};

use half::bf16;

use crate::{amx::square::SIDE, gemm::LANES};

#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn load(from: &[f32; LANES]) -> __m512 {
    #[expect(unsafe_code, reason = "reads a register")]
    // SAFETY: an array of its size.
    unsafe {
        _mm512_loadu_ps(from.as_ptr())
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn store(to: &mut [f32; LANES], values: __m512) {
    #[expect(unsafe_code, reason = "writes a register")]
    // SAFETY: an array of its size.
    unsafe {
        _mm512_storeu_ps(to.as_mut_ptr(), values);
    }
}

/// Rounds two registers to one of bf16.
#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
pub(super) fn round([first, second]: [__m512; 2]) -> __m512i {
    #[expect(unsafe_code, reason = "reinterprets a register")]
    // SAFETY: both types have the same 512 bits.
    unsafe {
        std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(second, first))
    }
}

/// Returns the words of two rows of bf16, in two registers: the first has columns 0 to 3, 8 to 11,
/// 16 to 19 and 24 to 27, the second has the others.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
pub(super) fn pairs_of_rows(first: __m512i, second: __m512i) -> [__m512i; 2] {
    [_mm512_unpacklo_epi16(first, second), _mm512_unpackhi_epi16(first, second)]
}

#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn store_words(to: &mut [u32; LANES], words: __m512i) {
    #[expect(unsafe_code, reason = "writes a register")]
    // SAFETY: an array of its size.
    unsafe {
        _mm512_storeu_si512(to.as_mut_ptr().cast(), words);
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn store_bf16(to: &mut [bf16; 2 * LANES], values: __m512i) {
    #[expect(unsafe_code, reason = "writes a register")]
    // SAFETY: an array of its size, and any bits are bf16.
    unsafe {
        _mm512_storeu_si512(to.as_mut_ptr().cast(), values);
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn load_bf16(from: &[bf16; 2 * LANES]) -> __m512bh {
    #[expect(unsafe_code, reason = "reads a register")]
    // SAFETY: an array of its size, and both types have the same 512 bits.
    unsafe {
        std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(from.as_ptr().cast()))
    }
}

/// Returns a row of a chunk.
#[inline]
pub(super) fn row_of(chunk: &[f32; SIDE * SIDE], row: usize) -> &[f32; SIDE] {
    &chunk.as_chunks().0[row]
}

/// Returns two adjacent registers of a row.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn load_pair(row: &[f32; 2 * LANES]) -> [__m512; 2] {
    let (halves, _) = row.as_chunks::<LANES>();
    [load(&halves[0]), load(&halves[1])]
}

/// Defines a function that combines the lanes of each of 16 registers, into one register.
///
/// A macro, because a closure would not be inlined: it has features that generic functions lack.
macro_rules! combine_lanes {
    ($(#[$meta:meta])* $name:ident, $combine:ident) => {
        $(#[$meta])*
        #[target_feature(enable = "avx512f,avx512dq")]
        #[inline]
        pub(super) fn $name(rows: &[[f32; LANES]; LANES]) -> __m512 {
            // Each level halves the registers, and the lanes of a row in them.
            let mut quads = [_mm512_setzero_ps(); 4];
            for (quad, rows) in quads.iter_mut().zip(rows.as_chunks::<4>().0) {
                let [a, b, c, d] = [load(&rows[0]), load(&rows[1]), load(&rows[2]), load(&rows[3])];
                let ab = $combine(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
                let cd = $combine(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
                let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
                let low = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
                *quad = $combine(low, _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
            }
            let [a, b, c, d] = quads;
            let low = $combine(even_quarters(a, b), odd_quarters(a, b));
            let high = $combine(even_quarters(c, d), odd_quarters(c, d));
            $combine(even_quarters(low, high), odd_quarters(low, high))
        }
    };
}

combine_lanes!(
    /// Returns a register whose lanes are the sums of the lanes of 16 registers.
    sums,
    _mm512_add_ps
);
combine_lanes!(
    /// Returns a register whose lanes are the largest of the lanes of 16 registers.
    maxima,
    _mm512_max_ps
);

#[target_feature(enable = "avx512f")]
#[inline]
fn even_quarters(a: __m512, b: __m512) -> __m512 {
    _mm512_shuffle_f32x4::<0x88>(a, b)
}

#[target_feature(enable = "avx512f")]
#[inline]
fn odd_quarters(a: __m512, b: __m512) -> __m512 {
    _mm512_shuffle_f32x4::<0xDD>(a, b)
}
