//! Views of matrices in memory.

use std::ops::Range;

/// A row-major matrix, which may be a column slice of a wider one.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a, E> {
    /// The elements from the first to the last, including those between rows.
    pub data: &'a [E],
    /// The number of rows.
    pub rows: usize,
    /// The number of columns.
    pub columns: usize,
    /// The distance of rows, in elements.
    pub stride: usize,
}

impl<'a, E: Copy> Matrix<'a, E> {
    /// Returns a row.
    pub(crate) fn row(self, row: usize) -> &'a [E] {
        &self.data[row * self.stride..][..self.columns]
    }

    /// Returns a block of the matrix.
    pub(crate) fn block(self, rows: Range<usize>, columns: Range<usize>) -> Self {
        let start = rows.start * self.stride + columns.start;
        let data = self.data.get(start..).unwrap_or_default();
        Self { data, rows: rows.len(), columns: columns.len(), stride: self.stride }
    }

    /// Panics if a row is out of bounds.
    pub(crate) fn check(&self) {
        let last = self.rows.checked_sub(1);
        let extent = last.map_or(0, |last| last * self.stride + self.columns);
        assert!(self.columns <= self.stride && self.data.len() >= extent);
    }

    /// Panics unless each row consists of whole words of `per_word` elements.
    pub(crate) fn check_words(&self, per_word: usize) {
        assert!(self.columns.is_multiple_of(per_word) && self.stride.is_multiple_of(per_word));
    }
}

/// One operand of a matrix product.
#[derive(Debug, Clone, Copy)]
pub enum Operand<'a, E> {
    /// The matrix itself.
    Plain(Matrix<'a, E>),
    /// The transpose of the matrix.
    Transposed(Matrix<'a, E>),
}

impl<E: Copy> Operand<'_, E> {
    /// Returns some rows of the operand.
    pub(crate) fn rows(self, range: Range<usize>) -> Self {
        match self {
            Self::Plain(matrix) => Self::Plain(matrix.block(range, 0..matrix.columns)),
            Self::Transposed(matrix) => Self::Transposed(matrix.block(0..matrix.rows, range)),
        }
    }

    /// Returns some columns of the operand.
    pub(crate) fn columns(self, range: Range<usize>) -> Self {
        match self {
            Self::Plain(matrix) => Self::Plain(matrix.block(0..matrix.rows, range)),
            Self::Transposed(matrix) => Self::Transposed(matrix.block(range, 0..matrix.columns)),
        }
    }

    /// Returns the rows and columns of the operand.
    pub(crate) fn size(&self) -> [usize; 2] {
        match self {
            Self::Plain(matrix) => [matrix.rows, matrix.columns],
            Self::Transposed(matrix) => [matrix.columns, matrix.rows],
        }
    }
}
