//! Softmax and cross-entropy of rows of logits, in place.

use crate::{Element, exp::exp, sum, versions::versions};

versions! {
    /// Replaces logits by the gradient of the summed loss and returns that sum.
    ///
    /// The gradient of `−log p[label]` is `p − 1[label]`, with `p = softmax(logits)`.
    ///
    /// # Shapes
    /// `logits` is `[rows, vocabulary]`, `labels` is `[rows]`.
    pub fn backward<E>(logits: &mut [E], labels: &[i64]) -> f64 {
        let vocabulary = logits.len().checked_div(labels.len()).unwrap_or_default();
        let mut loss = 0.0;
        for (row, &label) in logits.chunks_exact_mut(vocabulary.max(1)).zip(labels) {
            let label = label as usize;
            let (largest, denominator) = normalizer::<_, FUSED>(row);
            loss += loss_of(row[label], largest, denominator);
            let label_value = row[label].to_f32();
            let scale = 1.0 / denominator;
            for value in row.iter_mut() {
                *value = E::from_f32(exp::<FUSED>(value.to_f32() - largest) * scale);
            }
            row[label] = E::from_f32(exp::<FUSED>(label_value - largest) * scale - 1.0);
        }
        loss
    }
}

versions! {
    /// Returns the summed loss.
    ///
    /// # Shapes
    /// `logits` is `[rows, vocabulary]`, `labels` is `[rows]`.
    pub fn loss<E>(logits: &[E], labels: &[i64]) -> f64 {
        let vocabulary = logits.len().checked_div(labels.len()).unwrap_or_default();
        let mut loss = 0.0;
        for (row, &label) in logits.chunks_exact(vocabulary.max(1)).zip(labels) {
            let (largest, denominator) = normalizer::<_, FUSED>(row);
            loss += loss_of(row[label as usize], largest, denominator);
        }
        loss
    }
}

/// Returns the largest logit and `Σ e^(logit − largest)`.
#[expect(clippy::inline_always, reason = "inlined into every version of a kernel")]
#[inline(always)]
fn normalizer<E: Element, const FUSED: bool>(row: &[E]) -> (f32, f32) {
    let (runs, rest) = row.as_chunks::<32>();
    let mut lanes = [f32::NEG_INFINITY; 32];
    for run in runs {
        for (largest, value) in lanes.iter_mut().zip(run) {
            let value = value.to_f32();
            *largest = if value > *largest { value } else { *largest };
        }
    }
    let rest = rest.iter().map(|value| value.to_f32());
    let largest = lanes.into_iter().chain(rest).fold(f32::NEG_INFINITY, f32::max);
    (largest, sum::of(row, |x| exp::<FUSED>(x - largest)))
}

#[expect(clippy::inline_always, reason = "inlined into every version of a kernel")]
#[inline(always)]
fn loss_of<E: Element>(label: E, largest: f32, denominator: f32) -> f64 {
    f64::from(denominator).ln() - f64::from(label.to_f32() - largest)
}

#[cfg(test)]
mod tests {
    use crate::testing::{assert_close, numbers};

    #[test]
    fn follows_the_formula() {
        for vocabulary in [2, 33, 500] {
            let logits: Vec<f32> = numbers(3 * vocabulary, 1).iter().map(|x| 8.0 * x).collect();
            let labels = [0, vocabulary as i64 - 1, vocabulary as i64 / 2];
            let (mut exact, mut exact_loss) = (Vec::new(), 0.0);
            for (row, &label) in logits.chunks(vocabulary).zip(&labels) {
                let total: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
                exact_loss -= (f64::from(row[label as usize]).exp() / total).ln();
                exact.extend(row.iter().enumerate().map(|(index, x)| {
                    f64::from(*x).exp() / total - f64::from(u8::from(index == label as usize))
                }));
            }
            let loss = super::loss(&logits, &labels);
            assert!((loss - exact_loss).abs() < 1e-5 * exact_loss, "{loss} is not {exact_loss}");
            let mut found = logits.clone();
            let loss = super::backward(&mut found, &labels);
            assert!((loss - exact_loss).abs() < 1e-5 * exact_loss, "{loss} is not {exact_loss}");
            assert_close(&found, &exact, 1e-6);
        }
    }

    #[test]
    fn nan_propagates() {
        let mut logits = vec![1.0_f32, f32::NAN, 2.0];
        assert!(super::backward(&mut logits, &[0]).is_nan());
        assert!(logits.iter().any(|value| value.is_nan()));
    }

    #[test]
    fn zero_rows_have_zero_loss() {
        assert!(super::loss::<f32>(&[], &[]) == 0.0);
    }
}
