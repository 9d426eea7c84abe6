//! Root-mean-square normalisation of rows, and its gradient.

use crate::{Element, sum, versions::versions};

versions! {
    /// Writes `x / rms(x) ∘ weight`.
    ///
    /// # Shapes
    /// `x` and `y` are `[rows, width]`, `weight` is `[width]`.
    pub fn forward<E>(x: &[E], weight: &[E], eps: f32, y: &mut [E]) {
        let width = weight.len();
        for (x, y) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)) {
            let rstd = reciprocal_rms(x, eps);
            for ((y, &x), &weight) in y.iter_mut().zip(x).zip(weight) {
                *y = E::from_f32(x.to_f32() * rstd * weight.to_f32());
            }
        }
    }
}

versions! {
    /// Replaces the gradient of the result with the gradient of `x`, plus `residual` if there is
    /// one.
    ///
    /// With `x̂ = x / rms(x)` and `g = dy ∘ weight`: `dx = (g − x̂ · mean(g ∘ x̂)) / rms(x)`.
    /// Adds `Σ dy ∘ x̂` to `weight_grad` unless that is empty.
    ///
    /// # Shapes
    /// `x`, `dy` and `residual` are `[rows, width]`, `weight` and `weight_grad` are `[width]`.
    pub fn backward<E>(
        x: &[E],
        weight: &[E],
        eps: f32,
        dy: &mut [E],
        residual: Option<&[E]>,
        weight_grad: &mut [f32],
    ) {
        let width = weight.len();
        for (row, (x, dy)) in x.chunks_exact(width).zip(dy.chunks_exact_mut(width)).enumerate() {
            let rstd = reciprocal_rms(x, eps);
            if !weight_grad.is_empty() {
                for ((grad, &x), &dy) in weight_grad.iter_mut().zip(x).zip(dy.iter()) {
                    *grad += dy.to_f32() * x.to_f32() * rstd;
                }
            }
            let product = sum::of_triples(dy, weight, x, |dy, weight, x| dy * weight * x);
            // x̂ · mean(g ∘ x̂) = x · (Σ g ∘ x) · rstd² / width
            let factor = product * rstd * rstd / width as f32;
            match residual {
                None => {
                    for ((dy, &x), &weight) in dy.iter_mut().zip(x).zip(weight) {
                        let g = dy.to_f32() * weight.to_f32();
                        *dy = E::from_f32((g - x.to_f32() * factor) * rstd);
                    }
                }
                Some(residual) => {
                    let residual = &residual[row * width..(row + 1) * width];
                    for (((dy, &x), &weight), &more) in
                        dy.iter_mut().zip(x).zip(weight).zip(residual)
                    {
                        let g = dy.to_f32() * weight.to_f32();
                        *dy = E::from_f32((g - x.to_f32() * factor) * rstd + more.to_f32());
                    }
                }
            }
        }
    }
}

#[expect(clippy::inline_always, reason = "inlined into every version of a kernel")]
#[inline(always)]
fn reciprocal_rms<E: Element>(x: &[E], eps: f32) -> f32 {
    let squares = sum::of(x, |x| x * x);
    1.0 / (squares / x.len() as f32 + eps).sqrt()
}

#[cfg(test)]
mod tests {
    use crate::testing::{assert_close, numbers, rounded};

    /// Widths that leave remainders for every vector length.
    const WIDTHS: [usize; 5] = [2, 7, 64, 100, 576];

    /// The formulas in f64.
    fn exact(x: &[f32], weight: &[f32], dy: &[f32]) -> [Vec<f64>; 3] {
        let width = weight.len();
        let (mut y, mut dx, mut dw) = (Vec::new(), Vec::new(), vec![0.0; width]);
        for (x, dy) in x.chunks(width).zip(dy.chunks(width)) {
            let wide = |slice: &[f32]| slice.iter().copied().map(f64::from).collect::<Vec<_>>();
            let (x, dy, weight) = (wide(x), wide(dy), wide(weight));
            let rms = (x.iter().map(|x| x * x).sum::<f64>() / width as f64 + 1e-5).sqrt();
            let mean =
                (0..width).map(|i| dy[i] * weight[i] * x[i] / rms).sum::<f64>() / width as f64;
            for i in 0..width {
                y.push(x[i] / rms * weight[i]);
                dx.push((dy[i] * weight[i] - x[i] / rms * mean) / rms);
                dw[i] += dy[i] * x[i] / rms;
            }
        }
        [y, dx, dw]
    }

    #[test]
    fn follows_the_formula_at_every_width() {
        for width in WIDTHS {
            let (x, dy, weight) = (numbers(3 * width, 1), numbers(3 * width, 2), numbers(width, 3));
            let [y, dx, dw] = exact(&x, &weight, &dy);
            let mut found = vec![0.0; x.len()];
            super::forward(&x, &weight, 1e-5, &mut found);
            assert_close(&found, &y, 1e-6);
            let (mut found, mut grad) = (dy.clone(), vec![0.0; width]);
            super::backward(&x, &weight, 1e-5, &mut found, None, &mut grad);
            assert_close(&found, &dx, 1e-5);
            assert_close(&grad, &dw, 1e-5);
            // The residual is added.
            let (residual, mut found) = (numbers(3 * width, 4), dy.clone());
            super::backward(&x, &weight, 1e-5, &mut found, Some(&residual), &mut []);
            let sums: Vec<f64> = dx.iter().zip(&residual).map(|(a, b)| a + f64::from(*b)).collect();
            assert_close(&found, &sums, 1e-5);
        }
    }

    #[test]
    fn rounds_bf16_once() {
        let (x, dy, weight) = (numbers(576, 1), numbers(576, 2), numbers(576, 3));
        let [x16, dy16, weight16] = [&x, &dy, &weight].map(|values| rounded(values));
        let wide = |values: &[half::bf16]| values.iter().map(|x| x.to_f32()).collect::<Vec<_>>();
        let [y, dx, _] = exact(&wide(&x16), &wide(&weight16), &wide(&dy16));
        let mut found = vec![half::bf16::ZERO; 576];
        super::forward(&x16, &weight16, 1e-5, &mut found);
        assert_close(&wide(&found), &y, 1.0 / 256.0);
        let mut found = dy16.clone();
        super::backward(&x16, &weight16, 1e-5, &mut found, None, &mut []);
        assert_close(&wide(&found), &dx, 1.0 / 256.0);
    }
}
