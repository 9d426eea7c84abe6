//! Small matrix products with fp32 sums, out of registers and the first caches; larger ones are made
//! of their tiles (`matmul`).
//!
//! # Source
//! The blocking is the usual one for outer products in registers (Goto, van de Geijn: Anatomy of
//! High-Performance Matrix Multiplication, 2008); VDPBF16PS multiplies pairs of neighbours.

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

/// Elements of one register.
pub(crate) const LANES: usize = 16;
/// Rows of one register tile: with two registers each, sums fill half of the registers, with three,
/// what a register of the right side is read for hides its reading.
pub(crate) const ROWS: usize = 8;

/// A way to multiply: the words it takes, and its innermost loops over them.
///
/// A word has 32 bits: one fp32 number, or two bf16 numbers that are neighbours along the depth.
pub(crate) trait MicroKernel {
    /// What words are made of.
    type Number: Element;
    /// The numbers of a word.
    const PER_WORD: usize = size_of::<u32>() / size_of::<Self::Number>();
    /// Rows that are computed at once.
    const ROWS: usize;
    /// Registers side by side that small products compute at once, 3 at most.
    const REGISTERS: usize;
    /// Panels of one unit of a large product: whole lines of the cache, which units side by side would
    /// take from each other.
    const PANELS: usize;
    /// Whether units one after another share panels, and not rows.
    const KEEPS_PANELS: bool;
    /// Depths of panels are filled up with zeros to a multiple of so many words.
    const STEP: usize;
    /// Whether the words of a left side's row must lie side by side.
    const READS_ROWS: bool;
    /// Tells whether this processor can.
    fn is_supported() -> bool;

    /// Joins neighbours, the first in the low half; a word of one has no second.
    fn word<E: Element>(first: E, second: E) -> u32;

    /// Tells whether its words are numbers of a type as they are stored.
    fn reads<E: Element>() -> bool {
        size_of::<E>() * Self::PER_WORD == size_of::<u32>()
    }

    /// Rounds a register of numbers.
    ///
    /// # Safety
    /// The processor can.
    #[expect(unsafe_code, reason = "for certain processors")]
    unsafe fn round(values: &[f32; LANES]) -> [Self::Number; LANES];

    /// Computes as many of a tile's rows as there are instructions for, and returns how many.
    ///
    /// # Safety
    /// All of the tile's places must exist, its words be a multiple of [`Self::STEP`], and the
    /// processor can.
    #[expect(unsafe_code, reason = "for certain processors")]
    unsafe fn compute_some<const W: usize, const ADD: bool>(tile: &Tile, rows: usize) -> usize;

    /// Writes a small product to `c`, or adds it; sizes are rows, words and columns.
    ///
    /// # Shapes
    /// As in [`product`].
    ///
    /// # Panics
    /// If a matrix is too small.
    ///
    /// # Safety
    /// The processor can.
    #[expect(unsafe_code, reason = "for certain processors")]
    unsafe fn product<const ADD: bool>(
        sizes: [usize; 3],
        left: Words<'_>,
        right: Words<'_>,
        c: &mut [f32],
    );

    /// Gives back what this thread holds of the processor's state.
    fn release() {}
}

/// Calls [`MicroKernel::release`] when dropped, at the end of a unit of work.
pub(crate) struct Held<K: MicroKernel>(PhantomData<K>);

impl<K: MicroKernel> Held<K> {
    pub(crate) fn new() -> Self {
        Self(PhantomData)
    }
}

impl<K: MicroKernel> Drop for Held<K> {
    fn drop(&mut self) {
        K::release();
    }
}

/// Views numbers as words.
///
/// # Panics
/// If they are no words, or do not start where a word may.
pub(crate) fn words_of<E: Element>(values: &[E]) -> &[u32] {
    assert!(values.as_ptr().addr().is_multiple_of(align_of::<u32>()));
    #[expect(unsafe_code, reason = "numbers under another name")]
    // SAFETY: aligned as asserted, inside the slice, and any bits are a u32.
    unsafe {
        let length = size_of_val(values) / size_of::<u32>();
        std::slice::from_raw_parts(values.as_ptr().cast(), length)
    }
}

/// Writes the words of two rows' neighbours, or of the first row.
#[expect(clippy::inline_always, reason = "compiled with its caller's instructions")]
#[inline(always)]
pub(crate) fn interleave<E: Element, K: MicroKernel>(first: &[E], second: &[E], to: &mut [u32]) {
    for ((to, &first), &second) in to.iter_mut().zip(first).zip(second) {
        *to = K::word(first, second);
    }
}

/// Writes the words of a row, as many as there are and room is for.
#[expect(clippy::inline_always, reason = "compiled with its caller's instructions")]
#[inline(always)]
pub(crate) fn write_words<'a, E: Element, K: MicroKernel>(
    row: &[E],
    to: impl IntoIterator<Item = &'a mut u32>,
) {
    for (to, pair) in to.into_iter().zip(row.chunks_exact(K::PER_WORD)) {
        *to = K::word(pair[0], pair[K::PER_WORD - 1]);
    }
}

/// Multiplies words in registers.
trait MultiplyAdd {
    /// Adds the products of words.
    ///
    /// # Safety
    /// The processor can.
    #[expect(unsafe_code, reason = "for certain processors")]
    unsafe fn multiply_add(sum: __m512, left: __m512i, right: __m512i) -> __m512;
}

/// AVX-512 with fp32: `VFMADD`. Numbers of other types are widened while they are packed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx512;

/// AVX-512 with bf16: `VDPBF16PS`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx512Bf16;

/// Writes the innermost loops of a kernel for processors with some features.
macro_rules! compiled {
    ($features:literal) => {
        const ROWS: usize = ROWS;
        const REGISTERS: usize = 2;
        const PANELS: usize = 4;
        const KEEPS_PANELS: bool = false;
        const STEP: usize = 1;
        const READS_ROWS: bool = false;

        #[expect(unsafe_code, reason = "for certain processors")]
        #[target_feature(enable = $features)]
        unsafe fn compute_some<const W: usize, const ADD: bool>(tile: &Tile, rows: usize) -> usize {
            // SAFETY: the caller's.
            unsafe { tile.compute_some::<Self, W, ADD>(rows) }
        }

        #[expect(unsafe_code, reason = "for certain processors")]
        #[target_feature(enable = $features)]
        unsafe fn product<const ADD: bool>(
            sizes: [usize; 3],
            left: Words<'_>,
            right: Words<'_>,
            c: &mut [f32],
        ) {
            // SAFETY: the caller's.
            unsafe { product::<Self, ADD>(sizes, left, right, c) }
        }
    };
}

#[expect(clippy::inline_always, reason = "compiled with their callers' instructions")]
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

    #[expect(unsafe_code, reason = "for certain processors")]
    #[inline(always)]
    unsafe fn round(values: &[f32; LANES]) -> [bf16; LANES] {
        // SAFETY: the processor can, there are 16 values, and these are the same 256 bits under another
        // name.
        unsafe {
            let rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(values.as_ptr()));
            std::mem::transmute::<__m256bh, [bf16; LANES]>(rounded)
        }
    }

    compiled!("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16");
}

impl MultiplyAdd for Avx512Bf16 {
    #[expect(unsafe_code, reason = "for certain processors")]
    #[expect(clippy::inline_always, reason = "compiled with its callers' instructions")]
    #[inline(always)]
    unsafe fn multiply_add(sum: __m512, left: __m512i, right: __m512i) -> __m512 {
        // SAFETY: the processor can, and these are the same 512 bits under another name.
        unsafe {
            let [left, right] =
                [left, right].map(|bits| std::mem::transmute::<__m512i, __m512bh>(bits));
            _mm512_dpbf16_ps(sum, left, right)
        }
    }
}

#[expect(clippy::inline_always, reason = "compiled with their callers' instructions")]
impl MicroKernel for Avx512 {
    type Number = f32;

    fn is_supported() -> bool {
        Level::here() == Level::Avx512
    }

    #[inline(always)]
    fn word<E: Element>(first: E, _: E) -> u32 {
        first.to_f32().to_bits()
    }

    #[expect(unsafe_code, reason = "where bf16 needs a certain processor")]
    #[inline(always)]
    unsafe fn round(values: &[f32; LANES]) -> [f32; LANES] {
        *values
    }

    compiled!("avx512f,avx512bw,avx512dq,avx512vl");
}

impl MultiplyAdd for Avx512 {
    #[expect(unsafe_code, reason = "for certain processors")]
    #[expect(clippy::inline_always, reason = "compiled with its callers' instructions")]
    #[inline(always)]
    unsafe fn multiply_add(sum: __m512, left: __m512i, right: __m512i) -> __m512 {
        // SAFETY: the processor can.
        unsafe { _mm512_fmadd_ps(_mm512_castsi512_ps(left), _mm512_castsi512_ps(right), sum) }
    }
}

/// A matrix of words.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Words<'a> {
    /// Its first element starts the slice.
    pub data: &'a [u32],
    /// From one row to the next.
    pub stride: usize,
}

impl Words<'_> {
    /// Returns the matrix without some rows at its start.
    pub(crate) fn below(self, row: usize) -> Self {
        Self { data: &self.data[row * self.stride..], ..self }
    }
}

/// Writes `left · right` to `c`, or adds it.
///
/// # Shapes
/// `left` is `[rows, words]`: a word has neighbours along a row. `right` is `[words, columns]`: a word
/// has neighbours along a column. `c` is `[rows, columns]` with rows `columns` apart, which
/// is a multiple of [`LANES`].
///
/// # Panics
/// If a matrix is too small.
///
/// # Safety
/// The processor can ([`MicroKernel::is_supported`]).
#[expect(clippy::inline_always, reason = "compiled with its caller's instructions")]
#[expect(unsafe_code, reason = "for certain processors")]
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
            // Two and two take less than three and one.
            4 => 2,
            more => more.min(K::REGISTERS),
        };
        let mut row = 0;
        while row < rows {
            let from = Tile {
                words,
                left: left.data[row * left.stride..].as_ptr(),
                left_stride: left.stride,
                left_step: 1,
                right: right.data[column..].as_ptr(),
                right_stride: right.stride,
                c: c[row * columns + column..].as_mut_ptr(),
                columns,
            };
            // SAFETY: the sizes were checked above, and the processor can.
            unsafe {
                row += match registers {
                    1 => K::compute_some::<1, ADD>(&from, rows - row),
                    2 => K::compute_some::<2, ADD>(&from, rows - row),
                    _ => K::compute_some::<3, ADD>(&from, rows - row),
                };
            }
        }
        column += registers * LANES;
    }
}

/// Where a register tile reads and writes.
#[derive(Debug)]
pub(crate) struct Tile {
    /// Words that are multiplied for each sum.
    pub words: usize,
    /// The first word of the first row.
    pub left: *const u32,
    /// From one row to the next.
    pub left_stride: usize,
    /// From one word of a row to the next.
    pub left_step: usize,
    /// The first word of the first column.
    pub right: *const u32,
    /// From one word of a column to the next.
    pub right_stride: usize,
    /// The first sum.
    pub c: *mut f32,
    /// From one row of sums to the next.
    pub columns: usize,
}

#[expect(clippy::inline_always, reason = "compiled with their callers' instructions")]
impl Tile {
    /// Computes as many rows of `W` registers as there is a tile for, and returns how many.
    ///
    /// # Safety
    /// All of the tile's places must exist, and the processor can.
    #[expect(unsafe_code, reason = "the inner loop reads through pointers")]
    #[inline(always)]
    unsafe fn compute_some<K: MultiplyAdd, const W: usize, const ADD: bool>(
        &self,
        rows: usize,
    ) -> usize {
        // SAFETY: the caller's.
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
    /// As [`Self::compute_some`]'s.
    #[expect(unsafe_code, reason = "the inner loop reads through pointers")]
    #[inline(always)]
    unsafe fn compute<K: MultiplyAdd, const M: usize, const W: usize, const ADD: bool>(
        &self,
    ) -> usize {
        // SAFETY: the caller's.
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

    fn check<E: Element, K: MicroKernel>() {
        if !K::is_supported() {
            eprintln!("skipped: this processor has no {}", std::any::type_name::<K>());
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
        // Rows lie apart, and between them is what must not be read.
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
            #[expect(unsafe_code, reason = "for certain processors")]
            // SAFETY: the processor was asked.
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
