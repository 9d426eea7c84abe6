//! Sums that vectorise, which compilers cannot do because they may not reorder floating-point
//! additions.

use crate::{Element, versions::versions};

/// Independent partial sums: two AVX-512 registers.
const LANES: usize = 32;

/// Sums `term(x)` over a slice, in an order that depends on the length alone.
#[expect(clippy::inline_always, reason = "inlined into every version of a kernel")]
#[inline(always)]
pub(crate) fn of<E: Element>(x: &[E], term: impl Fn(f32) -> f32) -> f32 {
    let (runs, rest) = x.as_chunks::<LANES>();
    let mut lanes = [0.0; LANES];
    for x in runs {
        for (sum, &x) in lanes.iter_mut().zip(x) {
            *sum += term(x.to_f32());
        }
    }
    lanes.iter().sum::<f32>() + rest.iter().map(|x| term(x.to_f32())).sum::<f32>()
}

/// Sums `term(x, y)` over slices of the same length, in an order that depends on it alone.
#[expect(clippy::inline_always, reason = "inlined into every version of a kernel")]
#[inline(always)]
pub(crate) fn of_pairs<E: Element>(x: &[E], y: &[E], term: impl Fn(f32, f32) -> f32) -> f32 {
    of_triples(x, y, y, |x, y, _| term(x, y))
}

/// Sums `term(x, y, z)` over slices of the same length, in an order that depends on it alone.
#[expect(clippy::inline_always, reason = "inlined into every version of a kernel")]
#[inline(always)]
pub(crate) fn of_triples<E: Element>(
    x: &[E],
    y: &[E],
    z: &[E],
    term: impl Fn(f32, f32, f32) -> f32,
) -> f32 {
    let ((x, x_rest), (y, y_rest), (z, z_rest)) =
        (x.as_chunks::<LANES>(), y.as_chunks::<LANES>(), z.as_chunks::<LANES>());
    let mut lanes = [0.0; LANES];
    for ((x, y), z) in x.iter().zip(y).zip(z) {
        for (((sum, &x), &y), &z) in lanes.iter_mut().zip(x).zip(y).zip(z) {
            *sum += term(x.to_f32(), y.to_f32(), z.to_f32());
        }
    }
    let mut rest = 0.0;
    for ((x, y), z) in x_rest.iter().zip(y_rest).zip(z_rest) {
        rest += term(x.to_f32(), y.to_f32(), z.to_f32());
    }
    lanes.iter().sum::<f32>() + rest
}

versions! {
    /// Adds `more` to `sum`, element by element.
    pub fn add<E>(sum: &mut [f32], more: &[E]) {
        for (sum, &more) in sum.iter_mut().zip(more) {
            *sum += more.to_f32();
        }
    }
}

versions! {
    /// Returns the sum of squares.
    pub fn squares<E>(values: &[E]) -> f64 {
        // Short chunks in fp32 and their sums in f64: nearly as exact as f64, at the speed of fp32.
        let mut sum = 0.0;
        for chunk in values.chunks(4096) {
            sum += f64::from(of(chunk, |x| x * x));
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::{assert_close, numbers, rounded};

    #[test]
    fn sums_squares_and_adds() {
        for length in [0, 1, 31, 33, 10_001] {
            let values = numbers(length, 5);
            let exact: f64 = values.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
            let found = super::squares(&values);
            assert!((found - exact).abs() <= 1e-6 * exact, "{found} is not {exact}");
            let more: Vec<half::bf16> = rounded(&numbers(length, 6));
            let mut sum = values.clone();
            super::add(&mut sum, &more);
            let sums: Vec<f64> =
                values.iter().zip(&more).map(|(a, b)| f64::from(*a) + b.to_f64()).collect();
            assert_close(&sum, &sums, 1e-6);
        }
    }
}
