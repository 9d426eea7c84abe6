//! Matrices where they lie.

use std::ops::Range;

/// A matrix in rows, perhaps some columns of a wider one.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a, E> {
    /// From its first element to its last.
    pub data: &'a [E],
    /// Its rows, `T`.
    pub rows: usize,
    /// Its columns, `K`.
    pub columns: usize,
    /// From one row to the next.
    pub stride: usize,
}

impl<'a, E: Copy> Matrix<'a, E> {
    /// Returns a row.
    pub(crate) fn row(self, row: usize) -> &'a [E] {
        &self.data[row * self.stride..][..self.columns]
    }

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

    /// Panics if neighbours of a row are no words of so many in the same places in all rows.
    pub(crate) fn check_words(&self, per_word: usize) {
        assert!(self.columns.is_multiple_of(per_word) && self.stride.is_multiple_of(per_word));
    }
}

/// One side of a product.
#[derive(Debug, Clone, Copy)]
pub enum Side<'a, E> {
    /// As it is multiplied.
    Plain(Matrix<'a, E>),
    /// To be transposed.
    Transposed(Matrix<'a, E>),
}

impl<E: Copy> Side<'_, E> {
    /// Returns some rows of it as it is multiplied.
    pub(crate) fn rows(self, range: Range<usize>) -> Self {
        match self {
            Self::Plain(matrix) => Self::Plain(matrix.part(range, 0..matrix.columns)),
            Self::Transposed(matrix) => Self::Transposed(matrix.part(0..matrix.rows, range)),
        }
    }

    /// Returns some columns of it as it is multiplied.
    pub(crate) fn columns(self, range: Range<usize>) -> Self {
        match self {
            Self::Plain(matrix) => Self::Plain(matrix.part(0..matrix.rows, range)),
            Self::Transposed(matrix) => Self::Transposed(matrix.part(range, 0..matrix.columns)),
        }
    }

    /// Returns its size as it is multiplied.
    pub(crate) fn size(&self) -> [usize; 2] {
        match self {
            Self::Plain(matrix) => [matrix.rows, matrix.columns],
            Self::Transposed(matrix) => [matrix.columns, matrix.rows],
        }
    }
}
