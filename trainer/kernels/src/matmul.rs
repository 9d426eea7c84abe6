//! Products of large matrices with fp32 sums: what linear layers compute forward and backward.
//!
//! The right side is brought into panels of words that the second cache holds, the left side is read
//! where it lies unless it is to be transposed, and register tiles (`gemm`) do the rest. Sums of
//! several products, fp32 gradients and biases need no pass of their own.
//!
//! # Source
//! Goto, van de Geijn: Anatomy of High-Performance Matrix Multiplication, 2008, without its blocks of
//! the left side: rows are read ahead by the processor itself.

use std::{cell::RefCell, ops::Range};

use crate::{
    Element,
    aligned::Buffer,
    choice::{Multiplied, by_kernel},
    gemm::{Held, LANES, MicroKernel, Tile},
    matrix::Side,
    pack::{PANEL, Packed, Term, depth_of, in_place, pack, part, prefetch},
    pool::{Pool, Shared},
};

/// Rows of one unit.
const BLOCK: usize = 64;
/// Words of a panel's columns multiplied at once: 384 KiB stay in the second cache.
const DEPTH: usize = 2048;
/// Words in panels at once, 4 MiB, unless that leaves less than [`UNITS`] units.
const PACKED: usize = 1 << 20;
/// The least units to divide work into.
const UNITS: usize = 8;

/// Tells whether this processor can.
pub fn is_supported<E: Multiplied>() -> bool {
    E::kernel().is_some()
}

/// Where a product goes, `[M, N]`, row by row.
#[derive(Debug)]
pub enum Target<'a, E> {
    /// It is written, with a bias `[N]` if there is one.
    Write(&'a mut [E], Option<&'a [E]>),
    /// It is kept in fp32: added to what is there, or written over it.
    Sum {
        /// Where.
        to: &'a mut [f32],
        /// Whether it is added.
        is_added: bool,
    },
}

impl<E> Target<'_, E> {
    fn split_at(self, index: usize) -> (Self, Self) {
        match self {
            Self::Write(to, bias) => {
                let (some, rest) = to.split_at_mut(index);
                (Target::Write(some, bias), Target::Write(rest, bias))
            }
            Self::Sum { to, is_added } => {
                let (some, rest) = to.split_at_mut(index);
                (Target::Sum { to: some, is_added }, Target::Sum { to: rest, is_added })
            }
        }
    }
}

/// Computes the sum of some products.
///
/// # Shapes
/// Every product is of `[M, K]` and `[K, N]`; their `K` may differ. In bf16 it is even where a left
/// side is plain or a right side to be transposed: what lies in pairs is read in pairs.
///
/// # Panics
/// If a size is wrong, or the processor cannot ([`is_supported`]).
pub fn multiply<E: Multiplied>(
    pool: &dyn Pool,
    terms: &[(Side<'_, E>, Side<'_, E>)],
    size: [usize; 2],
    to: Target<'_, E>,
) {
    by_kernel!(E, K => multiply_with::<E, K>(pool, terms, size, to));
}

fn multiply_with<E: Element, K: MicroKernel>(
    pool: &dyn Pool,
    terms: &[Term<'_, E>],
    [rows, columns]: [usize; 2],
    mut to: Target<'_, E>,
) {
    assert!(K::is_supported());
    for term in terms {
        check::<E, K>(*term, [rows, columns]);
    }
    if rows == 0 || columns == 0 {
        return;
    }
    let depth: usize = terms.iter().map(depth_of::<E, K>).sum();
    if rows * columns + PACKED < depth * K::PANELS * PANEL {
        return multiply_deep::<E, K>(pool, terms, [rows, columns], to);
    }
    let is_packed = terms.iter().any(|term| in_place::<E, K>(term).is_none());
    let at_once = if is_packed {
        // What is packed of left sides takes 8 MiB at most.
        (2 * PACKED / depth.max(1) / BLOCK * BLOCK).max(UNITS * BLOCK)
    } else {
        rows
    };
    for first in (0..rows).step_by(at_once) {
        let range = first..rows.min(first + at_once);
        let terms: Vec<_> =
            terms.iter().map(|&(left, right)| (left.rows(range.clone()), right)).collect();
        let (some, rest) = to.split_at(range.len() * columns);
        multiply_at_once::<E, K>(pool, &terms, [range.len(), columns], some);
        to = rest;
    }
}

/// Multiplies what has fewer sums than panels would have words, as the gradient of a head's input:
/// some of the depth after the other.
fn multiply_deep<E: Element, K: MicroKernel>(
    pool: &dyn Pool,
    terms: &[Term<'_, E>],
    [rows, columns]: [usize; 2],
    to: Target<'_, E>,
) {
    let add = |sums: &mut [f32]| {
        for &(left, right) in terms {
            let depth = left.size()[1];
            for first in (0..depth).step_by(DEPTH * K::PER_WORD) {
                let range = first..depth.min(first + DEPTH * K::PER_WORD);
                let terms = [(left.columns(range.clone()), right.rows(range))];
                let target = Target::Sum { to: sums, is_added: true };
                multiply_at_once::<E, K>(pool, &terms, [rows, columns], target);
            }
        }
    };
    match to {
        Target::Sum { to, is_added } => {
            if !is_added {
                to.fill(0.0);
            }
            add(to);
        }
        Target::Write(to, bias) => DEEP_SUMS.with_borrow_mut(|sums| {
            sums.clear();
            sums.resize(rows * columns, 0.0);
            add(sums);
            for (to, sums) in to.chunks_exact_mut(columns).zip(sums.chunks_exact(columns)) {
                round(sums, bias, to);
            }
        }),
    }
}

/// Multiplies with all of the left side at once.
fn multiply_at_once<E: Element, K: MicroKernel>(
    pool: &dyn Pool,
    terms: &[Term<'_, E>],
    [rows, columns]: [usize; 2],
    to: Target<'_, E>,
) {
    let to = Output::new(to, [rows, columns]);
    let depth: usize = terms.iter().map(depth_of::<E, K>).sum();
    let blocks = rows.div_ceil(BLOCK);
    let at_once = (PACKED / (depth * PANEL).max(1)).max(UNITS.div_ceil(blocks) * K::PANELS);
    let panels = columns.div_ceil(PANEL);
    PACKED_SIDES.with_borrow_mut(|[left, right]| {
        for first in (0..panels).step_by(at_once) {
            let chunk = first * PANEL..columns.min((first + at_once) * PANEL);
            pack::<E, K>(pool, terms, chunk.clone(), [left, right], first == 0);
            let lefts = Packed::of_terms::<E, K>(terms, rows, left);
            let (groups, size) = (chunk.len().div_ceil(K::PANELS * PANEL), depth * PANEL);
            pool.run(blocks * groups, &|unit| {
                let _held = Held::<K>::new();
                // Neighbours share what then stays in the second cache.
                let (block, group) = if K::KEEPS_PANELS {
                    (unit % blocks, unit / blocks)
                } else {
                    (unit / groups, unit % groups)
                };
                let rows = block * BLOCK..rows.min((block + 1) * BLOCK);
                let columns = part(&chunk, group * K::PANELS * PANEL, K::PANELS * PANEL);
                for start in (0..columns.len()).step_by(PANEL) {
                    let panel = (group * K::PANELS + start / PANEL) * size;
                    let panel = &right[panel..panel + size];
                    #[expect(
                        unsafe_code,
                        reason = "units write side by side; for certain processors"
                    )]
                    // SAFETY: these rows of these columns belong to this unit, and the processor
                    // was asked.
                    unsafe {
                        multiply_panel::<E, K>(
                            &lefts,
                            panel,
                            rows.clone(),
                            part(&columns, start, PANEL),
                            &to,
                        );
                    }
                }
            });
        }
    });
}

/// Multiplies some rows with a panel.
///
/// # Safety
/// No other unit that runs at the same time may have the same rows and columns.
#[expect(unsafe_code, reason = "units write side by side")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn multiply_panel<E: Element, K: MicroKernel>(
    lefts: &[Packed<'_>],
    panel: &[u32],
    rows: Range<usize>,
    columns: Range<usize>,
    to: &Output<'_, E>,
) {
    SUMS.with_borrow_mut(|sums| {
        sums.grow(BLOCK * PANEL);
        // Unless depths are divided, sums go from the first cache to where they belong.
        let at_once = if panel.len() <= DEPTH * PANEL { K::ROWS } else { BLOCK };
        for start in (0..rows.len()).step_by(at_once) {
            let rows = part(&rows, start, at_once);
            // SAFETY: the caller's.
            unsafe {
                to.prefetch(rows.clone(), columns.clone());
                sum::<K>(lefts, panel, rows.clone(), columns.len(), sums);
                to.take(sums, rows, columns.clone());
            }
        }
    });
}

// Kept by each thread: fresh memory costs page faults, and freeing it stops the other threads.
thread_local! {
    static PACKED_SIDES: RefCell<[Buffer<u32>; 2]> =
        const { RefCell::new([Buffer::new(), Buffer::new()]) };
    static DEEP_SUMS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    static SUMS: RefCell<Buffer<f32>> = const { RefCell::new(Buffer::new()) };
}

fn check<E: Element, K: MicroKernel>((left, right): Term<'_, E>, [rows, columns]: [usize; 2]) {
    let ([left_rows, depth], [right_depth, right_columns]) = (left.size(), right.size());
    assert_eq!((left_rows, right_depth, right_columns), (rows, depth, columns));
    for side in [left, right] {
        let (Side::Plain(matrix) | Side::Transposed(matrix)) = side;
        matrix.check();
    }
    // These have their words along rows, and are read or moved as such.
    if let Side::Plain(matrix) = left {
        matrix.check_words(K::PER_WORD);
    }
    if let Side::Transposed(matrix) = right {
        matrix.check_words(K::PER_WORD);
    }
}

/// Writes the sums of some rows and one panel, [`PANEL`] from row to row.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn sum<K: MicroKernel>(
    lefts: &[Packed<'_>],
    mut right: &[u32],
    rows: Range<usize>,
    columns: usize,
    sums: &mut [f32],
) {
    assert!(
        rows.start.is_multiple_of(K::ROWS) && rows.len() <= BLOCK && sums.len() >= BLOCK * PANEL
    );
    let mut is_first = true;
    for left in lefts {
        for start in (0..left.words).step_by(DEPTH) {
            let words = DEPTH.min(left.words - start);
            let (panel, rest) = right.split_at(words * PANEL);
            right = rest;
            for row in rows.clone().step_by(K::ROWS) {
                let data = &left.data[row / K::ROWS * left.group + start * left.step..];
                let most = K::ROWS.min(rows.end - row);
                assert!(data.len() > (most - 1) * left.stride + (words - 1) * left.step);
                let mut tile = Tile {
                    words,
                    left: data.as_ptr(),
                    left_stride: left.stride,
                    left_step: left.step,
                    right: panel.as_ptr(),
                    right_stride: PANEL,
                    c: sums[(row - rows.start) * PANEL..].as_mut_ptr(),
                    columns: PANEL,
                };
                let mut left_over = most;
                while left_over > 0 {
                    #[expect(unsafe_code, reason = "the inner loop reads through pointers")]
                    // SAFETY: the left side was checked above, the panel is `[pairs, PANEL]`, and
                    // there are sums for all rows of a block.
                    // The processor can.
                    unsafe {
                        let done = match (columns.div_ceil(LANES), is_first) {
                            (1, true) => K::compute_some::<1, false>(&tile, left_over),
                            (1, false) => K::compute_some::<1, true>(&tile, left_over),
                            (2, true) => K::compute_some::<2, false>(&tile, left_over),
                            (2, false) => K::compute_some::<2, true>(&tile, left_over),
                            (_, true) => K::compute_some::<3, false>(&tile, left_over),
                            (_, false) => K::compute_some::<3, true>(&tile, left_over),
                        };
                        left_over -= done;
                        tile.left = tile.left.wrapping_add(done * left.stride);
                        tile.c = tile.c.wrapping_add(done * PANEL);
                    }
                }
            }
            is_first = false;
        }
    }
    if is_first {
        sums.fill(0.0);
    }
}

/// A [`Target`] that several units write to.
struct Output<'a, E> {
    to: SharedTarget<'a, E>,
    /// Its columns, `N`.
    width: usize,
}

enum SharedTarget<'a, E> {
    Write(Shared<'a, E>, Option<&'a [E]>),
    Sum { to: Shared<'a, f32>, is_added: bool },
}

impl<'a, E: Element> Output<'a, E> {
    fn new(to: Target<'a, E>, [rows, columns]: [usize; 2]) -> Self {
        let to = match to {
            Target::Write(to, bias) => {
                assert_eq!(to.len(), rows * columns);
                assert!(bias.is_none_or(|bias| bias.len() == columns));
                SharedTarget::Write(Shared::new(to), bias)
            }
            Target::Sum { to, is_added } => {
                assert_eq!(to.len(), rows * columns);
                SharedTarget::Sum { to: Shared::new(to), is_added }
            }
        };
        Self { to, width: columns }
    }

    /// Brings what is taken next into the first cache, while sums are computed.
    ///
    /// # Safety
    /// As [`Self::take`]'s.
    #[expect(unsafe_code, reason = "units write side by side")]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn prefetch(&self, rows: Range<usize>, columns: Range<usize>) {
        for row in rows {
            let range = row * self.width + columns.start..row * self.width + columns.end;
            // SAFETY: the caller's.
            unsafe {
                match &self.to {
                    SharedTarget::Write(to, _) => prefetch(to.range(range)),
                    // Whole lines are written, which nobody has to read.
                    SharedTarget::Sum { is_added: false, .. } => {}
                    SharedTarget::Sum { to, .. } => prefetch(to.range(range)),
                }
            }
        }
    }

    /// Takes the sums of some rows and columns.
    ///
    /// # Safety
    /// No other unit that runs at the same time may take the same.
    #[expect(unsafe_code, reason = "units write side by side")]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn take(&self, sums: &[f32], rows: Range<usize>, columns: Range<usize>) {
        for (row, sums) in rows.zip(sums.chunks_exact(PANEL)) {
            let range = row * self.width + columns.start..row * self.width + columns.end;
            // SAFETY: the caller's.
            unsafe {
                match &self.to {
                    SharedTarget::Write(to, bias) => {
                        let bias = bias.map(|bias| &bias[columns.clone()]);
                        round(sums, bias, to.range(range));
                    }
                    SharedTarget::Sum { to, is_added: false } => {
                        let to = to.range(range);
                        to.copy_from_slice(&sums[..to.len()]);
                    }
                    SharedTarget::Sum { to, .. } => {
                        for (to, &sum) in to.range(range).iter_mut().zip(sums) {
                            *to += sum;
                        }
                    }
                }
            }
        }
    }
}

/// Rounds sums, with a bias if there is one.
#[expect(clippy::inline_always, reason = "compiled with its caller's instructions")]
#[inline(always)]
fn round<E: Element>(sums: &[f32], bias: Option<&[E]>, to: &mut [E]) {
    match bias {
        None => to.iter_mut().zip(sums).for_each(|(to, &sum)| *to = E::from_f32(sum)),
        Some(bias) => {
            for ((to, &sum), bias) in to.iter_mut().zip(sums).zip(bias) {
                *to = E::from_f32(sum + bias.to_f32());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::{Target, Term, multiply_with};
    use crate::{
        Element,
        amx::Amx,
        gemm::{Avx512, Avx512Bf16, MicroKernel},
        matrix::{Matrix, Side},
        pool::{Pool, Serial},
        testing::{assert_close, numbers, rounded},
    };

    /// Rows, depth and columns: below, at and beside the sizes of tiles, panels, blocks and depths.
    const SHAPES: [[usize; 3]; 10] = [
        [1, 2, 1],
        [7, 34, 50],
        [8, 32, 48],
        [129, 66, 97],
        [130, 576, 24],
        [33, 4098, 33],
        [300, 10, 400],
        [5, 0, 3],
        [64, 40_000, 100],
        [9_000, 600, 10],
    ];

    fn can<K: MicroKernel>() -> bool {
        let can = K::is_supported();
        if !can {
            eprintln!("skipped: this processor has no {}", std::any::type_name::<K>());
        }
        can
    }

    /// A matrix of random numbers in rows that lie apart, and the same dense.
    struct Random<E> {
        strided: Vec<E>,
        dense: Vec<E>,
        size: [usize; 2],
        stride: usize,
    }

    impl<E: Element> Random<E> {
        fn new([rows, columns]: [usize; 2], seed: u64) -> Self {
            let stride = columns + 2 + columns % 2;
            let strided: Vec<E> = rounded(&numbers(rows * stride, seed));
            let dense = strided.chunks(stride).flat_map(|row| row[..columns].to_vec()).collect();
            Self { strided, dense, size: [rows, columns], stride }
        }

        fn matrix(&self) -> Matrix<'_, E> {
            let [rows, columns] = self.size;
            Matrix { data: &self.strided, rows, columns, stride: self.stride }
        }

        fn at(&self, is_transposed: bool, row: usize, column: usize) -> f64 {
            let (row, column) = if is_transposed { (column, row) } else { (row, column) };
            f64::from(self.dense[row * self.size[1] + column].to_f32())
        }
    }

    fn flipped(size: [usize; 2], is_transposed: bool) -> [usize; 2] {
        if is_transposed { [size[1], size[0]] } else { size }
    }

    fn exact<E: Element>(
        terms: &[[(&Random<E>, bool); 2]],
        [rows, columns]: [usize; 2],
    ) -> Vec<f64> {
        let mut sums = vec![0.0; rows * columns];
        for [(left, left_transposed), (right, right_transposed)] in terms {
            let depth = left.size[usize::from(!*left_transposed)];
            for (index, sum) in sums.iter_mut().enumerate() {
                let (row, column) = (index / columns, index % columns);
                *sum += (0..depth)
                    .map(|k| {
                        left.at(*left_transposed, row, k) * right.at(*right_transposed, k, column)
                    })
                    .sum::<f64>();
            }
        }
        sums
    }

    fn term<'a, E: Element>(
        left: (&'a Random<E>, bool),
        right: (&'a Random<E>, bool),
    ) -> (Side<'a, E>, Side<'a, E>) {
        let [(left, left_transposed), (right, right_transposed)] = [left, right];
        let (left, right) = (left.matrix(), right.matrix());
        (
            if left_transposed { Side::Transposed(left) } else { Side::Plain(left) },
            if right_transposed { Side::Transposed(right) } else { Side::Plain(right) },
        )
    }

    #[test]
    fn products_follow_the_formula_in_every_layout() {
        check_layouts::<bf16>(&[
            can::<Amx>().then_some(multiply_with::<bf16, Amx>),
            can::<Avx512Bf16>().then_some(multiply_with::<bf16, Avx512Bf16>),
            can::<Avx512>().then_some(multiply_with::<bf16, Avx512>),
        ]);
        check_layouts::<f32>(&[can::<Avx512>().then_some(multiply_with::<f32, Avx512>)]);
    }

    type Multiply<E> = fn(&dyn Pool, &[Term<'_, E>], [usize; 2], Target<'_, E>);

    /// Compares each kernel with one computation of the formula, which takes longest.
    fn check_layouts<E: Element>(kernels: &[Option<Multiply<E>>]) {
        if kernels.iter().all(Option::is_none) {
            return;
        }
        for [rows, depth, columns] in SHAPES {
            for [flip_left, flip_right] in
                [[false, true], [false, false], [true, false], [true, true]]
            {
                let left = Random::<E>::new(flipped([rows, depth], flip_left), 1);
                let right = Random::new(flipped([depth, columns], flip_right), 2);
                let exact = exact(&[[(&left, flip_left), (&right, flip_right)]], [rows, columns]);
                let terms = [term((&left, flip_left), (&right, flip_right))];
                for multiply in kernels.iter().flatten() {
                    let mut sums = vec![1.0; rows * columns];
                    let target = Target::Sum { to: &mut sums, is_added: true };
                    multiply(&Serial, &terms, [rows, columns], target);
                    let added: Vec<f32> = sums.iter().map(|sum| sum - 1.0).collect();
                    assert_close(&added, &exact, if depth > 0 { 1e-5 } else { 0.0 });
                    let target = Target::Sum { to: &mut sums, is_added: false };
                    multiply(&Serial, &terms, [rows, columns], target);
                    assert_close(&sums, &exact, if depth > 0 { 1e-5 } else { 0.0 });
                }
            }
        }
    }

    #[test]
    fn an_odd_number_of_rows_is_summed_over() {
        check_odd::<Amx>();
        check_odd::<Avx512Bf16>();
        check_odd::<Avx512>();
    }

    fn check_odd<K: MicroKernel>() {
        if !can::<K>() {
            return;
        }
        let (left, right) = (Random::<bf16>::new([77, 40], 1), Random::new([77, 60], 2));
        let mut sums = vec![0.0; 40 * 60];
        let terms = [term((&left, true), (&right, false))];
        multiply_with::<_, K>(
            &Serial,
            &terms,
            [40, 60],
            Target::Sum { to: &mut sums, is_added: true },
        );
        assert_close(&sums, &exact(&[[(&left, true), (&right, false)]], [40, 60]), 1e-6);
    }

    #[test]
    fn terms_are_summed_before_they_are_rounded_and_a_bias_is_added() {
        check_terms::<bf16, Amx>(1.0 / 256.0, 1e-4);
        check_terms::<bf16, Avx512Bf16>(1.0 / 256.0, 1e-4);
        check_terms::<bf16, Avx512>(1.0 / 256.0, 1e-4);
        check_terms::<f32, Avx512>(1e-5, 5e-4);
    }

    fn check_terms<E: Element, K: MicroKernel>(rounding: f64, cancelled: f64) {
        if !can::<K>() {
            return;
        }
        let (rows, columns) = (140, 70);
        for depths in [[64, 4_100, 2], [64, 24_000, 2]] {
            let lefts = depths.map(|depth| Random::<E>::new([rows, depth], depth as u64));
            let rights = depths.map(|depth| Random::new([depth, columns], depth as u64 + 1));
            let pairs: Vec<_> = lefts
                .iter()
                .zip(&rights)
                .map(|(left, right)| [(left, false), (right, false)])
                .collect();
            let terms: Vec<_> = pairs.iter().map(|[left, right]| term(*left, *right)).collect();
            let bias: Vec<E> = rounded(&numbers(columns, 9));
            for bias in [None, Some(&bias[..])] {
                let mut exact = exact(&pairs, [rows, columns]);
                if let Some(bias) = bias {
                    for row in exact.chunks_mut(columns) {
                        row.iter_mut()
                            .zip(bias)
                            .for_each(|(sum, bias)| *sum += f64::from(bias.to_f32()));
                    }
                }
                let mut y = vec![E::default(); rows * columns];
                multiply_with::<_, K>(
                    &Serial,
                    &terms,
                    [rows, columns],
                    Target::Write(&mut y, bias),
                );
                for (y, exact) in y.iter().zip(exact) {
                    let y = f64::from(y.to_f32());
                    assert!((y - exact).abs() <= exact.abs() * rounding + cancelled, "{y} {exact}");
                }
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_the_rows_beside_it() {
        check_rows::<bf16, Amx>();
        check_rows::<bf16, Avx512Bf16>();
        check_rows::<bf16, Avx512>();
        check_rows::<f32, Avx512>();
    }

    fn check_rows<E: Element, K: MicroKernel>() {
        if !can::<K>() {
            return;
        }
        let (left, right) = (Random::<E>::new([200, 300], 1), Random::new([90, 300], 2));
        let mut all = vec![E::default(); 200 * 90];
        let terms = [term((&left, false), (&right, true))];
        multiply_with::<_, K>(&Serial, &terms, [200, 90], Target::Write(&mut all, None));
        for first in [0, 3, 150] {
            let data = &left.strided[first * left.stride..];
            let some = Side::Plain(Matrix { data, rows: 50, columns: 300, stride: left.stride });
            let mut rows = vec![E::default(); 50 * 90];
            let terms = [(some, Side::Transposed(right.matrix()))];
            multiply_with::<_, K>(&Serial, &terms, [50, 90], Target::Write(&mut rows, None));
            let bits =
                |values: &[E]| values.iter().map(|x| x.to_f32().to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&rows), bits(&all[first * 90..(first + 50) * 90]));
        }
    }

    #[test]
    #[should_panic(expected = "assertion")]
    fn sizes_that_do_not_fit_are_refused() {
        assert!(can::<Avx512>(), "assertion: skipped");
        let (left, right) = (Random::<f32>::new([4, 6], 1), Random::new([8, 4], 2));
        multiply_with::<_, Avx512>(
            &Serial,
            &[term((&left, false), (&right, false))],
            [4, 4],
            Target::Sum { to: &mut [0.0; 16], is_added: true },
        );
    }
}
