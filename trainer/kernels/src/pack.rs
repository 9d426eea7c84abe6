//! Packs the operands of large products in the order in which register tiles read them.

use std::{
    arch::x86_64::{_MM_HINT_T0, _mm_prefetch},
    ops::Range,
};

use crate::{
    Element,
    aligned::Buffer,
    gemm::{LANES, MicroKernel, interleave, words_of, write_words},
    matrix::{Matrix, Operand},
    pool::{Pool, Shared},
    transpose::{BLOCK_SIDE, transpose_block},
};

/// Columns of one panel: three registers, so that tiles of 8 rows fill 24 of 32 registers.
pub(crate) const PANEL: usize = 3 * LANES;
/// Columns of the left operand that are transposed in one task: two cache lines.
const LINE: usize = 64;
/// Rows of words between a prefetch and its use.
const PREFETCH_DISTANCE: usize = 8;

/// Returns the part of a range that starts at an offset and has at most this length.
pub(crate) fn part(range: &Range<usize>, offset: usize, length: usize) -> Range<usize> {
    let start = range.start + offset;
    start..range.end.min(start + length)
}

/// One term of a sum of products: its left and right operands.
pub(crate) type Term<'a, E> = (Operand<'a, E>, Operand<'a, E>);

/// Returns the depth of a term in words, with padding.
pub(crate) fn depth_of<E: Element, K: MicroKernel>((_, right): &Term<'_, E>) -> usize {
    right.size()[0].div_ceil(K::PER_WORD).next_multiple_of(K::STEP)
}

/// The left operand of a term, as tiles read it.
pub(crate) struct Packed<'a> {
    pub data: &'a [u32],
    /// The distance of groups of [`MicroKernel::ROWS`] rows, in words.
    pub group: usize,
    /// The distance of rows of a group, in words.
    pub stride: usize,
    /// The distance of adjacent words of a row, in words.
    pub step: usize,
    /// The depth, in words.
    pub words: usize,
}

impl<'a> Packed<'a> {
    /// Returns the left operands of terms; those that cannot be read in place are in `packed`.
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
            let (stride, step) =
                if is_packed_by_row::<E, K>(term) { (words, 1) } else { (1, K::ROWS) };
            Self { data, group: K::ROWS * words, stride, step, words }
        };
        terms.iter().map(one).collect()
    }
}

/// Returns the left operand if it can be read in place: as words, in whole and aligned steps.
pub(crate) fn in_place<'a, E: Element, K: MicroKernel>(
    term: &Term<'a, E>,
) -> Option<Matrix<'a, E>> {
    match term.0 {
        Operand::Plain(matrix) => {
            let step = K::PER_WORD * K::STEP;
            let is_whole = matrix.columns.is_multiple_of(step)
                && matrix.stride.is_multiple_of(step)
                && matrix.data.as_ptr().addr().is_multiple_of(step * size_of::<E>());
            (K::reads::<E>() && is_whole).then_some(matrix)
        }
        Operand::Transposed(_) => None,
    }
}

/// Reports whether the words of a row are contiguous in a packed left operand; if not, the words of
/// a group's rows are.
fn is_packed_by_row<E: Element, K: MicroKernel>((left, _): &Term<'_, E>) -> bool {
    K::NEEDS_ROW_MAJOR_LEFT || matches!(left, Operand::Plain(_))
}

/// Packs some columns of the right operands into panels and, if `packs_left`, the left operands
/// that cannot be read in place into words.
pub(crate) fn pack<E: Element, K: MicroKernel>(
    pool: &dyn Pool,
    terms: &[Term<'_, E>],
    columns: Range<usize>,
    [left, right]: [&mut Buffer<u32>; 2],
    packs_left: bool,
) {
    let mut lines = Vec::new();
    let mut length = 0;
    for term in terms.iter().filter(|term| packs_left && in_place::<E, K>(term).is_none()) {
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
    pool.run(lines.len() + columns.len().div_ceil(2 * PANEL), &|task| {
        #[expect(
            unsafe_code,
            reason = "tasks write to disjoint ranges; needs certain CPU features"
        )]
        // SAFETY: these groups or panels belong to this task, and the CPU was checked.
        unsafe {
            match task.checked_sub(lines.len()) {
                None => {
                    let (operand, first, range) = &lines[task];
                    let to = left.range(range.clone());
                    match operand {
                        Operand::Plain(matrix) => pack_rows::<E, K>(*matrix, *first, to),
                        Operand::Transposed(matrix) if K::NEEDS_ROW_MAJOR_LEFT => {
                            transpose_line_to_rows::<E, K>(*matrix, *first, to);
                        }
                        Operand::Transposed(matrix) => transpose_line::<E, K>(*matrix, *first, to),
                    }
                }
                Some(task) => {
                    let columns = part(&columns, task * 2 * PANEL, 2 * PANEL);
                    let end = 2 * task + columns.len().div_ceil(PANEL);
                    let to = right.range(2 * task * size..end * size);
                    if size > 0 {
                        pack_panels::<E, K>(terms, columns, to, size);
                    }
                }
            }
        }
    });
}

/// Packs [`LINE`] rows of words, padded with zeros.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn pack_rows<E: Element, K: MicroKernel>(matrix: Matrix<'_, E>, first: usize, to: &mut [u32]) {
    let words = to.len() / LINE;
    for (row, to) in (first..matrix.rows).zip(to.chunks_exact_mut(words.max(1))) {
        let (pairs, rest) = to.split_at_mut(matrix.columns / K::PER_WORD);
        write_words::<E, K>(matrix.row(row), pairs);
        rest.fill(0);
    }
}

/// Packs [`LINE`] columns as rows of words, padded with zeros.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn transpose_line_to_rows<E: Element, K: MicroKernel>(
    matrix: Matrix<'_, E>,
    first: usize,
    to: &mut [u32],
) {
    let words = to.len() / LINE;
    let columns = first..matrix.columns.min(first + LINE);
    let mut block = [0; BLOCK_SIDE * LINE]; // [words, columns]
    for start in (0..words).step_by(BLOCK_SIDE) {
        for (index, block) in block.chunks_exact_mut(LINE).enumerate() {
            prefetch_rows::<E, K>(matrix, start + index, columns.clone());
            let [first, second] =
                rows_of_word::<E, K, LINE>(matrix, start + index, columns.clone());
            interleave::<E, K>(&first, &second, block);
        }
        for column in (0..LINE).step_by(BLOCK_SIDE) {
            let to = &mut to[column * words + start..];
            transpose_block(&block[column..], LINE, BLOCK_SIDE, to, words);
        }
    }
}

/// Packs [`LINE`] columns in groups of [`MicroKernel::ROWS`], each `[words, ROWS]`, padded with
/// zeros.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn transpose_line<E: Element, K: MicroKernel>(matrix: Matrix<'_, E>, first: usize, to: &mut [u32]) {
    let words = matrix.rows.div_ceil(K::PER_WORD);
    let columns = first..matrix.columns.min(first + LINE);
    for word in 0..words {
        prefetch_rows::<E, K>(matrix, word, columns.clone());
        let [first, second] = rows_of_word::<E, K, LINE>(matrix, word, columns.clone());
        for group in 0..LINE / K::ROWS {
            let to = &mut to[(group * words + word) * K::ROWS..][..K::ROWS];
            interleave::<E, K>(&first[group * K::ROWS..], &second[group * K::ROWS..], to);
        }
    }
}

/// Packs some columns of the right operands into panels of `size` words, each `[words, PANEL]` with
/// the terms one below the other, padded with zeros.
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
            Operand::Plain(matrix) => {
                interleave_rows::<E, K>(matrix, columns.clone(), to, size, range);
            }
            Operand::Transposed(matrix) => {
                for (panel, to) in to.chunks_exact_mut(size).enumerate() {
                    let rows = part(&columns, panel * PANEL, PANEL);
                    transpose_rows::<E, K>(matrix, rows, &mut to[range.clone()]);
                }
            }
        }
    }
}

/// Packs adjacent rows as words into a range of each panel; panels are `size` words apart.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn interleave_rows<E: Element, K: MicroKernel>(
    matrix: Matrix<'_, E>,
    columns: Range<usize>,
    to: &mut [u32],
    size: usize,
    range: Range<usize>,
) {
    for (word, start) in range.step_by(PANEL).enumerate() {
        prefetch_rows::<E, K>(matrix, word, columns.clone());
        for (panel, to) in to.chunks_exact_mut(size).enumerate() {
            let columns = part(&columns, panel * PANEL, PANEL);
            let [first, second] = rows_of_word::<E, K, PANEL>(matrix, word, columns);
            interleave::<E, K>(&first, &second, &mut to[start..start + PANEL]);
        }
    }
}

/// Returns some columns of the rows that form a row of words, padded with zeros.
#[expect(clippy::inline_always, reason = "inlined into functions with target features")]
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

/// Prefetches the rows that are read [`PREFETCH_DISTANCE`] words later.
#[expect(clippy::inline_always, reason = "inlined into functions with target features")]
#[inline(always)]
fn prefetch_rows<E: Element, K: MicroKernel>(
    matrix: Matrix<'_, E>,
    word: usize,
    columns: Range<usize>,
) {
    let first = (word + PREFETCH_DISTANCE) * K::PER_WORD;
    for row in first..matrix.rows.min(first + K::PER_WORD) {
        prefetch(&matrix.row(row)[columns.clone()]);
    }
}

/// Packs the columns of a panel, which are rows of the matrix, as words, padded with zeros.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn transpose_rows<E: Element, K: MicroKernel>(
    matrix: Matrix<'_, E>,
    rows: Range<usize>,
    to: &mut [u32],
) {
    let words = matrix.columns / K::PER_WORD;
    let whole = words / BLOCK_SIDE * BLOCK_SIDE;
    for part in (0..PANEL).step_by(BLOCK_SIDE) {
        let first = rows.start + part;
        let count = rows.end.saturating_sub(first).min(BLOCK_SIDE);
        if count == 0 {
            for to in to.chunks_exact_mut(PANEL) {
                to[part..part + BLOCK_SIDE].fill(0);
            }
            continue;
        }
        for word in (0..whole).step_by(BLOCK_SIDE) {
            for row in first + BLOCK_SIDE..matrix.rows.min(first + 2 * BLOCK_SIDE) {
                prefetch(&matrix.row(row)[word * K::PER_WORD..][..1]);
            }
            let to = &mut to[word * PANEL + part..];
            if K::reads::<E>() {
                let stride = matrix.stride / K::PER_WORD;
                let from = &words_of(matrix.data)[first * stride + word..];
                transpose_block(from, stride, count, to, PANEL);
            } else {
                let mut block = [0; BLOCK_SIDE * BLOCK_SIDE];
                for (row, block) in (first..first + count).zip(block.chunks_exact_mut(BLOCK_SIDE)) {
                    write_words::<E, K>(&matrix.row(row)[word * K::PER_WORD..], block);
                }
                transpose_block(&block, BLOCK_SIDE, count, to, PANEL);
            }
        }
        for (word, to) in to.chunks_exact_mut(PANEL).enumerate().skip(whole) {
            let to = &mut to[part..part + BLOCK_SIDE];
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

/// Prefetches the cache lines of a slice.
#[expect(clippy::inline_always, reason = "inlined into functions with target features")]
#[inline(always)]
pub(crate) fn prefetch<T>(slice: &[T]) {
    let start = slice.as_ptr().cast::<i8>();
    for line in (0..size_of_val(slice)).step_by(64) {
        #[expect(unsafe_code, reason = "a hint that reads nothing")]
        // SAFETY: any address may be prefetched.
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(start.wrapping_add(line));
        }
    }
}
