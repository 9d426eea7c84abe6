//! The sides of large products in the order in which register tiles read them: as words, side by side.

use std::{
    arch::x86_64::{_MM_HINT_T0, _mm_prefetch},
    ops::Range,
};

use crate::{
    gemm::{LANES, Multiplied, ROWS, interleave, words_of},
    matrix::{Matrix, Side},
    pool::{Pool, Shared},
    transpose::{SIDE, transpose_block},
};

/// Columns of one panel: three registers, whose tiles of 8 rows fill 24 of 32.
pub(crate) const PANEL: usize = 3 * LANES;
/// Columns of the left side that are transposed in one unit: two lines of the cache.
const LINE: usize = 64;
/// Words of rows that are asked for before they are read.
const AHEAD: usize = 8;

/// Returns what of a range starts after some and is not longer than others.
pub(crate) fn part(of: &Range<usize>, after: usize, length: usize) -> Range<usize> {
    let start = of.start + after;
    start..of.end.min(start + length)
}

/// A product that is summed with others.
pub(crate) type Term<'a, E> = (Side<'a, E>, Side<'a, E>);

/// Returns the depth of a term in words.
pub(crate) fn depth_of<E: Multiplied>((_, right): &Term<'_, E>) -> usize {
    right.size()[0].div_ceil(E::PER_WORD)
}

/// The left side of a term, as tiles read it.
pub(crate) struct Packed<'a> {
    pub data: &'a [u32],
    /// From one group of [`ROWS`] rows to the next.
    pub group: usize,
    /// From one row of a group to the next.
    pub stride: usize,
    /// From one word of a row to the next.
    pub step: usize,
    /// Its depth.
    pub words: usize,
}

impl<'a> Packed<'a> {
    /// Makes those of some terms; what was transposed lies in `packed`.
    pub(crate) fn of_terms<E: Multiplied>(
        terms: &[Term<'a, E>],
        rows: usize,
        mut packed: &'a [u32],
    ) -> Vec<Self> {
        let one = |term: &Term<'a, E>| match term.0 {
            Side::Plain(matrix) => Self {
                data: words_of(matrix.data),
                group: ROWS * matrix.stride / E::PER_WORD,
                stride: matrix.stride / E::PER_WORD,
                step: 1,
                words: matrix.columns / E::PER_WORD,
            },
            Side::Transposed(_) => {
                let words = depth_of(term);
                let (data, rest) = packed.split_at(rows.next_multiple_of(LINE) * words);
                packed = rest;
                Self { data, group: ROWS * words, stride: 1, step: ROWS, words }
            }
        };
        terms.iter().map(one).collect()
    }
}

/// Brings right sides of some columns into panels, and left sides that are to be transposed into
/// groups of rows if that is `wanted`.
pub(crate) fn pack<E: Multiplied>(
    pool: &dyn Pool,
    terms: &[Term<'_, E>],
    columns: Range<usize>,
    [left, right]: [&mut Vec<u32>; 2],
    wants_left: bool,
) {
    let mut lines = Vec::new();
    let mut length = 0;
    for term in terms.iter().filter(|_| wants_left) {
        if let Side::Transposed(matrix) = term.0 {
            for first in (0..matrix.columns).step_by(LINE) {
                lines.push((matrix, first, length));
                length += LINE * depth_of(term);
            }
        }
    }
    grow(left, length);
    let size = terms.iter().map(depth_of).sum::<usize>() * PANEL;
    grow(right, columns.len().div_ceil(PANEL) * size);
    let (left, right) = (Shared::new(left), Shared::new(right));
    pool.run(lines.len() + columns.len().div_ceil(2 * PANEL), &|unit| {
        #[expect(unsafe_code, reason = "units write side by side; for certain processors")]
        // SAFETY: these groups or panels belong to this unit, and the processor was asked.
        unsafe {
            match unit.checked_sub(lines.len()) {
                None => {
                    let (matrix, first, start) = lines[unit];
                    let end = start + LINE * matrix.rows.div_ceil(E::PER_WORD);
                    transpose_line(matrix, first, left.range(start..end));
                }
                Some(unit) => {
                    let columns = part(&columns, unit * 2 * PANEL, 2 * PANEL);
                    let end = 2 * unit + columns.len().div_ceil(PANEL);
                    let to = right.range(2 * unit * size..end * size);
                    if size > 0 {
                        pack_panels(terms, columns, to, size);
                    }
                }
            }
        }
    });
}

/// Writes [`LINE`] columns in groups of [`ROWS`], each `[words, ROWS]`, with zeros where there are
/// none.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn transpose_line<E: Multiplied>(matrix: Matrix<'_, E>, first: usize, to: &mut [u32]) {
    let words = matrix.rows.div_ceil(E::PER_WORD);
    let columns = first..matrix.columns.min(first + LINE);
    for word in 0..words {
        ask_ahead(matrix, word, columns.clone());
        let [first, second] = rows_of_word::<E, LINE>(matrix, word, columns.clone());
        for group in 0..LINE / ROWS {
            let to = &mut to[(group * words + word) * ROWS..][..ROWS];
            interleave(&first[group * ROWS..], &second[group * ROWS..], to);
        }
    }
}

/// Writes the right sides of some columns in panels of a size, each `[words, PANEL]` of one term
/// below those of another, with zeros where there are none.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn pack_panels<E: Multiplied>(
    terms: &[Term<'_, E>],
    columns: Range<usize>,
    to: &mut [u32],
    size: usize,
) {
    let mut start = 0;
    for term in terms {
        let range = start..start + depth_of(term) * PANEL;
        start = range.end;
        match term.1 {
            Side::Plain(matrix) => interleave_rows(matrix, columns.clone(), to, size, range),
            Side::Transposed(matrix) => {
                for (panel, to) in to.chunks_exact_mut(size).enumerate() {
                    let rows = part(&columns, panel * PANEL, PANEL);
                    transpose_rows(matrix, rows, &mut to[range.clone()]);
                }
            }
        }
    }
}

/// Writes words of rows to a range of each panel; panels lie `size` apart.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn interleave_rows<E: Multiplied>(
    matrix: Matrix<'_, E>,
    columns: Range<usize>,
    to: &mut [u32],
    size: usize,
    range: Range<usize>,
) {
    for (word, start) in range.step_by(PANEL).enumerate() {
        ask_ahead(matrix, word, columns.clone());
        for (panel, to) in to.chunks_exact_mut(size).enumerate() {
            let columns = part(&columns, panel * PANEL, PANEL);
            let [first, second] = rows_of_word::<E, PANEL>(matrix, word, columns);
            interleave(&first, &second, &mut to[start..start + PANEL]);
        }
    }
}

/// Returns some columns of the rows of a word, with zeros where there are none.
#[expect(clippy::inline_always, reason = "compiled with its caller's instructions")]
#[inline(always)]
fn rows_of_word<E: Multiplied, const WIDTH: usize>(
    matrix: Matrix<'_, E>,
    word: usize,
    columns: Range<usize>,
) -> [[E; WIDTH]; 2] {
    let mut both = [[E::default(); WIDTH]; 2];
    let rows = word * E::PER_WORD..matrix.rows.min((word + 1) * E::PER_WORD);
    for (row, to) in rows.zip(&mut both) {
        let from = &matrix.row(row)[columns.clone()];
        match <&[E; WIDTH]>::try_from(from) {
            Ok(from) => *to = *from,
            Err(_) => to[..from.len()].copy_from_slice(from),
        }
    }
    both
}

/// Asks for the rows that are read [`AHEAD`] words later.
#[expect(clippy::inline_always, reason = "compiled with its caller's instructions")]
#[inline(always)]
fn ask_ahead<E: Multiplied>(matrix: Matrix<'_, E>, word: usize, columns: Range<usize>) {
    let first = (word + AHEAD) * E::PER_WORD;
    for row in first..matrix.rows.min(first + E::PER_WORD) {
        prefetch(&matrix.row(row)[columns.clone()]);
    }
}

/// Writes words of a panel's columns, which are rows of the matrix.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn transpose_rows<E: Multiplied>(matrix: Matrix<'_, E>, rows: Range<usize>, to: &mut [u32]) {
    let [words, stride] = [matrix.columns, matrix.stride].map(|length| length / E::PER_WORD);
    let data = words_of(matrix.data);
    let whole = words / SIDE * SIDE;
    for part in (0..PANEL).step_by(SIDE) {
        let first = rows.start + part;
        let count = rows.end.saturating_sub(first).min(SIDE);
        if count == 0 {
            for to in to.chunks_exact_mut(PANEL) {
                to[part..part + SIDE].fill(0);
            }
            continue;
        }
        for word in (0..whole).step_by(SIDE) {
            for row in first + SIDE..matrix.rows.min(first + 2 * SIDE) {
                prefetch(&data[row * stride + word..][..1]);
            }
            let from = &data[first * stride + word..];
            transpose_block(from, stride, count, &mut to[word * PANEL + part..], PANEL);
        }
        for word in whole..words {
            let to = &mut to[word * PANEL + part..][..SIDE];
            for (index, to) in to.iter_mut().enumerate() {
                *to = if index < count { data[(first + index) * stride + word] } else { 0 };
            }
        }
    }
}

/// Asks for the lines of a slice.
#[expect(clippy::inline_always, reason = "compiled with its caller's instructions")]
#[inline(always)]
pub(crate) fn prefetch<T>(slice: &[T]) {
    let start = slice.as_ptr().cast::<i8>();
    for line in (0..size_of_val(slice)).step_by(64) {
        #[expect(unsafe_code, reason = "a hint that reads nothing")]
        // SAFETY: any address may be asked for.
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(start.wrapping_add(line));
        }
    }
}

/// Makes a buffer long enough; what is in it stays as it is.
pub(crate) fn grow<T: Default + Clone>(buffer: &mut Vec<T>, length: usize) {
    if buffer.len() < length {
        buffer.resize(length, T::default());
    }
}
