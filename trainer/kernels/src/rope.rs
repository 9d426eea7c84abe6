//! Rotary position embedding, in place: half of each head rotated against the other half.

use crate::versions::versions;

versions! {
    /// Rotates rows by their angles, or back if `direction` is −1.
    ///
    /// # Shapes
    /// `x` is `[rows, heads · E]`, `cos` and `sin` are `[rows, E/2]` with `half = E/2`.
    pub fn rotate<E>(x: &mut [E], cos: &[E], sin: &[E], row_width: usize, half: usize, direction: f32) {
        let rows = x.chunks_exact_mut(row_width).zip(cos.chunks_exact(half)).zip(sin.chunks_exact(half));
        for ((row, cos), sin) in rows {
            for head in row.chunks_exact_mut(2 * half) {
                let (first, second) = head.split_at_mut(half);
                for (((first, second), &cos), &sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                    let (cos, sin) = (cos.to_f32(), sin.to_f32() * direction);
                    let (a, b) = (first.to_f32(), second.to_f32());
                    *first = E::from_f32(a * cos - b * sin);
                    *second = E::from_f32(b * cos + a * sin);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::{assert_close, numbers};

    #[test]
    fn rotates_and_rotates_back() {
        for half in [1, 4, 32, 40] {
            let (rows, heads) = (3, 2);
            let x = numbers(rows * heads * 2 * half, 1);
            let angles = numbers(rows * half, 2);
            let cos: Vec<f32> = angles.iter().map(|angle| angle.cos()).collect();
            let sin: Vec<f32> = angles.iter().map(|angle| angle.sin()).collect();
            let mut found = x.clone();
            super::rotate(&mut found, &cos, &sin, heads * 2 * half, half, 1.0);
            let mut exact = Vec::new();
            for (row, angles) in x.chunks(heads * 2 * half).zip(angles.chunks(half)) {
                for head in row.chunks(2 * half) {
                    for index in 0..2 * half {
                        let angle = f64::from(angles[index % half]);
                        let (own, other) =
                            (f64::from(head[index]), f64::from(head[(index + half) % (2 * half)]));
                        let sign = if index < half { -1.0 } else { 1.0 };
                        exact.push(own * angle.cos() + sign * other * angle.sin());
                    }
                }
            }
            assert_close(&found, &exact, 1e-6);
            super::rotate(&mut found, &cos, &sin, heads * 2 * half, half, -1.0);
            let back: Vec<f64> = x.iter().copied().map(f64::from).collect();
            assert_close(&found, &back, 1e-6);
        }
    }
}
