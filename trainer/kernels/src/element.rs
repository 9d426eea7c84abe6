//! The element types of the kernels.

use half::bf16;

/// An element type: values are stored in it and computed with in fp32.
pub trait Element: Copy + Default + Send + Sync + 'static {
    /// Converts to fp32, exactly.
    fn to_f32(self) -> f32;
    /// Converts from fp32, rounding to nearest, ties to even.
    fn from_f32(value: f32) -> Self;
    /// Converts to bf16, rounding to nearest.
    fn to_bf16(self) -> bf16;
    /// Returns the same slice if its elements are bf16.
    fn as_bf16(values: &[Self]) -> Option<&[bf16]>;
    /// Returns the same slice if its elements are bf16.
    fn as_bf16_mut(values: &mut [Self]) -> Option<&mut [bf16]>;
}

#[expect(clippy::inline_always, reason = "inlined into every version of every kernel")]
impl Element for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }

    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }

    #[inline(always)]
    fn to_bf16(self) -> bf16 {
        <bf16 as Element>::from_f32(self)
    }

    #[inline(always)]
    fn as_bf16(_: &[Self]) -> Option<&[bf16]> {
        None
    }

    #[inline(always)]
    fn as_bf16_mut(_: &mut [Self]) -> Option<&mut [bf16]> {
        None
    }
}

#[expect(clippy::inline_always, reason = "inlined into every version of every kernel")]
impl Element for bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        // `half`'s own conversion has a branch, which keeps loops from being vectorised.
        let bits = value.to_bits();
        let rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
        Self::from_bits(if value.is_nan() { 0x7FC0 } else { rounded as u16 })
    }

    #[inline(always)]
    fn to_bf16(self) -> bf16 {
        self
    }

    #[inline(always)]
    fn as_bf16(values: &[Self]) -> Option<&[bf16]> {
        Some(values)
    }

    #[inline(always)]
    fn as_bf16_mut(values: &mut [Self]) -> Option<&mut [bf16]> {
        Some(values)
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use proptest::prelude::{prop_assert, proptest};

    use super::Element;

    proptest! {
        #[test]
        fn rounds_as_half_does(bits: u32) {
            let value = f32::from_bits(bits);
            let (ours, theirs) = (<bf16 as Element>::from_f32(value), bf16::from_f32(value));
            prop_assert!(ours == theirs || (ours.is_nan() && theirs.is_nan()));
            prop_assert!(ours.is_nan() == value.is_nan());
        }
    }
}
