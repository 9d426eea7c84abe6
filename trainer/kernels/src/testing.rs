//! Random numbers for tests, and their comparison.

use crate::{Element, dropout::mix};

/// Returns numbers in `[-1, 1)` that depend on the seed alone.
pub(crate) fn numbers(length: usize, seed: u64) -> Vec<f32> {
    (0..length as u64)
        .map(|index| {
            (mix(index.wrapping_add(mix(seed + 1))) >> 40) as f32 / f32::from(1_u16 << 15) / 256.0
                - 1.0
        })
        .collect()
}

/// Rounds to an element type.
pub(crate) fn rounded<E: Element>(values: &[f32]) -> Vec<E> {
    values.iter().map(|value| E::from_f32(*value)).collect()
}

/// Compares with exact values, relative to the largest of them.
#[track_caller]
pub(crate) fn assert_close(found: &[f32], exact: &[f64], tolerance: f64) {
    assert_eq!(found.len(), exact.len());
    let largest = exact.iter().fold(0.0, |largest: f64, value| largest.max(value.abs()));
    for (index, (found, exact)) in found.iter().zip(exact).enumerate() {
        let difference = (f64::from(*found) - exact).abs();
        assert!(
            difference <= tolerance * largest,
            "element {index}: {found} is not {exact} (largest {largest})"
        );
    }
}
