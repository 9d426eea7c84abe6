//! Micro-kernels: small matrix products with fp32 sums, in registers and the L1 cache. `matmul`
//! builds larger products from their tiles.
//!
//! # Source
//! The register blocking of Goto and BLIS: outer products of a column and a row (Goto, van de
//! Geijn: Anatomy of High-Performance Matrix Multiplication, 2008). BLIS calls
//! [`MicroKernel::ROWS`] `MR` and the columns of a panel `NR`. VDPBF16PS multiplies pairs of
//! elements.

use std::{
    arch::x86_64::{
        __m256bh, __m512, __m512bh, __m512i, _mm512_castsi512_ps, _mm512_cvtneps_pbh,
        _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_set1_epi32,
        _mm512_setzero_ps, _mm512_storeu_ps,
    },
    marker::PhantomData,
};

use half::bf16;

use crate::{Element, versions::Level};

/// fp32 elements of one register.
pub(crate) const LANES: usize = 16;
/// Rows of one register tile. With two registers per row, the sums fill half of the registers; with
/// three, 24 of 32, and each register loaded from the right operand is used often enough to hide
/// the load.
pub(crate) const ROWS: usize = 8;

/// A micro-kernel: the format of its operands, and the innermost loops of a product.
///
/// Operands are made of 32-bit words: one fp32 element, or two bf16 elements that are adjacent
/// along the depth.
pub(crate) trait MicroKernel {
    /// The element type of words.
    type Number: Element;
    /// Elements of a word.
    const PER_WORD: usize = size_of::<u32>() / size_of::<Self::Number>();
    /// Rows of a register tile.
    const ROWS: usize;
    /// Registers per row of a tile in small products, 3 at most.
    const REGISTERS: usize;
    /// Panels of one task of a large product. Tasks write whole cache lines, to avoid false
    /// sharing.
    const PANELS: usize;
    /// Whether consecutive tasks use the same panels instead of the same rows.
    const REUSES_PANELS: bool;
    /// The depth of panels is padded with zeros to a multiple of this many words.
    const STEP: usize;
    /// Whether the words of a row of the left operand must be contiguous.
    const NEEDS_ROW_MAJOR_LEFT: bool;
    /// Whether it multiplies bf16 in AMX tiles; attention has passes of its own for them.
    const HAS_TILES: bool = false;
    /// Reports whether this CPU supports the kernel.
    fn is_supported() -> bool;

    /// Packs adjacent elements into a word, the first one in the low half; an fp32 word has no
    /// second.
    fn word<E: Element>(first: E, second: E) -> u32;

    /// Reports whether a slice of this element type can be read as words without packing.
    fn reads<E: Element>() -> bool {
        size_of::<E>() * Self::PER_WORD == size_of::<u32>()
    }

    /// Rounds a register of fp32 elements.
    ///
    /// # Safety
    /// The CPU must support the kernel.
    #[expect(unsafe_code, reason = "needs certain CPU features")]
    unsafe fn round(values: &[f32; LANES]) -> [Self::Number; LANES];

    /// Rounds fp32 elements, as many as both sides have, to nearest, ties to even. `VCVTNEPS2BF16`
    /// rounds numbers below the smallest normal one to zero.
    ///
    /// # Safety
    /// The CPU must support the kernel.
    #[expect(unsafe_code, reason = "needs certain CPU features")]
    unsafe fn round_row<E: Element>(values: &[f32], to: &mut [E]);

    /// Computes as many of a tile's `rows` as one register tile holds, and returns their number.
    /// `W` is the number of registers per row.
    ///
    /// # Safety
    /// All pointers of the tile must be in bounds, its words a multiple of [`Self::STEP`], and the
    /// CPU must support the kernel.
    #[expect(unsafe_code, reason = "needs certain CPU features")]
    unsafe fn micro_kernel<const W: usize, const ADD: bool>(tile: &Tile, rows: usize) -> usize;

    /// Writes a small product to `c`, or adds it; `sizes` are rows, words and columns.
    ///
    /// # Shapes
    /// As in [`product`].
    ///
    /// # Panics
    /// If a matrix is too small.
    ///
    /// # Safety
    /// The CPU must support the kernel.
    #[expect(unsafe_code, reason = "needs certain CPU features")]
    unsafe fn product<const ADD: bool>(
        sizes: [usize; 3],
        left: Words<'_>,
        right: Words<'_>,
        c: &mut [f32],
    );

    /// Releases the CPU state that this thread holds.
    fn release() {}
}

/// Rounds elements one by one.
#[expect(clippy::inline_always, reason = "inlined into functions with target features")]
#[inline(always)]
fn round_each<E: Element>(values: &[f32], to: &mut [E]) {
    to.iter_mut().zip(values).for_each(|(to, &value)| *to = E::from_f32(value));
}

/// Calls [`MicroKernel::release`] when dropped, at the end of a task.
pub(crate) struct ReleaseGuard<K: MicroKernel>(PhantomData<K>);

impl<K: MicroKernel> ReleaseGuard<K> {
    pub(crate) fn new() -> Self {
        Self(PhantomData)
    }
}

impl<K: MicroKernel> Drop for ReleaseGuard<K> {
    fn drop(&mut self) {
        K::release();
    }
}

/// Views elements as words.
///
/// # Panics
/// If they are not aligned to words.
pub(crate) fn words_of<E: Element>(values: &[E]) -> &[u32] {
    assert!(values.as_ptr().addr().is_multiple_of(align_of::<u32>()));
    #[expect(unsafe_code, reason = "reinterprets elements")]
    // SAFETY: aligned as asserted, inside the slice, and any bit pattern is a u32.
    unsafe {
        let length = size_of_val(values) / size_of::<u32>();
        std::slice::from_raw_parts(values.as_ptr().cast(), length)
    }
}

/// Packs two adjacent rows, or the first alone in fp32, into a row of words.
#[expect(clippy::inline_always, reason = "inlined into functions with target features")]
#[inline(always)]
pub(crate) fn interleave<E: Element, K: MicroKernel>(first: &[E], second: &[E], to: &mut [u32]) {
    for ((to, &first), &second) in to.iter_mut().zip(first).zip(second) {
        *to = K::word(first, second);
    }
}

/// Packs the elements of a row into words, as many as both sides have.
#[expect(clippy::inline_always, reason = "inlined into functions with target features")]
#[inline(always)]
pub(crate) fn write_words<'a, E: Element, K: MicroKernel>(
    row: &[E],
    to: impl IntoIterator<Item = &'a mut u32>,
) {
    for (to, pair) in to.into_iter().zip(row.chunks_exact(K::PER_WORD)) {
        *to = K::word(pair[0], pair[K::PER_WORD - 1]);
    }
}

/// The multiply-add instruction of a micro-kernel.
trait MultiplyAdd {
    /// Returns `sum` plus the products of the words.
    ///
    /// # Safety
    /// The CPU must support the kernel.
    #[expect(unsafe_code, reason = "needs certain CPU features")]
    unsafe fn multiply_add(sum: __m512, left: __m512i, right: __m512i) -> __m512;
}

/// AVX-512 with fp32: `VFMADD`. Elements of other types are converted while they are packed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx512;

/// AVX-512 with bf16: `VDPBF16PS`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx512Bf16;

/// Compiles the innermost loops of a micro-kernel for certain CPU features.
macro_rules! compiled {
    ($features:literal) => {
        const ROWS: usize = ROWS;
        const REGISTERS: usize = 2;
        const PANELS: usize = 4;
        const REUSES_PANELS: bool = false;
        const STEP: usize = 1;
        const NEEDS_ROW_MAJOR_LEFT: bool = false;

        #[expect(unsafe_code, reason = "needs certain CPU features")]
        #[target_feature(enable = $features)]
        unsafe fn micro_kernel<const W: usize, const ADD: bool>(tile: &Tile, rows: usize) -> usize {
            // SAFETY: the caller's contract.
            unsafe { tile.micro_kernel::<Self, W, ADD>(rows) }
        }

        #[expect(unsafe_code, reason = "needs certain CPU features")]
        #[target_feature(enable = $features)]
        unsafe fn product<const ADD: bool>(
            sizes: [usize; 3],
            left: Words<'_>,
            right: Words<'_>,
            c: &mut [f32],
        ) {
            // SAFETY: the caller's contract.
            unsafe { product::<Self, ADD>(sizes, left, right, c) }
        }
    };
}

#[expect(clippy::inline_always, reason = "inlined into functions with target features")]
impl MicroKernel for Avx512Bf16 {
    type Number = bf16;

    fn is_supported() -> bool {
        Avx512::is_supported() && is_x86_feature_detected!("avx512bf16")
    }

    #[inline(always)]
    fn word<E: Element>(first: E, second: E) -> u32 {
        let [first, second] = [first, second].map(|number| u32::from(number.to_bf16().to_bits()));
        first | second << 16
    }

    #[expect(unsafe_code, reason = "needs certain CPU features")]
    #[inline(always)]
    unsafe fn round(values: &[f32; LANES]) -> [bf16; LANES] {
        // SAFETY: the CPU supports the kernel, there are 16 values, and both types
        // have the same 256 bits.
        unsafe {
            let rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(values.as_ptr()));
            std::mem::transmute::<__m256bh, [bf16; LANES]>(rounded)
        }
    }

    #[expect(unsafe_code, reason = "needs certain CPU features")]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn round_row<E: Element>(values: &[f32], to: &mut [E]) {
        let Some(to) = E::as_bf16_mut(to) else { return round_each(values, to) };
        let (registers, rest) = to.as_chunks_mut::<LANES>();
        let (whole, remaining) = values.split_at(registers.len() * LANES);
        for (to, values) in registers.iter_mut().zip(whole.as_chunks::<LANES>().0) {
            // SAFETY: the caller's contract.
            *to = unsafe { Self::round(values) };
        }
        round_each(remaining, rest);
    }

    compiled!("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16");
}

impl MultiplyAdd for Avx512Bf16 {
    #[expect(unsafe_code, reason = "needs certain CPU features")]
    #[expect(clippy::inline_always, reason = "inlined into functions with target features")]
    #[inline(always)]
    unsafe fn multiply_add(sum: __m512, left: __m512i, right: __m512i) -> __m512 {
        // SAFETY: the CPU supports the kernel, and these types have the same 512 bits.
        unsafe {
            let [left, right] =
                [left, right].map(|bits| std::mem::transmute::<__m512i, __m512bh>(bits));
            _mm512_dpbf16_ps(sum, left, right)
        }
    }
}

#[expect(clippy::inline_always, reason = "inlined into functions with target features")]
impl MicroKernel for Avx512 {
    type Number = f32;

    fn is_supported() -> bool {
        Level::here() == Level::Avx512
    }

    #[inline(always)]
    fn word<E: Element>(first: E, _: E) -> u32 {
        first.to_f32().to_bits()
    }

    #[expect(unsafe_code, reason = "needs certain CPU features in bf16")]
    #[inline(always)]
    unsafe fn round(values: &[f32; LANES]) -> [f32; LANES] {
        *values
    }

    #[expect(unsafe_code, reason = "needs certain CPU features")]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn round_row<E: Element>(values: &[f32], to: &mut [E]) {
        round_each(values, to);
    }

    compiled!("avx512f,avx512bw,avx512dq,avx512vl");
}

impl MultiplyAdd for Avx512 {
    #[expect(unsafe_code, reason = "needs certain CPU features")]
    #[expect(clippy::inline_always, reason = "inlined into functions with target features")]
    #[inline(always)]
    unsafe fn multiply_add(sum: __m512, left: __m512i, right: __m512i) -> __m512 {
        // SAFETY: the CPU supports the kernel.
        unsafe { _mm512_fmadd_ps(_mm512_castsi512_ps(left), _mm512_castsi512_ps(right), sum) }
    }
}

/// A matrix of words.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Words<'a> {
    /// Starts with the first element.
    pub data: &'a [u32],
    /// The distance of rows, in words.
    pub stride: usize,
}

impl Words<'_> {
    /// Returns the matrix from `row` on.
    pub(crate) fn below(self, row: usize) -> Self {
        Self { data: &self.data[row * self.stride..], ..self }
    }
}

/// Writes `left · right` to `c`, or adds it.
///
/// # Shapes
/// `left` is `[rows, words]`, where a word packs adjacent elements of a row. `right` is
/// `[words, columns]`, where a word packs adjacent elements of a column. `c` is `[rows, columns]`,
/// contiguous, fp32; `columns` is a multiple of [`LANES`].
///
/// # Panics
/// If a matrix is too small.
///
/// # Safety
/// The CPU must support the kernel ([`MicroKernel::is_supported`]).
#[expect(clippy::inline_always, reason = "inlined into functions with target features")]
#[expect(unsafe_code, reason = "needs certain CPU features")]
#[inline(always)]
pub(crate) unsafe fn product<K: MicroKernel, const ADD: bool>(
    [rows, words, columns]: [usize; 3],
    left: Words<'_>,
    right: Words<'_>,
    c: &mut [f32],
) {
    assert!(columns.is_multiple_of(LANES) && c.len() >= rows * columns);
    if rows == 0 || words == 0 || columns == 0 {
        if !ADD {
            c[..rows * columns].fill(0.0);
        }
        return;
    }
    assert!(left.data.len() >= (rows - 1) * left.stride + words);
    assert!(right.data.len() >= (words - 1) * right.stride + columns);
    let mut column = 0;
    while column < columns {
        let registers = match (columns - column) / LANES {
            // Two tiles of two registers are faster than one of three and one of one.
            4 => 2,
            more => more.min(K::REGISTERS),
        };
        let mut row = 0;
        while row < rows {
            let tile = Tile {
                words,
                left: left.data[row * left.stride..].as_ptr(),
                left_stride: left.stride,
                left_step: 1,
                right: right.data[column..].as_ptr(),
                right_stride: right.stride,
                c: c[row * columns + column..].as_mut_ptr(),
                columns,
            };
            // SAFETY: the sizes were checked above, and the CPU supports the kernel.
            unsafe {
                row += match registers {
                    1 => K::micro_kernel::<1, ADD>(&tile, rows - row),
                    2 => K::micro_kernel::<2, ADD>(&tile, rows - row),
                    _ => K::micro_kernel::<3, ADD>(&tile, rows - row),
                };
            }
        }
        column += registers * LANES;
    }
}

/// The memory that a register tile reads and writes.
#[derive(Debug)]
pub(crate) struct Tile {
    /// The depth, in words.
    pub words: usize,
    /// The first word of the first row of the left operand.
    pub left: *const u32,
    /// The distance of rows of the left operand, in words.
    pub left_stride: usize,
    /// The distance of adjacent words of a row, in words.
    pub left_step: usize,
    /// The first word of the first column of the right operand.
    pub right: *const u32,
    /// The distance of adjacent words of a column, in words.
    pub right_stride: usize,
    /// The first sum.
    pub c: *mut f32,
    /// The distance of rows of sums, in elements.
    pub columns: usize,
}

#[expect(clippy::inline_always, reason = "inlined into functions with target features")]
impl Tile {
    /// Computes as many rows of `W` registers as the largest fitting tile has, and returns their
    /// number.
    ///
    /// # Safety
    /// All pointers of the tile must be in bounds, and the CPU must support the kernel.
    #[expect(unsafe_code, reason = "the inner loop reads through pointers")]
    #[inline(always)]
    unsafe fn micro_kernel<K: MultiplyAdd, const W: usize, const ADD: bool>(
        &self,
        rows: usize,
    ) -> usize {
        // SAFETY: the caller's contract.
        unsafe {
            match rows {
                ROWS.. => self.compute::<K, ROWS, W, ADD>(),
                4.. => self.compute::<K, 4, W, ADD>(),
                2.. => self.compute::<K, 2, W, ADD>(),
                _ => self.compute::<K, 1, W, ADD>(),
            }
        }
    }

    /// Computes `M` rows of `W` registers and returns `M`.
    ///
    /// # Safety
    /// As for [`Self::micro_kernel`].
    #[expect(unsafe_code, reason = "the inner loop reads through pointers")]
    #[inline(always)]
    unsafe fn compute<K: MultiplyAdd, const M: usize, const W: usize, const ADD: bool>(
        &self,
    ) -> usize {
        // SAFETY: the caller's contract.
        unsafe {
            let mut sums = [[_mm512_setzero_ps(); W]; M];
            if ADD {
                for (row, sums) in sums.iter_mut().enumerate() {
                    for (part, sum) in sums.iter_mut().enumerate() {
                        *sum = _mm512_loadu_ps(self.c.add(row * self.columns + LANES * part));
                    }
                }
            }
            let (mut left, mut right) = (self.left, self.right);
            for _ in 0..self.words {
                let mut columns = [_mm512_set1_epi32(0); W];
                for (part, column) in columns.iter_mut().enumerate() {
                    *column = _mm512_loadu_si512(right.add(LANES * part).cast());
                }
                for (row, sums) in sums.iter_mut().enumerate() {
                    let word = *left.add(row * self.left_stride);
                    let word = _mm512_set1_epi32(word.cast_signed());
                    for (sum, column) in sums.iter_mut().zip(columns) {
                        *sum = K::multiply_add(*sum, word, column);
                    }
                }
                left = left.wrapping_add(self.left_step);
                right = right.wrapping_add(self.right_stride);
            }
            for (row, sums) in sums.iter().enumerate() {
                for (part, sum) in sums.iter().enumerate() {
                    _mm512_storeu_ps(self.c.add(row * self.columns + LANES * part), *sum);
                }
            }
        }
        M
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::{Avx512, Avx512Bf16, MicroKernel, Words, interleave};
    use crate::{
        Element,
        amx::Amx,
        testing::{assert_close, numbers, rounded},
    };

    #[test]
    fn equals_the_sum_of_products_for_every_remainder_of_rows_and_depth() {
        check::<f32, Avx512>();
        check::<bf16, Avx512>();
        check::<bf16, Avx512Bf16>();
        check::<bf16, Amx>();
    }

    #[test]
    fn rows_of_any_length_are_rounded_as_elements_are() {
        check_rounding::<bf16, Avx512>();
        check_rounding::<bf16, Avx512Bf16>();
        check_rounding::<bf16, Amx>();
        check_rounding::<f32, Avx512>();
    }

    fn check_rounding<E: Element, K: MicroKernel>() {
        if !K::is_supported() {
            eprintln!("skipped: this CPU has no {}", std::any::type_name::<K>());
            return;
        }
        let mut values = numbers(50, 3);
        // Two of them lie halfway between two numbers of bf16.
        let ties = [129.0 / 128.0 - 1.0 / 256.0, 129.0 / 128.0 + 1.0 / 256.0];
        values[..4].copy_from_slice(&[f32::INFINITY, f32::MAX, ties[0], ties[1]]);
        for length in 0..values.len() {
            // Behind the row is memory that must not be written.
            let mut to = vec![E::from_f32(7.0); length + 1];
            #[expect(unsafe_code, reason = "needs certain CPU features")]
            // SAFETY: the CPU was checked.
            unsafe {
                K::round_row(&values[..length], &mut to[..length]);
            }
            let exact = values[..length].iter().copied().chain([7.0]);
            for (to, value) in to.iter().zip(exact) {
                assert_eq!(to.to_f32().to_bits(), E::from_f32(value).to_f32().to_bits());
            }
        }
    }

    fn check<E: Element, K: MicroKernel>() {
        if !K::is_supported() {
            eprintln!("skipped: this CPU has no {}", std::any::type_name::<K>());
            return;
        }
        for rows in 1..36 {
            for columns in [16, 32, 48, 64, 112] {
                for depth in [2, 10, 32, 70] {
                    check_size::<E, K>([rows, depth, columns]);
                }
            }
        }
    }

    fn check_size<E: Element, K: MicroKernel>([rows, depth, columns]: [usize; 3]) {
        let words = depth / K::PER_WORD;
        let a: Vec<E> = rounded(&numbers(rows * depth, 1));
        let b: Vec<E> = rounded(&numbers(depth * columns, 2));
        // Between the rows is memory that must not be read.
        let stride = words + 3;
        let mut left = vec![u32::MAX; rows * stride];
        for (row, to) in left.chunks_mut(stride).enumerate() {
            for (to, pair) in to.iter_mut().zip(a[row * depth..][..depth].chunks(K::PER_WORD)) {
                *to = K::word(pair[0], pair[pair.len() - 1]);
            }
        }
        let mut right = vec![0; words * columns];
        for (word, to) in right.chunks_mut(columns).enumerate() {
            let row = |k: usize| &b[k * columns..(k + 1) * columns];
            let first = word * K::PER_WORD;
            interleave::<E, K>(row(first), row(first + K::PER_WORD - 1), to);
        }
        let exact: Vec<f64> = (0..rows * columns)
            .map(|index| {
                let (row, column) = (index / columns, index % columns);
                (0..depth)
                    .map(|k| {
                        f64::from(a[row * depth + k].to_f32())
                            * f64::from(b[k * columns + column].to_f32())
                    })
                    .sum()
            })
            .collect();
        let mut c = vec![f32::NAN; rows * columns];
        let (left, right) =
            (Words { data: &left, stride }, Words { data: &right, stride: columns });
        let sizes = [rows, words, columns];
        for times in [1.0, 2.0] {
            #[expect(unsafe_code, reason = "needs certain CPU features")]
            // SAFETY: the CPU was checked.
            unsafe {
                if times < 2.0 {
                    K::product::<false>(sizes, left, right, &mut c);
                } else {
                    K::product::<true>(sizes, left, right, &mut c);
                }
            }
            let exact: Vec<f64> = exact.iter().map(|value| times * value).collect();
            assert_close(&c, &exact, 1e-6);
        }
        K::release();
    }
}
