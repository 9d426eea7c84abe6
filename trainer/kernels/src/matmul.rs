//! Products of large matrices with fp32 sums, for the forward and backward passes of linear layers.
//!
//! The right operand is packed into panels that fit in the L2 cache. The left operand is read in
//! place unless it is transposed. Register tiles (`gemm`) compute the product. Sums of several
//! products, fp32 gradients and biases need no extra pass.
//!
//! In BLIS's terms `BLOCK` is `MC`, `DEPTH` is `KC`, and `PACKED` bounds `KC · NC`.
//!
//! # Source
//! Goto, van de Geijn: Anatomy of High-Performance Matrix Multiplication, 2008. Differs: the left
//! operand is not packed into blocks, because the hardware prefetches its rows.

use std::{cell::RefCell, ops::Range};

use crate::{
    Element,
    aligned::Buffer,
    choice::{GemmElement, by_kernel},
    gemm::{LANES, MicroKernel, ReleaseGuard, Tile},
    matrix::Operand,
    pack::{PANEL, Packed, Term, depth_of, in_place, pack, part, prefetch},
    pool::{Pool, Shared},
};

/// Rows of one task.
const BLOCK: usize = 64;
/// Words of depth that are multiplied before the next ones: 384 KiB of a panel stay in the L2
/// cache.
const DEPTH: usize = 2048;
/// Words that are packed into panels at once, 4 MiB, unless that leaves fewer than [`MIN_TASKS`]
/// tasks.
const PACKED: usize = 1 << 20;
/// The least number of tasks.
const MIN_TASKS: usize = 8;

/// Reports whether this CPU supports these products.
pub fn is_supported<E: GemmElement>() -> bool {
    E::kernel().is_some()
}

/// The destination of a product, `[M, N]`, row-major.
#[derive(Debug)]
pub enum Target<'a, E> {
    /// The product is written, plus a bias `[N]` if there is one.
    Write(&'a mut [E], Option<&'a [E]>),
    /// The product is added to fp32 sums, or overwrites them.
    Sum {
        /// The sums.
        to: &'a mut [f32],
        /// Whether the product is added.
        accumulate: bool,
    },
}

impl<E> Target<'_, E> {
    fn split_at(self, index: usize) -> (Self, Self) {
        match self {
            Self::Write(to, bias) => {
                let (head, rest) = to.split_at_mut(index);
                (Target::Write(head, bias), Target::Write(rest, bias))
            }
            Self::Sum { to, accumulate } => {
                let (head, rest) = to.split_at_mut(index);
                (Target::Sum { to: head, accumulate }, Target::Sum { to: rest, accumulate })
            }
        }
    }
}

/// Computes the sum of one or more products.
///
/// # Shapes
/// The terms are `[M, K] · [K, N]`; their `K` may differ. In bf16, `K` must be even if the left
/// operand is plain or the right one transposed, because pairs along a row are read as words.
///
/// # Panics
/// If a size is wrong, or the CPU is not supported ([`is_supported`]).
pub fn multiply<E: GemmElement>(
    pool: &dyn Pool,
    terms: &[(Operand<'_, E>, Operand<'_, E>)],
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
        return multiply_split_k::<E, K>(pool, terms, [rows, columns], to);
    }
    let packs_left = terms.iter().any(|term| in_place::<E, K>(term).is_none());
    let rows_at_once = if packs_left {
        // The packed left operands take 8 MiB at most.
        (2 * PACKED / depth.max(1) / BLOCK * BLOCK).max(MIN_TASKS * BLOCK)
    } else {
        rows
    };
    for first in (0..rows).step_by(rows_at_once) {
        let range = first..rows.min(first + rows_at_once);
        let terms: Vec<_> =
            terms.iter().map(|&(left, right)| (left.rows(range.clone()), right)).collect();
        let (head, rest) = to.split_at(range.len() * columns);
        multiply_packed::<E, K>(pool, &terms, [range.len(), columns], head);
        to = rest;
    }
}

/// Computes products whose depth is large compared to their size, such as the input gradient of the
/// head, by adding up slices of the depth (split-K, one slice after the other).
fn multiply_split_k<E: Element, K: MicroKernel>(
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
                let target = Target::Sum { to: sums, accumulate: true };
                multiply_packed::<E, K>(pool, &terms, [rows, columns], target);
            }
        }
    };
    match to {
        Target::Sum { to, accumulate } => {
            if !accumulate {
                to.fill(0.0);
            }
            add(to);
        }
        Target::Write(to, bias) => SPLIT_K_SUMS.with_borrow_mut(|sums| {
            sums.clear();
            sums.resize(rows * columns, 0.0);
            add(sums);
            for (to, sums) in to.chunks_exact_mut(columns).zip(sums.chunks_exact(columns)) {
                round(sums, bias, to);
            }
        }),
    }
}

/// Computes products whose left operands are packed all at once.
fn multiply_packed<E: Element, K: MicroKernel>(
    pool: &dyn Pool,
    terms: &[Term<'_, E>],
    [rows, columns]: [usize; 2],
    to: Target<'_, E>,
) {
    let to = Output::new(to, [rows, columns]);
    let depth: usize = terms.iter().map(depth_of::<E, K>).sum();
    let blocks = rows.div_ceil(BLOCK);
    let panels_at_once =
        (PACKED / (depth * PANEL).max(1)).max(MIN_TASKS.div_ceil(blocks) * K::PANELS);
    let panels = columns.div_ceil(PANEL);
    PACKED_OPERANDS.with_borrow_mut(|[left, right]| {
        for first in (0..panels).step_by(panels_at_once) {
            let chunk = first * PANEL..columns.min((first + panels_at_once) * PANEL);
            pack::<E, K>(pool, terms, chunk.clone(), [left, right], first == 0);
            let lefts = Packed::of_terms::<E, K>(terms, rows, left);
            let (groups, size) = (chunk.len().div_ceil(K::PANELS * PANEL), depth * PANEL);
            pool.run(blocks * groups, &|task| {
                let _release = ReleaseGuard::<K>::new();
                // Consecutive tasks share the operand that then stays in the L2 cache.
                let (block, group) = if K::REUSES_PANELS {
                    (task % blocks, task / blocks)
                } else {
                    (task / groups, task % groups)
                };
                let rows = block * BLOCK..rows.min((block + 1) * BLOCK);
                let columns = part(&chunk, group * K::PANELS * PANEL, K::PANELS * PANEL);
                for start in (0..columns.len()).step_by(PANEL) {
                    let panel = (group * K::PANELS + start / PANEL) * size;
                    let panel = &right[panel..panel + size];
                    #[expect(
                        unsafe_code,
                        reason = "tasks write to disjoint ranges; needs certain CPU features"
                    )]
                    // SAFETY: these rows of these columns belong to this task, and the CPU
                    // was checked.
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

/// Multiplies some rows by a panel.
///
/// # Safety
/// No other task that runs at the same time may write the same rows and columns.
#[expect(unsafe_code, reason = "tasks write to disjoint ranges")]
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
        // Unless the depth is divided, sums go straight from the L1 cache to the destination.
        let rows_at_once = if panel.len() <= DEPTH * PANEL { K::ROWS } else { BLOCK };
        for start in (0..rows.len()).step_by(rows_at_once) {
            let rows = part(&rows, start, rows_at_once);
            // SAFETY: the caller's contract.
            unsafe {
                to.prefetch(rows.clone(), columns.clone());
                sum::<K>(lefts, panel, rows.clone(), columns.len(), sums);
                to.store::<K>(sums, rows, columns.clone());
            }
        }
    });
}

// Reused by each thread: fresh memory costs page faults, and freeing it stalls the other threads.
thread_local! {
    static PACKED_OPERANDS: RefCell<[Buffer<u32>; 2]> =
        const { RefCell::new([Buffer::new(), Buffer::new()]) };
    static SPLIT_K_SUMS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    static SUMS: RefCell<Buffer<f32>> = const { RefCell::new(Buffer::new()) };
}

fn check<E: Element, K: MicroKernel>((left, right): Term<'_, E>, [rows, columns]: [usize; 2]) {
    let ([left_rows, depth], [right_depth, right_columns]) = (left.size(), right.size());
    assert_eq!((left_rows, right_depth, right_columns), (rows, depth, columns));
    for side in [left, right] {
        let (Operand::Plain(matrix) | Operand::Transposed(matrix)) = side;
        matrix.check();
    }
    // The words of these operands lie along rows, and are read as such.
    if let Operand::Plain(matrix) = left {
        matrix.check_words(K::PER_WORD);
    }
    if let Operand::Transposed(matrix) = right {
        matrix.check_words(K::PER_WORD);
    }
}

/// Computes the sums of some rows and one panel, with rows [`PANEL`] elements apart.
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
                let count = K::ROWS.min(rows.end - row);
                assert!(data.len() > (count - 1) * left.stride + (words - 1) * left.step);
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
                let mut remaining = count;
                while remaining > 0 {
                    #[expect(unsafe_code, reason = "the inner loop reads through pointers")]
                    // SAFETY: the left operand was checked above, the panel is `[words, PANEL]`,
                    // there are sums for all rows of a block, and the CPU supports the kernel.
                    unsafe {
                        let done = match (columns.div_ceil(LANES), is_first) {
                            (1, true) => K::micro_kernel::<1, false>(&tile, remaining),
                            (1, false) => K::micro_kernel::<1, true>(&tile, remaining),
                            (2, true) => K::micro_kernel::<2, false>(&tile, remaining),
                            (2, false) => K::micro_kernel::<2, true>(&tile, remaining),
                            (_, true) => K::micro_kernel::<3, false>(&tile, remaining),
                            (_, false) => K::micro_kernel::<3, true>(&tile, remaining),
                        };
                        remaining -= done;
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

/// A [`Target`] that several tasks write to.
struct Output<'a, E> {
    to: SharedTarget<'a, E>,
    /// The columns of the target, `N`.
    width: usize,
}

enum SharedTarget<'a, E> {
    Write(Shared<'a, E>, Option<&'a [E]>),
    Sum { to: Shared<'a, f32>, accumulate: bool },
}

impl<'a, E: Element> Output<'a, E> {
    fn new(to: Target<'a, E>, [rows, columns]: [usize; 2]) -> Self {
        let to = match to {
            Target::Write(to, bias) => {
                assert_eq!(to.len(), rows * columns);
                assert!(bias.is_none_or(|bias| bias.len() == columns));
                SharedTarget::Write(Shared::new(to), bias)
            }
            Target::Sum { to, accumulate } => {
                assert_eq!(to.len(), rows * columns);
                SharedTarget::Sum { to: Shared::new(to), accumulate }
            }
        };
        Self { to, width: columns }
    }

    /// Prefetches the elements that [`Self::store`] writes next, while their sums are computed.
    ///
    /// # Safety
    /// As for [`Self::store`].
    #[expect(unsafe_code, reason = "tasks write to disjoint ranges")]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn prefetch(&self, rows: Range<usize>, columns: Range<usize>) {
        for row in rows {
            let range = row * self.width + columns.start..row * self.width + columns.end;
            // SAFETY: the caller's contract.
            unsafe {
                match &self.to {
                    SharedTarget::Write(to, _) => prefetch(to.range(range)),
                    // Whole cache lines are overwritten and need not be read.
                    SharedTarget::Sum { accumulate: false, .. } => {}
                    SharedTarget::Sum { to, .. } => prefetch(to.range(range)),
                }
            }
        }
    }

    /// Stores the sums of some rows and columns.
    ///
    /// # Safety
    /// No other task that runs at the same time may store to the same elements, and the CPU must
    /// support the kernel.
    #[expect(unsafe_code, reason = "tasks write to disjoint ranges")]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn store<K: MicroKernel>(
        &self,
        sums: &[f32],
        rows: Range<usize>,
        columns: Range<usize>,
    ) {
        for (row, sums) in rows.zip(sums.chunks_exact(PANEL)) {
            let range = row * self.width + columns.start..row * self.width + columns.end;
            // SAFETY: the caller's contract.
            unsafe {
                match &self.to {
                    SharedTarget::Write(to, None) => {
                        let to = to.range(range);
                        K::round_row(&sums[..to.len()], to);
                    }
                    SharedTarget::Write(to, Some(bias)) => {
                        round(sums, Some(&bias[columns.clone()]), to.range(range));
                    }
                    SharedTarget::Sum { to, accumulate: false } => {
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

/// Rounds sums to the element type, plus a bias if there is one.
#[expect(clippy::inline_always, reason = "inlined into functions with target features")]
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
        matrix::{Matrix, Operand},
        pool::{Pool, Serial},
        testing::{assert_close, numbers, rounded},
    };

    /// Rows, depth and columns: below, at and above the sizes of tiles, panels, blocks and depth
    /// slices.
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

    fn is_supported<K: MicroKernel>() -> bool {
        let is_supported = K::is_supported();
        if !is_supported {
            eprintln!("skipped: this CPU has no {}", std::any::type_name::<K>());
        }
        is_supported
    }

    /// A matrix of random numbers with gaps between its rows, and the same without gaps.
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
    ) -> (Operand<'a, E>, Operand<'a, E>) {
        let [(left, left_transposed), (right, right_transposed)] = [left, right];
        let (left, right) = (left.matrix(), right.matrix());
        (
            if left_transposed { Operand::Transposed(left) } else { Operand::Plain(left) },
            if right_transposed { Operand::Transposed(right) } else { Operand::Plain(right) },
        )
    }

    #[test]
    fn products_follow_the_formula_in_every_layout() {
        check_layouts::<bf16>(&[
            is_supported::<Amx>().then_some(multiply_with::<bf16, Amx>),
            is_supported::<Avx512Bf16>().then_some(multiply_with::<bf16, Avx512Bf16>),
            is_supported::<Avx512>().then_some(multiply_with::<bf16, Avx512>),
        ]);
        check_layouts::<f32>(&[is_supported::<Avx512>().then_some(multiply_with::<f32, Avx512>)]);
    }

    type Multiply<E> = fn(&dyn Pool, &[Term<'_, E>], [usize; 2], Target<'_, E>);

    /// Compares each kernel with the formula, which is computed once because it is slow.
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
                    let target = Target::Sum { to: &mut sums, accumulate: true };
                    multiply(&Serial, &terms, [rows, columns], target);
                    let added: Vec<f32> = sums.iter().map(|sum| sum - 1.0).collect();
                    assert_close(&added, &exact, if depth > 0 { 1e-5 } else { 0.0 });
                    let target = Target::Sum { to: &mut sums, accumulate: false };
                    multiply(&Serial, &terms, [rows, columns], target);
                    assert_close(&sums, &exact, if depth > 0 { 1e-5 } else { 0.0 });
                }
            }
        }
    }

    #[test]
    fn transposed_operands_may_have_an_odd_depth() {
        check_odd::<Amx>();
        check_odd::<Avx512Bf16>();
        check_odd::<Avx512>();
    }

    fn check_odd<K: MicroKernel>() {
        if !is_supported::<K>() {
            return;
        }
        let (left, right) = (Random::<bf16>::new([77, 40], 1), Random::new([77, 60], 2));
        let mut sums = vec![0.0; 40 * 60];
        let terms = [term((&left, true), (&right, false))];
        multiply_with::<_, K>(
            &Serial,
            &terms,
            [40, 60],
            Target::Sum { to: &mut sums, accumulate: true },
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
        if !is_supported::<K>() {
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
    fn a_row_does_not_depend_on_other_rows() {
        check_rows::<bf16, Amx>();
        check_rows::<bf16, Avx512Bf16>();
        check_rows::<bf16, Avx512>();
        check_rows::<f32, Avx512>();
    }

    fn check_rows<E: Element, K: MicroKernel>() {
        if !is_supported::<K>() {
            return;
        }
        let (left, right) = (Random::<E>::new([200, 300], 1), Random::new([90, 300], 2));
        let mut all = vec![E::default(); 200 * 90];
        let terms = [term((&left, false), (&right, true))];
        multiply_with::<_, K>(&Serial, &terms, [200, 90], Target::Write(&mut all, None));
        for first in [0, 3, 150] {
            let data = &left.strided[first * left.stride..];
            let slice =
                Operand::Plain(Matrix { data, rows: 50, columns: 300, stride: left.stride });
            let mut rows = vec![E::default(); 50 * 90];
            let terms = [(slice, Operand::Transposed(right.matrix()))];
            multiply_with::<_, K>(&Serial, &terms, [50, 90], Target::Write(&mut rows, None));
            let bits =
                |values: &[E]| values.iter().map(|x| x.to_f32().to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&rows), bits(&all[first * 90..(first + 50) * 90]));
        }
    }

    #[test]
    #[should_panic(expected = "assertion")]
    fn mismatched_sizes_panic() {
        assert!(is_supported::<Avx512>(), "assertion: skipped");
        let (left, right) = (Random::<f32>::new([4, 6], 1), Random::new([8, 4], 2));
        multiply_with::<_, Avx512>(
            &Serial,
            &[term((&left, false), (&right, false))],
            [4, 4],
            Target::Sum { to: &mut [0.0; 16], accumulate: true },
        );
    }
}
