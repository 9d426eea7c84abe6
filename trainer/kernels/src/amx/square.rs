//! Products with 32 rows and 32 columns of sums, for operands that fit in the L1 and L2 caches.
//!
//! Four tiles of sums, and two for each operand: all tiles are used, and each step of the depth
//! loads four tiles for four products.

use std::arch::asm;

use super::{TILE_ROWS, TILE_WORDS, configure};

/// Rows and columns of the sums.
pub(crate) const SIDE: usize = 2 * TILE_ROWS;

/// An operand: two tiles for each step of the depth. Distances are in words.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tiles<'a> {
    /// Starts with the first tile.
    pub data: &'a [u32],
    /// The distance of a tile's rows.
    pub stride: usize,
    /// The distance of the second tile.
    pub second: usize,
    /// The distance of the next step's tiles.
    pub step: usize,
}

impl Tiles<'_> {
    /// Returns the words from the first to the last of this many steps.
    fn extent(&self, steps: usize) -> usize {
        (steps - 1) * self.step + self.second + (TILE_ROWS - 1) * self.stride + TILE_WORDS
    }
}

/// Configures this thread's tiles for [`product`].
///
/// # Safety
/// The CPU must support AMX.
#[expect(unsafe_code, reason = "needs certain CPU features")]
pub(crate) unsafe fn configure_squares() {
    // SAFETY: the caller's contract.
    unsafe { configure(TILE_ROWS) }
}

/// Writes a product with a depth of `steps` tiles to `c`, whose rows are `stride` apart, or adds
/// it.
///
/// # Panics
/// If an operand is too small, or there is no step.
///
/// # Safety
/// Tiles must be configured ([`configure_squares`]).
#[expect(unsafe_code, reason = "instructions that the standard library lacks")]
#[inline]
pub(crate) unsafe fn product<const ADD: bool>(
    steps: usize,
    left: Tiles<'_>,
    right: Tiles<'_>,
    c: &mut [f32],
    stride: usize,
) {
    assert!(steps > 0);
    assert!(left.data.len() >= left.extent(steps) && right.data.len() >= right.extent(steps));
    assert!(c.len() >= (SIDE - 1) * stride + SIDE);
    let (mut a, mut b) = (left.data.as_ptr(), right.data.as_ptr());
    let (a_stride, b_stride, c_stride) = (4 * left.stride, 4 * right.stride, 4 * stride);
    let c = c.as_mut_ptr();
    // SAFETY: all tiles are inside the slices, as asserted, and tiles are configured.
    unsafe {
        let [c1, c2, c3] = [TILE_ROWS, TILE_ROWS * stride, TILE_ROWS * stride + TILE_ROWS]
            .map(|distance| c.add(distance));
        if ADD {
            load!(0, c, c_stride);
            load!(1, c1, c_stride);
            load!(2, c2, c_stride);
            load!(3, c3, c_stride);
        } else {
            zero!(0);
            zero!(1);
            zero!(2);
            zero!(3);
        }
        for _ in 0..steps {
            load!(4, a, a_stride);
            load!(6, b, b_stride);
            add_product!(0, 4, 6);
            load!(7, b.wrapping_add(right.second), b_stride);
            add_product!(1, 4, 7);
            load!(5, a.wrapping_add(left.second), a_stride);
            add_product!(2, 5, 6);
            add_product!(3, 5, 7);
            a = a.wrapping_add(left.step);
            b = b.wrapping_add(right.step);
        }
        store!(0, c, c_stride);
        store!(1, c1, c_stride);
        store!(2, c2, c_stride);
        store!(3, c3, c_stride);
    }
}
