//! Products with a factor of low rank, in bf16: what a LoRA adapter adds to a layer, and its
//! gradients.
//!
//! The long matrix is passed over once and in place. A general product reads and writes it several
//! times more, and at these shapes it is memory that costs.

use std::cell::RefCell;

use half::bf16;

use crate::{
    Element,
    gemm::{self, LANES, Pairs, product},
    matrix::{Matrix, Side},
    pairs::{interleave, pair_of, pairs_of},
    pool::{Pool, Shared},
};

/// Rows of one unit of [`multiply`].
const ROWS: usize = 128;
/// Rows and columns whose sums are kept in the first cache.
const AT_ONCE: [usize; 2] = [16, 512];
/// Rows of the long matrix that [`add_outer`] brings into pairs at once.
const DEPTH: usize = 64;
/// The most units of [`add_outer`], each with sums of its own.
const PARTS: usize = 8;
/// From here on a general product is as good.
const HIGHEST_RANK: usize = 128;

/// Tells whether this processor can, for a layer's width and the sum of its adapters' ranks.
pub fn is_supported(width: usize, rank: usize) -> bool {
    width.is_multiple_of(LANES)
        && rank.is_multiple_of(2)
        && rank <= HIGHEST_RANK
        && gemm::is_supported()
}

/// A matrix that is written to, perhaps some columns of a wider one.
#[derive(Debug)]
pub struct MatrixMut<'a> {
    /// From its first element to its last.
    pub data: &'a mut [bf16],
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
pub fn multiply<const ADD: bool>(
    pool: &dyn Pool,
    left: Matrix<'_>,
    factor: Side<'_>,
    scale: f32,
    to: MatrixMut<'_>,
) {
    let MatrixMut { data, columns, stride } = to;
    let (rows, length) = (left.rows, data.len());
    assert!(columns <= stride && (rows == 0 || length == (rows - 1) * stride + columns));
    PACKED.with_borrow_mut(|pairs| {
        let right = Packed::new(factor, left.columns, columns, pairs);
        let data = Shared::new(data);
        pool.run(rows.div_ceil(ROWS), &|unit| {
            let range = unit * ROWS..rows.min((unit + 1) * ROWS);
            #[expect(unsafe_code, reason = "units write side by side; for certain processors")]
            // SAFETY: these rows belong to this unit, and the processor was asked.
            unsafe {
                let data = data.range(range.start * stride..length.min(range.end * stride));
                let mut to = MatrixMut { data, columns, stride };
                right.multiply::<ADD>(left, range, scale, &mut to);
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
pub fn add_outer<const TRANSPOSED: bool>(
    pool: &dyn Pool,
    left: Matrix<'_>,
    right: Matrix<'_>,
    grad: &mut [f32],
) {
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
        sums.clear();
        sums.resize(parts * grad.len(), 0.0);
        let shared = Shared::new(sums);
        pool.run(parts, &|unit| {
            let range = unit * part..rows.min((unit + 1) * part);
            #[expect(unsafe_code, reason = "units write side by side; for certain processors")]
            // SAFETY: these sums belong to this unit, and the processor was asked.
            PAIRS.with_borrow_mut(|pairs| unsafe {
                let sums = shared.range(unit * grad.len()..(unit + 1) * grad.len());
                outer(left, right, range, sums, pairs);
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
    static PACKED: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) };
    static SUMS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    static PAIRS: RefCell<[Vec<u32>; 2]> = const { RefCell::new([Vec::new(), Vec::new()]) };
}

/// A factor in pairs, `[K/2, N]`, filled up with zeros to whole registers.
struct Packed<'a> {
    pairs: &'a [u32],
    depth: usize,
    stride: usize,
}

impl<'a> Packed<'a> {
    fn new(factor: Side<'_>, depth: usize, columns: usize, pairs: &'a mut Vec<u32>) -> Self {
        let stride = columns.next_multiple_of(LANES);
        pairs.clear();
        pairs.resize(depth / 2 * stride, 0);
        assert_eq!(factor.size(), [depth, columns]);
        match factor {
            Side::Plain(matrix) => {
                for (pair, to) in pairs.chunks_exact_mut(stride).enumerate() {
                    interleave(matrix.row(2 * pair), matrix.row(2 * pair + 1), to);
                }
            }
            Side::Transposed(matrix) => {
                for column in 0..columns {
                    let to = pairs[column..].iter_mut().step_by(stride);
                    to.zip(pairs_of(matrix.row(column))).for_each(|(to, &pair)| *to = pair);
                }
            }
        }
        Self { pairs, depth, stride }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn multiply<const ADD: bool>(
        &self,
        left: Matrix<'_>,
        rows: std::ops::Range<usize>,
        scale: f32,
        to: &mut MatrixMut<'_>,
    ) {
        let [most_rows, most_columns] = AT_ONCE;
        #[expect(clippy::large_stack_arrays, reason = "32 KiB of a stack of megabytes")]
        let mut sums = [0.0; AT_ONCE[0] * AT_ONCE[1]];
        let pairs = pairs_of(&left.data[rows.start * left.stride..]);
        for row in (0..rows.len()).step_by(most_rows) {
            let count = most_rows.min(rows.len() - row);
            for column in (0..self.stride).step_by(most_columns) {
                let width = most_columns.min(self.stride - column);
                product::<false>(
                    [count, self.depth / 2, width],
                    Pairs { data: &pairs[row * left.stride / 2..], stride: left.stride / 2 },
                    Pairs { data: &self.pairs[column..], stride: self.stride },
                    &mut sums,
                );
                let end = to.columns.min(column + width);
                for (index, sums) in sums.chunks_exact(width).enumerate().take(count) {
                    let start = (row + index) * to.stride;
                    let to = &mut to.data[start + column..start + end];
                    for (to, &sum) in to.iter_mut().zip(sums) {
                        let before = if ADD { to.to_f32() } else { 0.0 };
                        *to = Element::from_f32(before + scale * sum);
                    }
                }
            }
        }
    }
}

/// Writes `leftᵀ · right` of some rows to `sums`, which are zero.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn outer(
    left: Matrix<'_>,
    right: Matrix<'_>,
    rows: std::ops::Range<usize>,
    sums: &mut [f32],
    [left_pairs, right_pairs]: &mut [Vec<u32>; 2],
) {
    let width = right.columns;
    left_pairs.resize(left.columns * DEPTH / 2, 0); // [S, DEPTH/2]
    right_pairs.resize(DEPTH / 2 * width, 0);
    let nothing = vec![bf16::ZERO; left.columns.max(width)];
    for first in rows.clone().step_by(DEPTH) {
        let count = DEPTH.min(rows.end - first);
        // A row too few is filled up with zeros.
        let pairs = count.div_ceil(2);
        for pair in 0..pairs {
            let both = |of| {
                let row = first + 2 * pair;
                let high = if row + 1 < rows.end { Matrix::row(of, row + 1) } else { &nothing };
                (Matrix::row(of, row), high)
            };
            let (low, high) = both(left);
            let to = left_pairs[pair..].iter_mut().step_by(DEPTH / 2);
            to.zip(low.iter().zip(high)).for_each(|(to, (&low, &high))| *to = pair_of(low, high));
            let to = &mut right_pairs[pair * width..][..width];
            let (low, high) = both(right);
            interleave(low, high, to);
        }
        product::<true>(
            [left.columns, pairs, width],
            Pairs { data: left_pairs, stride: DEPTH / 2 },
            Pairs { data: right_pairs, stride: width },
            sums,
        );
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::{MatrixMut, add_outer, is_supported, multiply};
    use crate::{
        matrix::{Matrix, Side},
        pool::Serial,
        testing::{assert_close, numbers, rounded},
    };

    /// `[rows, depth] · [depth, columns]` in f64.
    fn exact(left: &[bf16], right: &[bf16], [rows, depth, columns]: [usize; 3]) -> Vec<f64> {
        (0..rows * columns)
            .map(|index| {
                let (row, column) = (index / columns, index % columns);
                (0..depth)
                    .map(|k| left[row * depth + k].to_f64() * right[k * columns + column].to_f64())
                    .sum()
            })
            .collect()
    }

    fn transposed(of: &[bf16], columns: usize) -> Vec<bf16> {
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

    fn can() -> bool {
        let can = is_supported(16, 2);
        if !can {
            eprintln!("skipped: this processor has no AVX512-BF16");
        }
        can
    }

    #[test]
    fn products_follow_the_formula_in_both_directions_and_both_layouts() {
        if !can() {
            return;
        }
        for [rows, width, rank] in SHAPES {
            for [depth, columns] in [[width, rank], [rank, width]] {
                let left = rounded(&numbers(rows * depth, 1));
                let right = rounded(&numbers(depth * columns, 2));
                let expected = exact(&left, &right, [rows, depth, columns]);
                let turned = transposed(&right, columns);
                let plain = Matrix { data: &right, rows: depth, columns, stride: columns };
                let turned = Matrix { data: &turned, rows: columns, columns: depth, stride: depth };
                for factor in [Side::Plain(plain), Side::Transposed(turned)] {
                    // The result lies between other columns, which stay.
                    let (stride, first) = (columns + 5, 3);
                    let before = rounded(&numbers(rows * stride, 3));
                    for add in [false, true] {
                        let mut data = before.clone();
                        let end = (rows - 1) * stride + first + columns;
                        let to = MatrixMut { data: &mut data[first..end], columns, stride };
                        let left = Matrix { data: &left, rows, columns: depth, stride: depth };
                        let multiply = if add { multiply::<true> } else { multiply::<false> };
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
                                let before = if add { before.to_f64() } else { 0.0 };
                                sums.push(before + 0.5 * expected[at]);
                            } else {
                                assert_eq!(value, before);
                            }
                        }
                        assert_close(&found, &sums, 1.0 / 256.0);
                    }
                }
            }
        }
    }

    #[test]
    fn gradients_of_factors_follow_the_formula_in_both_layouts() {
        if !can() {
            return;
        }
        for [rows, width, rank] in SHAPES {
            // The left side is a part of a wider matrix.
            let wide = rounded(&numbers(rows * (rank + 4), 1));
            let left: Vec<bf16> =
                wide.chunks(rank + 4).flat_map(|row| &row[2..rank + 2]).copied().collect();
            let right = rounded(&numbers(rows * width, 2));
            let expected = exact(&transposed(&left, rank), &right, [rank, rows, width]);
            let left = Matrix { data: &wide[2..], rows, columns: rank, stride: rank + 4 };
            let right = Matrix { data: &right, rows, columns: width, stride: width };
            let mut grad = vec![1.0; rank * width];
            add_outer::<false>(&Serial, left, right, &mut grad);
            let mut turned = vec![1.0; rank * width];
            add_outer::<true>(&Serial, left, right, &mut turned);
            let plus_one: Vec<f64> = expected.iter().map(|value| value + 1.0).collect();
            assert_close(&grad, &plus_one, 1e-5);
            for (index, value) in turned.iter().enumerate() {
                assert!((value - grad[index % rank * width + index / rank]).abs() < 1e-9);
            }
        }
    }
}
