//! Prefetches rows of a head. They are far apart in memory, so that the CPU does not do it.

use std::{arch::asm, ops::Range};

use half::bf16;

use crate::{attention::rows::Rows, pack::prefetch, pool::Shared};

/// Bytes of a cache line.
const LINE: usize = 64;

/// Prefetches rows that will be read.
#[inline]
pub(super) fn prefetch_rows(rows: &Rows, from: &[bf16], range: Range<usize>) {
    for row in range {
        prefetch(rows.row(from, row));
    }
}

/// Prefetches rows that will be overwritten: stores of other data then need not wait for them.
///
/// # Safety
/// No other task may access those rows of this head.
#[expect(unsafe_code, reason = "a hint that the standard library lacks")]
#[inline]
pub(super) unsafe fn prefetch_for_writing(rows: &Rows, to: &Shared<'_, bf16>, range: Range<usize>) {
    for row in range {
        let at = (rows.start + row) * rows.stride + rows.column;
        // SAFETY: the caller's contract; any address may be prefetched, and CPUs with AMX have the
        // instruction.
        unsafe {
            let start = to.range(at..at + rows.width).as_ptr().cast::<u8>();
            for line in (0..2 * rows.width).step_by(LINE) {
                asm!(
                    "prefetchw [{}]",
                    in(reg) start.wrapping_add(line),
                    options(nostack, preserves_flags, readonly),
                );
            }
        }
    }
}
