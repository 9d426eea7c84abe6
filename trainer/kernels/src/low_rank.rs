//! Products with a factor of low rank: what a LoRA adapter adds to a layer, and its
//! gradients.
//!
//! The long matrix is passed over once and in place. A general product reads and writes it several
//! times more, and at these shapes it is memory that costs.

use std::cell::RefCell;

use crate::{
    Element,
    aligned::{Aligned, Buffer},
    choice::{Multiplied, by_kernel},
    gemm::{Held, LANES, MicroKernel, Words, interleave, words_of, write_words},
    matrix::{Matrix, Side},
    pool::{Pool, Shared},
};

/// Rows of one unit of [`multiply`].
const ROWS: usize = 128;
/// Rows and columns whose sums are kept in the first cache.
const AT_ONCE: [usize; 2] = [16, 512];
/// Rows of the long matrix that [`add_outer`] brings into words at once.
const DEPTH: usize = 64;
/// The most units of [`add_outer`], each with sums of its own.
const PARTS: usize = 8;
/// From here on a general product is as good.
const HIGHEST_RANK: usize = 128;

/// Tells whether this processor can, for a layer's width and the sum of its adapters' ranks.
pub fn is_supported<E: Multiplied>(width: usize, rank: usize) -> bool {
    width.is_multiple_of(LANES)
        && rank.is_multiple_of(size_of::<u32>() / size_of::<E>())
        && rank <= HIGHEST_RANK
        && E::kernel().is_some()
}

/// A matrix that is written to, perhaps some columns of a wider one.
#[derive(Debug)]
pub struct MatrixMut<'a, E> {
    /// From its first element to its last.
    pub data: &'a mut [E],
    /// Its columns, `N`.
    pub columns: usize,
    /// From one row to the next.
    pub stride: usize,
}

/// Writes `scale · left · factor` to `to`, or adds it.
///
/// # Shapes
/// `left` is `[T, K]`, `to` is `[T, N]`.
///
/// # Panics
/// If a size is wrong, or the processor cannot ([`is_supported`]).
pub fn multiply<E: Multiplied, const ADD: bool>(
    pool: &dyn Pool,
    left: Matrix<'_, E>,
    factor: Side<'_, E>,
    scale: f32,
    to: MatrixMut<'_, E>,
) {
    by_kernel!(E, K => multiply_with::<E, K, ADD>(pool, left, factor, scale, to));
}

fn multiply_with<E: Element, K: MicroKernel, const ADD: bool>(
    pool: &dyn Pool,
    left: Matrix<'_, E>,
    factor: Side<'_, E>,
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
        pool.run(rows.div_ceil(ROWS), &|unit| {
            let range = unit * ROWS..rows.min((unit + 1) * ROWS);
            #[expect(unsafe_code, reason = "units write side by side; for certain processors")]
            // SAFETY: these rows belong to this unit, and the processor was asked.
            unsafe {
                let _held = Held::<K>::new();
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
/// `left` is `[T, S]`, `right` is `[T, N]`. `grad` is `[S, N]`, or `[N, S]` if it is
/// `TRANSPOSED`.
///
/// # Panics
/// If a size is wrong, or the processor cannot ([`is_supported`]).
pub fn add_outer<E: Multiplied, const TRANSPOSED: bool>(
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
    // Parts of a length that does not depend on the number of threads, nor do their sums.
    let part = rows.div_ceil(PARTS).next_multiple_of(DEPTH).max(DEPTH);
    let parts = rows.div_ceil(part);
    SUMS.with_borrow_mut(|sums| {
        sums.set_zero(parts * grad.len());
        let shared = Shared::new(sums);
        pool.run(parts, &|unit| {
            let range = unit * part..rows.min((unit + 1) * part);
            #[expect(unsafe_code, reason = "units write side by side; for certain processors")]
            // SAFETY: these sums belong to this unit, and the processor was asked.
            WORDS.with_borrow_mut(|words| unsafe {
                let _held = Held::<K>::new();
                let sums = shared.range(unit * grad.len()..(unit + 1) * grad.len());
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

// Kept by each thread: fresh memory costs page faults, and freeing it stops the other threads.
thread_local! {
    static PACKED: RefCell<Buffer<u32>> = const { RefCell::new(Buffer::new()) };
    static SUMS: RefCell<Buffer<f32>> = const { RefCell::new(Buffer::new()) };
    static WORDS: RefCell<[Buffer<u32>; 2]> =
        const { RefCell::new([Buffer::new(), Buffer::new()]) };
}

/// A factor in words, by the depth and `N`, filled up with zeros to whole registers.
struct Packed<'a> {
    words: &'a [u32],
    /// Its rows.
    depth: usize,
    stride: usize,
}

impl<'a> Packed<'a> {
    fn new<E: Element, K: MicroKernel>(
        factor: Side<'_, E>,
        depth: usize,
        columns: usize,
        words: &'a mut Buffer<u32>,
    ) -> Self {
        let stride = columns.next_multiple_of(LANES);
        assert_eq!(factor.size(), [depth, columns]);
        let depth = depth / K::PER_WORD;
        words.set_zero(depth * stride);
        match factor {
            Side::Plain(matrix) => {
                for (word, to) in words.chunks_exact_mut(stride).enumerate() {
                    let first = word * K::PER_WORD;
                    let [first, second] =
                        [first, first + K::PER_WORD - 1].map(|row| matrix.row(row));
                    interleave::<E, K>(first, second, to);
                }
            }
            Side::Transposed(matrix) => {
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
        let [most_rows, most_columns] = AT_ONCE;
        #[expect(clippy::large_stack_arrays, reason = "32 KiB of a stack of megabytes")]
        let mut sums = Aligned([0.0; AT_ONCE[0] * AT_ONCE[1]]);
        let mut widened: Vec<u32> = Vec::new();
        let left = if K::reads::<E>() {
            let data = words_of(&left.data[rows.start * left.stride..]);
            Words { data, stride: left.stride / K::PER_WORD }
        } else {
            widened.resize(rows.len() * self.depth, 0);
            for (row, to) in rows.clone().zip(widened.chunks_exact_mut(self.depth.max(1))) {
                write_words::<E, K>(left.row(row), to);
            }
            Words { data: &widened, stride: self.depth }
        };
        for row in (0..rows.len()).step_by(most_rows) {
            let count = most_rows.min(rows.len() - row);
            for column in (0..self.stride).step_by(most_columns) {
                let width = most_columns.min(self.stride - column);
                #[expect(unsafe_code, reason = "for certain processors")]
                // SAFETY: the processor was asked.
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

/// Writes `leftᵀ · right` of some rows to `sums`, which are zero.
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
    left_words.grow(left.columns * depth); // [S, depth]
    right_words.grow(depth * width);
    let nothing = vec![E::default(); left.columns.max(width)];
    for first in rows.clone().step_by(DEPTH) {
        let count = DEPTH.min(rows.end - first);
        // A row too few is filled up with zeros.
        let words = count.div_ceil(K::PER_WORD);
        for word in 0..words {
            let both = |of| {
                let row = first + word * K::PER_WORD;
                let second = if row + 1 < rows.end { Matrix::row(of, row + 1) } else { &nothing };
                (Matrix::row(of, row), second)
            };
            let (one, other) = both(left);
            let to = left_words[word..].iter_mut().step_by(depth);
            to.zip(one.iter().zip(other))
                .for_each(|(to, (&one, &other))| *to = K::word(one, other));
            let to = &mut right_words[word * width..][..width];
            let (one, other) = both(right);
            interleave::<E, K>(one, other, to);
        }
        #[expect(unsafe_code, reason = "for certain processors")]
        // SAFETY: the processor was asked.
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
        matrix::{Matrix, Side},
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

    fn transposed<E: Element>(of: &[E], columns: usize) -> Vec<E> {
        (0..of.len())
            .map(|index| {
                let rows = of.len() / columns;
                of[index % rows * columns + index / rows]
            })
            .collect()
    }

    /// Rows, width and rank.
    const SHAPES: [[usize; 3]; 6] =
        [[1, 16, 2], [17, 48, 8], [130, 576, 24], [65, 1552, 16], [700, 32, 64], [3, 64, 6]];

    fn can<K: MicroKernel>() -> bool {
        let can = K::is_supported();
        if !can {
            eprintln!("skipped: this processor has no {}", std::any::type_name::<K>());
        }
        can
    }

    #[test]
    fn products_follow_the_formula_in_both_directions_and_both_layouts() {
        check_products::<bf16, Amx>(1.0 / 256.0);
        check_products::<bf16, Avx512Bf16>(1.0 / 256.0);
        check_products::<bf16, Avx512>(1.0 / 256.0);
        check_products::<f32, Avx512>(1e-5);
    }

    fn check_products<E: Element, K: MicroKernel>(rounding: f64) {
        if !can::<K>() {
            return;
        }
        for [rows, width, rank] in SHAPES {
            for [depth, columns] in [[width, rank], [rank, width]] {
                let left: Vec<E> = rounded(&numbers(rows * depth, 1));
                let right: Vec<E> = rounded(&numbers(depth * columns, 2));
                let expected = exact(&left, &right, [rows, depth, columns]);
                let turned = transposed(&right, columns);
                let plain = Matrix { data: &right, rows: depth, columns, stride: columns };
                let turned = Matrix { data: &turned, rows: columns, columns: depth, stride: depth };
                for factor in [Side::Plain(plain), Side::Transposed(turned)] {
                    // The result lies between other columns, which stay.
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
        if !can::<K>() {
            return;
        }
        for [rows, width, rank] in SHAPES {
            // The left side is a part of a wider matrix.
            let wide: Vec<E> = rounded(&numbers(rows * (rank + 4), 1));
            let left: Vec<E> =
                wide.chunks(rank + 4).flat_map(|row| &row[2..rank + 2]).copied().collect();
            let right: Vec<E> = rounded(&numbers(rows * width, 2));
            let expected = exact(&transposed(&left, rank), &right, [rank, rows, width]);
            let left = Matrix { data: &wide[2..], rows, columns: rank, stride: rank + 4 };
            let right = Matrix { data: &right, rows, columns: width, stride: width };
            let mut grad = vec![1.0; rank * width];
            add_outer_with::<E, K, false>(&Serial, left, right, &mut grad);
            let mut turned = vec![1.0; rank * width];
            add_outer_with::<E, K, true>(&Serial, left, right, &mut turned);
            let plus_one: Vec<f64> = expected.iter().map(|value| value + 1.0).collect();
            assert_close(&grad, &plus_one, 1e-5);
            for (index, value) in turned.iter().enumerate() {
                assert!((value - grad[index % rank * width + index / rank]).abs() < 1e-9);
            }
        }
    }
}
