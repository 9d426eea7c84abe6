//! Products with a low-rank factor: a LoRA adapter's update of a layer, and its gradients.
//!
//! These products are limited by memory bandwidth. The large matrix is read once and in place,
//! where a general product would read and write it several times.

use std::cell::RefCell;

use crate::{
    Element,
    aligned::{Aligned, Buffer},
    choice::{GemmElement, by_kernel},
    gemm::{LANES, MicroKernel, ReleaseGuard, Words, interleave, words_of, write_words},
    matrix::{Matrix, Operand},
    pool::{Pool, Shared},
};

/// Rows of one task of [`multiply`].
const ROWS: usize = 128;
/// Rows and columns of sums that fit in the L1 cache.
const SUMS_TILE: [usize; 2] = [16, 512];
/// Rows of the operands that [`add_outer`] packs into words at once.
const DEPTH: usize = 64;
/// The largest number of tasks of [`add_outer`], each with its own sums.
const MAX_TASKS: usize = 8;
/// With a higher rank, a general product is as fast.
const MAX_RANK: usize = 128;

/// Reports whether the kernels support a layer's width and the sum of its adapters' ranks on this
/// CPU.
pub fn is_supported<E: GemmElement>(width: usize, rank: usize) -> bool {
    width.is_multiple_of(LANES)
        && rank.is_multiple_of(size_of::<u32>() / size_of::<E>())
        && rank <= MAX_RANK
        && E::kernel().is_some()
}

/// A mutable row-major matrix, which may be a column slice of a wider one.
#[derive(Debug)]
pub struct MatrixMut<'a, E> {
    /// The elements from the first to the last, including those between rows.
    pub data: &'a mut [E],
    /// The number of columns, `N`.
    pub columns: usize,
    /// The distance of rows, in elements.
    pub stride: usize,
}

/// Writes `scale · left · factor` to `to`, or adds it.
///
/// # Shapes
/// `left` is `[T, K]`, `to` is `[T, N]`.
///
/// # Panics
/// If a size is wrong, or the CPU is not supported ([`is_supported`]).
pub fn multiply<E: GemmElement, const ADD: bool>(
    pool: &dyn Pool,
    left: Matrix<'_, E>,
    factor: Operand<'_, E>,
    scale: f32,
    to: MatrixMut<'_, E>,
) {
    by_kernel!(E, K => multiply_with::<E, K, ADD>(pool, left, factor, scale, to));
}

fn multiply_with<E: Element, K: MicroKernel, const ADD: bool>(
    pool: &dyn Pool,
    left: Matrix<'_, E>,
    factor: Operand<'_, E>,
    scale: f32,
    to: MatrixMut<'_, E>,
) {
    assert!(K::is_supported());
    let MatrixMut { data, columns, stride } = to;
    let (rows, length) = (left.rows, data.len());
    assert!(columns <= stride && (rows == 0 || length == (rows - 1) * stride + columns));
    PACKED.with_borrow_mut(|words| {
        let right = Packed::new::<E, K>(factor, left.columns, columns, words);
        let data = Shared::new(data);
        pool.run(rows.div_ceil(ROWS), &|task| {
            let range = task * ROWS..rows.min((task + 1) * ROWS);
            #[expect(
                unsafe_code,
                reason = "tasks write to disjoint ranges; needs certain CPU features"
            )]
            // SAFETY: these rows belong to this task, and the CPU was checked.
            unsafe {
                let _release = ReleaseGuard::<K>::new();
                let data = data.range(range.start * stride..length.min(range.end * stride));
                let mut to = MatrixMut { data, columns, stride };
                right.multiply::<E, K, ADD>(left, range, scale, &mut to);
            }
        });
    });
}

/// Adds `leftᵀ · right` to `grad`, fp32.
///
/// # Shapes
/// `left` is `[T, R]`, `right` is `[T, N]`. `grad` is `[R, N]`, or `[N, R]` if `TRANSPOSED`.
///
/// # Panics
/// If a size is wrong, or the CPU is not supported ([`is_supported`]).
pub fn add_outer<E: GemmElement, const TRANSPOSED: bool>(
    pool: &dyn Pool,
    left: Matrix<'_, E>,
    right: Matrix<'_, E>,
    grad: &mut [f32],
) {
    by_kernel!(E, K => add_outer_with::<E, K, TRANSPOSED>(pool, left, right, grad));
}

fn add_outer_with<E: Element, K: MicroKernel, const TRANSPOSED: bool>(
    pool: &dyn Pool,
    left: Matrix<'_, E>,
    right: Matrix<'_, E>,
    grad: &mut [f32],
) {
    assert!(K::is_supported());
    assert_eq!(grad.len(), left.columns * right.columns);
    let rows = right.rows;
    assert_eq!(rows, left.rows);
    if rows == 0 || grad.is_empty() {
        return;
    }
    // The division into tasks does not depend on the number of threads, so neither does the sum.
    let rows_per_task = rows.div_ceil(MAX_TASKS).next_multiple_of(DEPTH).max(DEPTH);
    let tasks = rows.div_ceil(rows_per_task);
    SUMS.with_borrow_mut(|sums| {
        sums.set_zero(tasks * grad.len());
        let shared = Shared::new(sums);
        pool.run(tasks, &|task| {
            let range = task * rows_per_task..rows.min((task + 1) * rows_per_task);
            #[expect(
                unsafe_code,
                reason = "tasks write to disjoint ranges; needs certain CPU features"
            )]
            // SAFETY: these sums belong to this task, and the CPU was checked.
            WORDS.with_borrow_mut(|words| unsafe {
                let _release = ReleaseGuard::<K>::new();
                let sums = shared.range(task * grad.len()..(task + 1) * grad.len());
                outer::<E, K>(left, right, range, sums, words);
            });
        });
        let (total, others) = sums.split_at_mut(grad.len());
        others.chunks_exact(grad.len()).for_each(|sums| crate::sum::add(total, sums));
        if TRANSPOSED {
            for (column, grad) in grad.chunks_exact_mut(left.columns).enumerate() {
                let sums = total[column..].iter().step_by(right.columns);
                grad.iter_mut().zip(sums).for_each(|(grad, sum)| *grad += sum);
            }
        } else {
            crate::sum::add(grad, total);
        }
    });
}

// Reused by each thread: fresh memory costs page faults, and freeing it stalls the other threads.
thread_local! {
    static PACKED: RefCell<Buffer<u32>> = const { RefCell::new(Buffer::new()) };
    static SUMS: RefCell<Buffer<f32>> = const { RefCell::new(Buffer::new()) };
    static WORDS: RefCell<[Buffer<u32>; 2]> =
        const { RefCell::new([Buffer::new(), Buffer::new()]) };
}

/// A factor packed into words, `[depth, stride]`; columns are padded with zeros to whole registers.
struct Packed<'a> {
    words: &'a [u32],
    /// Rows of words.
    depth: usize,
    stride: usize,
}

impl<'a> Packed<'a> {
    fn new<E: Element, K: MicroKernel>(
        factor: Operand<'_, E>,
        depth: usize,
        columns: usize,
        words: &'a mut Buffer<u32>,
    ) -> Self {
        let stride = columns.next_multiple_of(LANES);
        assert_eq!(factor.size(), [depth, columns]);
        let depth = depth / K::PER_WORD;
        words.set_zero(depth * stride);
        match factor {
            Operand::Plain(matrix) => {
                for (word, to) in words.chunks_exact_mut(stride).enumerate() {
                    let first = word * K::PER_WORD;
                    let [first, second] =
                        [first, first + K::PER_WORD - 1].map(|row| matrix.row(row));
                    interleave::<E, K>(first, second, to);
                }
            }
            Operand::Transposed(matrix) => {
                for column in 0..columns {
                    let to = words[column..].iter_mut().step_by(stride);
                    write_words::<E, K>(matrix.row(column), to);
                }
            }
        }
        Self { words, depth, stride }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn multiply<E: Element, K: MicroKernel, const ADD: bool>(
        &self,
        left: Matrix<'_, E>,
        rows: std::ops::Range<usize>,
        scale: f32,
        to: &mut MatrixMut<'_, E>,
    ) {
        let [tile_rows, tile_columns] = SUMS_TILE;
        #[expect(clippy::large_stack_arrays, reason = "32 KiB of a stack of megabytes")]
        let mut sums = Aligned([0.0; SUMS_TILE[0] * SUMS_TILE[1]]);
        let mut packed: Vec<u32> = Vec::new();
        let left = if K::reads::<E>() {
            let data = words_of(&left.data[rows.start * left.stride..]);
            Words { data, stride: left.stride / K::PER_WORD }
        } else {
            packed.resize(rows.len() * self.depth, 0);
            for (row, to) in rows.clone().zip(packed.chunks_exact_mut(self.depth.max(1))) {
                write_words::<E, K>(left.row(row), to);
            }
            Words { data: &packed, stride: self.depth }
        };
        for row in (0..rows.len()).step_by(tile_rows) {
            let count = tile_rows.min(rows.len() - row);
            for column in (0..self.stride).step_by(tile_columns) {
                let width = tile_columns.min(self.stride - column);
                #[expect(unsafe_code, reason = "needs certain CPU features")]
                // SAFETY: the CPU was checked.
                unsafe {
                    K::product::<false>(
                        [count, self.depth, width],
                        left.below(row),
                        Words { data: &self.words[column..], stride: self.stride },
                        &mut *sums,
                    );
                }
                let end = to.columns.min(column + width);
                for (index, sums) in sums.chunks_exact(width).enumerate().take(count) {
                    let start = (row + index) * to.stride;
                    let to = &mut to.data[start + column..start + end];
                    for (to, &sum) in to.iter_mut().zip(sums) {
                        let before = if ADD { to.to_f32() } else { 0.0 };
                        *to = E::from_f32(before + scale * sum);
                    }
                }
            }
        }
    }
}

/// Adds `leftᵀ · right` of some rows to `sums`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn outer<E: Element, K: MicroKernel>(
    left: Matrix<'_, E>,
    right: Matrix<'_, E>,
    rows: std::ops::Range<usize>,
    sums: &mut [f32],
    [left_words, right_words]: &mut [Buffer<u32>; 2],
) {
    let width = right.columns;
    let depth = DEPTH / K::PER_WORD;
    left_words.grow(left.columns * depth); // [R, depth]
    right_words.grow(depth * width);
    let zeros = vec![E::default(); left.columns.max(width)];
    for first in rows.clone().step_by(DEPTH) {
        let count = DEPTH.min(rows.end - first);
        // An odd last row is paired with zeros.
        let words = count.div_ceil(K::PER_WORD);
        for word in 0..words {
            let row_pair = |matrix| {
                let row = first + word * K::PER_WORD;
                let second = if row + 1 < rows.end { Matrix::row(matrix, row + 1) } else { &zeros };
                (Matrix::row(matrix, row), second)
            };
            let (one, other) = row_pair(left);
            let to = left_words[word..].iter_mut().step_by(depth);
            to.zip(one.iter().zip(other))
                .for_each(|(to, (&one, &other))| *to = K::word(one, other));
            let to = &mut right_words[word * width..][..width];
            let (one, other) = row_pair(right);
            interleave::<E, K>(one, other, to);
        }
        #[expect(unsafe_code, reason = "needs certain CPU features")]
        // SAFETY: the CPU was checked.
        unsafe {
            K::product::<true>(
                [left.columns, words, width],
                Words { data: left_words, stride: depth },
                Words { data: right_words, stride: width },
                sums,
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::{MatrixMut, add_outer_with, multiply_with};
    use crate::{
        Element,
        amx::Amx,
        gemm::{Avx512, Avx512Bf16, MicroKernel},
        matrix::{Matrix, Operand},
        pool::Serial,
        testing::{assert_close, numbers, rounded},
    };

    /// `[rows, depth] · [depth, columns]` in f64.
    fn exact<E: Element>(left: &[E], right: &[E], [rows, depth, columns]: [usize; 3]) -> Vec<f64> {
        let wide = |x: E| f64::from(x.to_f32());
        (0..rows * columns)
            .map(|index| {
                let (row, column) = (index / columns, index % columns);
                (0..depth)
                    .map(|k| wide(left[row * depth + k]) * wide(right[k * columns + column]))
                    .sum()
            })
            .collect()
    }

    fn transposed<E: Element>(matrix: &[E], columns: usize) -> Vec<E> {
        (0..matrix.len())
            .map(|index| {
                let rows = matrix.len() / columns;
                matrix[index % rows * columns + index / rows]
            })
            .collect()
    }

    /// Rows, width and rank.
    const SHAPES: [[usize; 3]; 6] =
        [[1, 16, 2], [17, 48, 8], [130, 576, 24], [65, 1552, 16], [700, 32, 64], [3, 64, 6]];

    fn is_supported<K: MicroKernel>() -> bool {
        let is_supported = K::is_supported();
        if !is_supported {
            eprintln!("skipped: this CPU has no {}", std::any::type_name::<K>());
        }
        is_supported
    }

    #[test]
    fn products_follow_the_formula_in_both_directions_and_both_layouts() {
        check_products::<bf16, Amx>(1.0 / 256.0);
        check_products::<bf16, Avx512Bf16>(1.0 / 256.0);
        check_products::<bf16, Avx512>(1.0 / 256.0);
        check_products::<f32, Avx512>(1e-5);
    }

    fn check_products<E: Element, K: MicroKernel>(rounding: f64) {
        if !is_supported::<K>() {
            return;
        }
        for [rows, width, rank] in SHAPES {
            for [depth, columns] in [[width, rank], [rank, width]] {
                let left: Vec<E> = rounded(&numbers(rows * depth, 1));
                let right: Vec<E> = rounded(&numbers(depth * columns, 2));
                let expected = exact(&left, &right, [rows, depth, columns]);
                let flipped = transposed(&right, columns);
                let plain = Matrix { data: &right, rows: depth, columns, stride: columns };
                let flipped =
                    Matrix { data: &flipped, rows: columns, columns: depth, stride: depth };
                for factor in [Operand::Plain(plain), Operand::Transposed(flipped)] {
                    // The result is a column slice; the columns beside it must not change.
                    let (stride, first) = (columns + 5, 3);
                    let before: Vec<E> = rounded(&numbers(rows * stride, 3));
                    for add in [false, true] {
                        let mut data = before.clone();
                        let end = (rows - 1) * stride + first + columns;
                        let to = MatrixMut { data: &mut data[first..end], columns, stride };
                        let left = Matrix { data: &left, rows, columns: depth, stride: depth };
                        let multiply = if add {
                            multiply_with::<E, K, true>
                        } else {
                            multiply_with::<E, K, false>
                        };
                        multiply(&Serial, left, factor, 0.5, to);
                        let inside = |index: usize| {
                            index % stride >= first && index % stride < first + columns
                        };
                        let mut found = Vec::new();
                        let mut sums = Vec::new();
                        for (index, (&value, &before)) in data.iter().zip(&before).enumerate() {
                            if inside(index) {
                                found.push(value.to_f32());
                                let at = index / stride * columns + index % stride - first;
                                let before = if add { f64::from(before.to_f32()) } else { 0.0 };
                                sums.push(before + 0.5 * expected[at]);
                            } else {
                                assert_eq!(value.to_f32().to_bits(), before.to_f32().to_bits());
                            }
                        }
                        assert_close(&found, &sums, rounding);
                    }
                }
            }
        }
    }

    #[test]
    fn gradients_of_factors_follow_the_formula_in_both_layouts() {
        check_gradients::<bf16, Amx>();
        check_gradients::<bf16, Avx512Bf16>();
        check_gradients::<bf16, Avx512>();
        check_gradients::<f32, Avx512>();
    }

    fn check_gradients<E: Element, K: MicroKernel>() {
        if !is_supported::<K>() {
            return;
        }
        for [rows, width, rank] in SHAPES {
            // The left operand is a column slice of a wider matrix.
            let wide: Vec<E> = rounded(&numbers(rows * (rank + 4), 1));
            let left: Vec<E> =
                wide.chunks(rank + 4).flat_map(|row| &row[2..rank + 2]).copied().collect();
            let right: Vec<E> = rounded(&numbers(rows * width, 2));
            let expected = exact(&transposed(&left, rank), &right, [rank, rows, width]);
            let left = Matrix { data: &wide[2..], rows, columns: rank, stride: rank + 4 };
            let right = Matrix { data: &right, rows, columns: width, stride: width };
            let mut grad = vec![1.0; rank * width];
            add_outer_with::<E, K, false>(&Serial, left, right, &mut grad);
            let mut flipped = vec![1.0; rank * width];
            add_outer_with::<E, K, true>(&Serial, left, right, &mut flipped);
            let plus_one: Vec<f64> = expected.iter().map(|value| value + 1.0).collect();
            assert_close(&grad, &plus_one, 1e-5);
            for (index, value) in flipped.iter().enumerate() {
                assert!((value - grad[index % rank * width + index / rank]).abs() < 1e-9);
            }
        }
    }
}
