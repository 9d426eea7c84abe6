//! Two bf16 under one name: what VDPBF16PS multiplies at once.

use half::bf16;

/// Joins two neighbours, the first in the low half.
#[expect(clippy::inline_always, reason = "compiled with its caller's instructions")]
#[inline(always)]
pub(crate) fn pair_of(low: bf16, high: bf16) -> u32 {
    u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16
}

/// Writes the pairs of two rows' neighbours.
#[expect(clippy::inline_always, reason = "compiled with its caller's instructions")]
#[inline(always)]
pub(crate) fn interleave(low: &[bf16], high: &[bf16], to: &mut [u32]) {
    for ((to, &low), &high) in to.iter_mut().zip(low).zip(high) {
        *to = pair_of(low, high);
    }
}

/// Views fp32 as bits.
pub(crate) fn bits_of(values: &[f32]) -> &[u32] {
    #[expect(unsafe_code, reason = "a number under another name")]
    // SAFETY: of the same size and alignment, and any bits are a u32.
    unsafe {
        std::slice::from_raw_parts(values.as_ptr().cast(), values.len())
    }
}

/// Views bf16 as pairs.
pub(crate) fn pairs_of(values: &[bf16]) -> &[u32] {
    assert!(values.as_ptr().addr().is_multiple_of(align_of::<u32>()));
    #[expect(unsafe_code, reason = "two numbers under one name")]
    // SAFETY: aligned as asserted, inside the slice, and any bits are a u32.
    unsafe {
        std::slice::from_raw_parts(values.as_ptr().cast(), values.len() / 2)
    }
}
