//! The sides of large products in the order in which register tiles read them: as words, side by side.

use std::{
    arch::x86_64::{_MM_HINT_T0, _mm_prefetch},
    ops::Range,
};

use crate::{
    Element,
    aligned::Buffer,
    gemm::{LANES, MicroKernel, interleave, words_of, write_words},
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

/// Returns the depth of a term in words, with those that fill it up.
pub(crate) fn depth_of<E: Element, K: MicroKernel>((_, right): &Term<'_, E>) -> usize {
    right.size()[0].div_ceil(K::PER_WORD).next_multiple_of(K::STEP)
}

/// The left side of a term, as tiles read it.
pub(crate) struct Packed<'a> {
    pub data: &'a [u32],
    /// From one group of [`MicroKernel::ROWS`] rows to the next.
    pub group: usize,
    /// From one row of a group to the next.
    pub stride: usize,
    /// From one word of a row to the next.
    pub step: usize,
    /// Its depth.
    pub words: usize,
}

impl<'a> Packed<'a> {
    /// Makes those of some terms; what could not be read where it lies is in `packed`.
    pub(crate) fn of_terms<E: Element, K: MicroKernel>(
        terms: &[Term<'a, E>],
        rows: usize,
        mut packed: &'a [u32],
    ) -> Vec<Self> {
        let one = |term: &Term<'a, E>| {
            let words = depth_of::<E, K>(term);
            if let Some(matrix) = in_place::<E, K>(term) {
                let stride = matrix.stride / K::PER_WORD;
                let data = words_of(matrix.data);
                return Self { data, group: K::ROWS * stride, stride, step: 1, words };
            }
            let (data, rest) = packed.split_at(rows.next_multiple_of(LINE) * words);
            packed = rest;
            let (stride, step) = if lies_in_rows::<E, K>(term) { (words, 1) } else { (1, K::ROWS) };
            Self { data, group: K::ROWS * words, stride, step, words }
        };
        terms.iter().map(one).collect()
    }
}

/// Returns a left side that is read where it lies: as words, in whole steps that start where a step may.
pub(crate) fn in_place<'a, E: Element, K: MicroKernel>(
    term: &Term<'a, E>,
) -> Option<Matrix<'a, E>> {
    match term.0 {
        Side::Plain(matrix) => {
            let step = K::PER_WORD * K::STEP;
            let is_whole = matrix.columns.is_multiple_of(step)
                && matrix.stride.is_multiple_of(step)
                && matrix.data.as_ptr().addr().is_multiple_of(step * size_of::<E>());
            (K::reads::<E>() && is_whole).then_some(matrix)
        }
        Side::Transposed(_) => None,
    }
}

/// Tells whether a packed left side has the words of a row side by side, or those of a group's rows.
fn lies_in_rows<E: Element, K: MicroKernel>((left, _): &Term<'_, E>) -> bool {
    K::READS_ROWS || matches!(left, Side::Plain(_))
}

/// Brings right sides of some columns into panels, and left sides that cannot be read where they lie
/// into words if `wants_left`.
pub(crate) fn pack<E: Element, K: MicroKernel>(
    pool: &dyn Pool,
    terms: &[Term<'_, E>],
    columns: Range<usize>,
    [left, right]: [&mut Buffer<u32>; 2],
    wants_left: bool,
) {
    let mut lines = Vec::new();
    let mut length = 0;
    for term in terms.iter().filter(|term| wants_left && in_place::<E, K>(term).is_none()) {
        for first in (0..term.0.size()[0]).step_by(LINE) {
            let words = LINE * depth_of::<E, K>(term);
            lines.push((term.0, first, length..length + words));
            length += words;
        }
    }
    left.grow(length);
    let size = terms.iter().map(depth_of::<E, K>).sum::<usize>() * PANEL;
    right.grow(columns.len().div_ceil(PANEL) * size);
    let (left, right) = (Shared::new(left), Shared::new(right));
    pool.run(lines.len() + columns.len().div_ceil(2 * PANEL), &|unit| {
        #[expect(unsafe_code, reason = "units write side by side; for certain processors")]
        // SAFETY: these groups or panels belong to this unit, and the processor was asked.
        unsafe {
            match unit.checked_sub(lines.len()) {
                None => {
                    let (side, first, range) = &lines[unit];
                    let to = left.range(range.clone());
                    match side {
                        Side::Plain(matrix) => widen_rows::<E, K>(*matrix, *first, to),
                        Side::Transposed(matrix) if K::READS_ROWS => {
                            transpose_line_to_rows::<E, K>(*matrix, *first, to);
                        }
                        Side::Transposed(matrix) => transpose_line::<E, K>(*matrix, *first, to),
                    }
                }
                Some(unit) => {
                    let columns = part(&columns, unit * 2 * PANEL, 2 * PANEL);
                    let end = 2 * unit + columns.len().div_ceil(PANEL);
                    let to = right.range(2 * unit * size..end * size);
                    if size > 0 {
                        pack_panels::<E, K>(terms, columns, to, size);
                    }
                }
            }
        }
    });
}

/// Writes [`LINE`] rows of words, filled up with zeros.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn widen_rows<E: Element, K: MicroKernel>(matrix: Matrix<'_, E>, first: usize, to: &mut [u32]) {
    let words = to.len() / LINE;
    for (row, to) in (first..matrix.rows).zip(to.chunks_exact_mut(words.max(1))) {
        let (pairs, rest) = to.split_at_mut(matrix.columns / K::PER_WORD);
        write_words::<E, K>(matrix.row(row), pairs);
        rest.fill(0);
    }
}

/// Writes [`LINE`] columns as rows of words, filled up with zeros.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn transpose_line_to_rows<E: Element, K: MicroKernel>(
    matrix: Matrix<'_, E>,
    first: usize,
    to: &mut [u32],
) {
    let words = to.len() / LINE;
    let columns = first..matrix.columns.min(first + LINE);
    let mut block = [0; SIDE * LINE]; // [words, columns]
    for start in (0..words).step_by(SIDE) {
        for (index, block) in block.chunks_exact_mut(LINE).enumerate() {
            ask_ahead::<E, K>(matrix, start + index, columns.clone());
            let [first, second] =
                rows_of_word::<E, K, LINE>(matrix, start + index, columns.clone());
            interleave::<E, K>(&first, &second, block);
        }
        for column in (0..LINE).step_by(SIDE) {
            let to = &mut to[column * words + start..];
            transpose_block(&block[column..], LINE, SIDE, to, words);
        }
    }
}

/// Writes [`LINE`] columns in groups of [`MicroKernel::ROWS`], each `[words, ROWS]`, with zeros where
/// there are none.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn transpose_line<E: Element, K: MicroKernel>(matrix: Matrix<'_, E>, first: usize, to: &mut [u32]) {
    let words = matrix.rows.div_ceil(K::PER_WORD);
    let columns = first..matrix.columns.min(first + LINE);
    for word in 0..words {
        ask_ahead::<E, K>(matrix, word, columns.clone());
        let [first, second] = rows_of_word::<E, K, LINE>(matrix, word, columns.clone());
        for group in 0..LINE / K::ROWS {
            let to = &mut to[(group * words + word) * K::ROWS..][..K::ROWS];
            interleave::<E, K>(&first[group * K::ROWS..], &second[group * K::ROWS..], to);
        }
    }
}

/// Writes the right sides of some columns in panels of a size, each `[words, PANEL]` of one term
/// below those of another, with zeros where there are none.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn pack_panels<E: Element, K: MicroKernel>(
    terms: &[Term<'_, E>],
    columns: Range<usize>,
    to: &mut [u32],
    size: usize,
) {
    let mut start = 0;
    for term in terms {
        let range = start..start + depth_of::<E, K>(term) * PANEL;
        start = range.end;
        match term.1 {
            Side::Plain(matrix) => {
                interleave_rows::<E, K>(matrix, columns.clone(), to, size, range);
            }
            Side::Transposed(matrix) => {
                for (panel, to) in to.chunks_exact_mut(size).enumerate() {
                    let rows = part(&columns, panel * PANEL, PANEL);
                    transpose_rows::<E, K>(matrix, rows, &mut to[range.clone()]);
                }
            }
        }
    }
}

/// Writes words of rows to a range of each panel; panels lie `size` apart.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn interleave_rows<E: Element, K: MicroKernel>(
    matrix: Matrix<'_, E>,
    columns: Range<usize>,
    to: &mut [u32],
    size: usize,
    range: Range<usize>,
) {
    for (word, start) in range.step_by(PANEL).enumerate() {
        ask_ahead::<E, K>(matrix, word, columns.clone());
        for (panel, to) in to.chunks_exact_mut(size).enumerate() {
            let columns = part(&columns, panel * PANEL, PANEL);
            let [first, second] = rows_of_word::<E, K, PANEL>(matrix, word, columns);
            interleave::<E, K>(&first, &second, &mut to[start..start + PANEL]);
        }
    }
}

/// Returns some columns of the rows of a word, with zeros where there are none.
#[expect(clippy::inline_always, reason = "compiled with its caller's instructions")]
#[inline(always)]
fn rows_of_word<E: Element, K: MicroKernel, const WIDTH: usize>(
    matrix: Matrix<'_, E>,
    word: usize,
    columns: Range<usize>,
) -> [[E; WIDTH]; 2] {
    let mut both = [[E::default(); WIDTH]; 2];
    let rows = word * K::PER_WORD..matrix.rows.min((word + 1) * K::PER_WORD);
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
fn ask_ahead<E: Element, K: MicroKernel>(
    matrix: Matrix<'_, E>,
    word: usize,
    columns: Range<usize>,
) {
    let first = (word + AHEAD) * K::PER_WORD;
    for row in first..matrix.rows.min(first + K::PER_WORD) {
        prefetch(&matrix.row(row)[columns.clone()]);
    }
}

/// Writes words of a panel's columns, which are rows of the matrix, filled up with zeros.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn transpose_rows<E: Element, K: MicroKernel>(
    matrix: Matrix<'_, E>,
    rows: Range<usize>,
    to: &mut [u32],
) {
    let words = matrix.columns / K::PER_WORD;
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
                prefetch(&matrix.row(row)[word * K::PER_WORD..][..1]);
            }
            let to = &mut to[word * PANEL + part..];
            if K::reads::<E>() {
                let stride = matrix.stride / K::PER_WORD;
                let from = &words_of(matrix.data)[first * stride + word..];
                transpose_block(from, stride, count, to, PANEL);
            } else {
                let mut block = [0; SIDE * SIDE];
                for (row, block) in (first..first + count).zip(block.chunks_exact_mut(SIDE)) {
                    write_words::<E, K>(&matrix.row(row)[word * K::PER_WORD..], block);
                }
                transpose_block(&block, SIDE, count, to, PANEL);
            }
        }
        for (word, to) in to.chunks_exact_mut(PANEL).enumerate().skip(whole) {
            let to = &mut to[part..part + SIDE];
            to.fill(0);
            for (row, to) in (first..first + count).zip(to) {
                write_words::<E, K>(
                    &matrix.row(row)[(word * K::PER_WORD).min(matrix.columns)..],
                    std::slice::from_mut(to),
                );
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
