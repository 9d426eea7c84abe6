//! The exponential function, in a form that compilers can vectorise.

use std::f32::consts::LOG2_E;

/// Returns `e^x`; 0 below -87, and `e^88` above 88.
///
/// Within 2 units in the last place of the exact value. `FUSED` uses fused multiply-add; on CPUs
/// without it that would be a slow function call.
///
/// # Source
/// Range reduction of Cody and Waite with `ln 2` in two parts, and the polynomial of Cephes'
/// `expf` (Moshier, 1992).
#[inline(always)]
pub(crate) fn exp<const FUSED: bool>(x: f32) -> f32 {
    /// Adding and subtracting it rounds to a whole number.
    const ROUND: f32 = 12_582_912.0;
    /// `ln 2` in two parts: the first with few enough bits that `n` times it is exact.
    const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    let fused = |a: f32, b: f32, c: f32| if FUSED { a.mul_add(b, c) } else { a * b + c };
    let clamped = x.clamp(-87.0, 88.0);
    let shifted = fused(clamped, LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = fused(n, -LN_2[1], fused(n, -LN_2[0], clamped));
    let mut p = 1.987_569_2e-4;
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = fused(p, r, coefficient);
    }
    let y = fused(p * r, r, r) + 1.0;
    // 2^n: the low bits of `shifted` are `n`, and go where the exponent is.
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3F80_0000));
    if x < -87.0 { 0.0 } else { y * power }
}

#[cfg(test)]
mod tests {
    use super::exp;

    fn check<const FUSED: bool>() {
        let exp = exp::<FUSED>;
        for step in -87_000..88_000 {
            let x = step as f32 / 1000.0;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) - exact).abs() / exact;
            assert!(error < 2.0 * f64::from(f32::EPSILON), "e^{x}: {error:e}");
        }
        assert!((exp(0.0) - 1.0).abs() < f32::MIN_POSITIVE);
        assert!(exp(-100.0) == 0.0 && exp(f32::NEG_INFINITY) == 0.0);
        assert!(exp(100.0).is_finite() && exp(f32::NAN).is_nan());
    }

    #[test]
    fn is_within_two_units_of_the_exact_value() {
        check::<false>();
        check::<true>();
    }
}
