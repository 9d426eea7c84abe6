//! Powers and logarithms of 16 numbers.

use std::{
    arch::x86_64::{
        __m512, _CMP_GE_OQ, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_ZERO, _mm512_add_ps,
        _mm512_cmp_ps_mask, _mm512_fmadd_ps, _mm512_fnmadd_ps, _mm512_getexp_ps, _mm512_getmant_ps,
        _mm512_mask_add_ps, _mm512_mask_mul_ps, _mm512_mul_ps, _mm512_reduce_ps, _mm512_scalef_ps,
        _mm512_set1_ps, _mm512_sub_ps,
    },
    f32::consts::{LN_2, SQRT_2},
};

/// Returns `2^x`, within 2 units in the last place; 0 for −∞.
///
/// # Source
/// `2^x = 2^r · 2^⌊x⌋`, where `r` is in `[0, 1)`. The polynomial has the smallest maximal relative
/// error there, 7.5e-8 (Remez's algorithm).
#[target_feature(enable = "avx512f,avx512dq")]
#[inline]
pub(super) fn exp2(x: __m512) -> __m512 {
    /// Of the highest power first.
    const COEFFICIENTS: [f32; 6] =
        [1.877_576_7e-3, 8.989_34e-3, 5.582_631_8e-2, 2.401_536_1e-1, 6.931_531e-1, 1.0];
    polynomial(&COEFFICIENTS, x)
}

/// Returns `2^x` with a relative error of 2.6e-6, a thousandth of the rounding to bf16; 0 for −∞.
///
/// # Source
/// As for [`exp2`].
#[target_feature(enable = "avx512f,avx512dq")]
#[inline]
pub(super) fn exp2_for_bf16(x: __m512) -> __m512 {
    const COEFFICIENTS: [f32; 5] =
        [1.353_416_8e-2, 5.201_146e-2, 2.414_427_5e-1, 6.930_038_3e-1, 1.000_002_6];
    polynomial(&COEFFICIENTS, x)
}

#[target_feature(enable = "avx512f,avx512dq")]
#[inline]
fn polynomial<const N: usize>(coefficients: &[f32; N], x: __m512) -> __m512 {
    /// No bits of the fraction, rounded down, without exceptions.
    const MINUS_FLOOR: i32 = 0x09;
    let r = _mm512_reduce_ps::<MINUS_FLOOR>(x);
    let mut y = _mm512_set1_ps(coefficients[0]);
    for &coefficient in &coefficients[1..] {
        y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(coefficient));
    }
    _mm512_scalef_ps(y, x)
}

/// Returns the natural logarithm of positive normal numbers.
///
/// # Source
/// Cephes' `logf` (Moshier, 1992).
#[target_feature(enable = "avx512f,avx512dq")]
#[inline]
pub(super) fn ln(x: __m512) -> __m512 {
    /// Of the highest power first.
    const COEFFICIENTS: [f32; 9] = [
        7.037_683_6e-2,
        -1.151_461e-1,
        1.167_699_8e-1,
        -1.242_014_1e-1,
        1.424_932_3e-1,
        -1.666_805_7e-1,
        2.000_071_5e-1,
        -2.499_999_4e-1,
        3.333_333e-1,
    ];
    // x = m · 2^n, where m is in [√½, √2).
    let m = _mm512_getmant_ps::<_MM_MANT_NORM_1_2, _MM_MANT_SIGN_ZERO>(x);
    let is_high = _mm512_cmp_ps_mask::<_CMP_GE_OQ>(m, _mm512_set1_ps(SQRT_2));
    let (n, one) = (_mm512_getexp_ps(x), _mm512_set1_ps(1.0));
    let n = _mm512_mask_add_ps(n, is_high, n, one);
    let m = _mm512_mask_mul_ps(m, is_high, m, _mm512_set1_ps(0.5));
    let r = _mm512_sub_ps(m, one);
    let mut y = _mm512_set1_ps(COEFFICIENTS[0]);
    for &coefficient in &COEFFICIENTS[1..] {
        y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(coefficient));
    }
    let square = _mm512_mul_ps(r, r);
    let y = _mm512_mul_ps(_mm512_mul_ps(y, square), r);
    let y = _mm512_fnmadd_ps(_mm512_set1_ps(0.5), square, y);
    _mm512_fmadd_ps(n, _mm512_set1_ps(LN_2), _mm512_add_ps(r, y))
}

#[cfg(test)]
mod tests {
    use super::{exp2, exp2_for_bf16, ln};
    use crate::{
        attention::amx::vector::{load, store},
        gemm::{Avx512, MicroKernel},
    };

    #[target_feature(enable = "avx512f,avx512dq")]
    fn check() {
        for step in -126 * 512..128 * 512 {
            let x: [f32; 16] =
                std::array::from_fn(|lane| step as f32 / 512.0 + lane as f32 / 8192.0);
            let (mut precise, mut rough, mut back) = ([0.0; 16], [0.0; 16], [0.0; 16]);
            let y = exp2(load(&x));
            store(&mut precise, y);
            store(&mut rough, exp2_for_bf16(load(&x)));
            store(&mut back, ln(y));
            for lane in 0..16 {
                let exact = f64::from(x[lane]).exp2();
                let error = |found: f32| (f64::from(found) - exact).abs() / exact;
                assert!(error(precise[lane]) < 2.5e-7, "2^{}: {:e}", x[lane], error(precise[lane]));
                assert!(error(rough[lane]) < 2.8e-6, "2^{}: {:e}", x[lane], error(rough[lane]));
                let exact = f64::from(precise[lane]).ln();
                let error = (f64::from(back[lane]) - exact).abs();
                assert!(error < 1.5e-7 * exact.abs().max(1.0), "ln {:e}: {error:e}", precise[lane]);
            }
        }
        let special = [0.0, -f32::MIN_POSITIVE, -1e-30, -200.0, -1e30, f32::NEG_INFINITY, f32::NAN];
        let mut x = [0.0; 16];
        x[..special.len()].copy_from_slice(&special);
        for exp2 in [|x| exp2(x), |x| exp2_for_bf16(x)] {
            let mut y = [0.0; 16];
            store(&mut y, exp2(load(&x)));
            assert!(y[..3].iter().all(|y| (y - 1.0).abs() < 2.8e-6), "{y:?}");
            assert!(y[3..6].iter().all(|y| *y == 0.0) && y[6].is_nan(), "{y:?}");
        }
    }

    #[test]
    fn powers_and_logarithms_follow_the_exact_ones() {
        if !Avx512::is_supported() {
            eprintln!("skipped: this CPU has no AVX-512");
            return;
        }
        #[expect(unsafe_code, reason = "needs certain CPU features")]
        // SAFETY: the CPU was checked.
        unsafe {
            check();
        }
    }
}
