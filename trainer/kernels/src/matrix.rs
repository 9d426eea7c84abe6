//! Matrices of bf16 where they lie.

use std::ops::Range;

use half::bf16;

/// A matrix in rows, perhaps some columns of a wider one.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    /// From its first element to its last.
    pub data: &'a [bf16],
    /// Its rows, `T`.
    pub rows: usize,
    /// Its columns, `K`.
    pub columns: usize,
    /// From one row to the next.
    pub stride: usize,
}

impl Matrix<'_> {
    /// Returns some of it.
    pub(crate) fn part(self, rows: Range<usize>, columns: Range<usize>) -> Self {
        let start = rows.start * self.stride + columns.start;
        let data = self.data.get(start..).unwrap_or_default();
        Self { data, rows: rows.len(), columns: columns.len(), stride: self.stride }
    }

    /// Panics if a row could lie outside.
    pub(crate) fn check(&self) {
        let last = self.rows.checked_sub(1);
        let extent = last.map_or(0, |last| last * self.stride + self.columns);
        assert!(self.columns <= self.stride && self.data.len() >= extent);
    }

    /// Panics if neighbours of a row are no pairs in the same places in all rows.
    pub(crate) fn check_pairs(&self) {
        assert!(self.columns.is_multiple_of(2) && self.stride.is_multiple_of(2));
    }
}
