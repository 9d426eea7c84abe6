//! The gated product of the feed-forward layers, `silu(gate) ∘ up`, and its gradient.
//!
//! # Source
//! arXiv 2002.05202, section 2.

use crate::{exp::exp, versions::versions};

versions! {
    /// Writes `silu(gate) ∘ up`, where `silu(x) = x · sigmoid(x)`.
    pub fn forward<E>(gate: &[E], up: &[E], product: &mut [E]) {
        for ((product, &gate), &up) in product.iter_mut().zip(gate).zip(up) {
            let gate = gate.to_f32();
            *product = E::from_f32(gate * sigmoid::<FUSED>(gate) * up.to_f32());
        }
    }
}

versions! {
    /// Replaces `gate` and `up` by their gradients, and the product's gradient by the product.
    pub fn backward<E>(product: &mut [E], gate: &mut [E], up: &mut [E]) {
        for ((gate, up), product) in gate.iter_mut().zip(up).zip(product) {
            let (x, y, d_product) = (gate.to_f32(), up.to_f32(), product.to_f32());
            let sigmoid = sigmoid::<FUSED>(x);
            let silu = x * sigmoid;
            let slope = sigmoid + silu * (1.0 - sigmoid);
            *product = E::from_f32(silu * y);
            *gate = E::from_f32(d_product * y * slope);
            *up = E::from_f32(d_product * silu);
        }
    }
}

#[expect(clippy::inline_always, reason = "inlined into every version of a kernel")]
#[inline(always)]
fn sigmoid<const FUSED: bool>(x: f32) -> f32 {
    1.0 / (1.0 + exp::<FUSED>(-x))
}

#[cfg(test)]
mod tests {
    use crate::testing::{assert_close, numbers};

    #[test]
    fn follows_the_formula_and_its_finite_differences() {
        for length in [1, 15, 16, 17, 1000] {
            let scaled = |seed| numbers(length, seed).iter().map(|x| 5.0 * x).collect::<Vec<f32>>();
            let (gate, up, dy) = (scaled(1), scaled(2), scaled(3));
            let value = |gate: f64, up: f64| gate / (1.0 + (-gate).exp()) * up;
            let exact: Vec<f64> =
                gate.iter().zip(&up).map(|(g, u)| value(f64::from(*g), f64::from(*u))).collect();
            let mut found = vec![0.0; length];
            super::forward(&gate, &up, &mut found);
            assert_close(&found, &exact, 1e-6);

            let h = 1e-4;
            let (mut d_gate, mut d_up) = (Vec::new(), Vec::new());
            for ((g, u), dy) in gate.iter().zip(&up).zip(&dy) {
                let (g, u, dy) = (f64::from(*g), f64::from(*u), f64::from(*dy));
                d_gate.push(dy * (value(g + h, u) - value(g - h, u)) / (2.0 * h));
                d_up.push(dy * (value(g, u + h) - value(g, u - h)) / (2.0 * h));
            }
            let (mut gate, mut up) = (gate, up);
            let mut product = dy;
            super::backward(&mut product, &mut gate, &mut up);
            assert_close(&product, &exact, 1e-6);
            assert_close(&gate, &d_gate, 1e-5);
            assert_close(&up, &d_up, 1e-5);
        }
    }
}
