//! Compiles one source for several instruction sets and picks the widest at run time.

/// The instruction sets compiled for.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Level {
    Avx512,
    Avx2,
    Portable,
}

#[cfg(target_arch = "x86_64")]
impl Level {
    /// Returns the widest level of this CPU; the standard library caches the detection.
    #[inline]
    pub(crate) fn here() -> Self {
        let has_avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        if has_avx512 {
            Self::Avx512
        } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            Self::Avx2
        } else {
            Self::Portable
        }
    }
}

/// Defines a function over [`Element`](crate::Element)s whose body is compiled once for each
/// [`Level`].
///
/// In the body, `FUSED` says whether the CPU has fused multiply-add. Functions that it calls must
/// be `#[inline(always)]`, or they are compiled for the baseline only.
macro_rules! versions {
    ($(#[$meta:meta])* pub fn $name:ident<$($generic:ident),*>($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)? $body:block) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments, reason = "kernels take their operands one by one")]
        pub fn $name<$($generic: crate::Element),*>($($argument: $type),*) $(-> $result)? {
            // Not all bodies use `FUSED`.
            #[allow(clippy::extra_unused_type_parameters, reason = "see above")]
            #[inline(always)]
            fn plain<$($generic: crate::Element,)* const FUSED: bool>($($argument: $type),*) $(-> $result)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
                fn avx512<$($generic: crate::Element),*>($($argument: $type),*) $(-> $result)? {
                    plain::<$($generic,)* true>($($argument),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2<$($generic: crate::Element),*>($($argument: $type),*) $(-> $result)? {
                    plain::<$($generic,)* true>($($argument),*)
                }
                #[expect(unsafe_code, reason = "a function for certain CPU features is unsafe to call without them")]
                // SAFETY: the CPU has these instructions.
                match crate::versions::Level::here() {
                    crate::versions::Level::Avx512 => return unsafe { avx512($($argument),*) },
                    crate::versions::Level::Avx2 => return unsafe { avx2($($argument),*) },
                    crate::versions::Level::Portable => {}
                }
            }
            plain::<$($generic,)* false>($($argument),*)
        }
    };
}

pub(crate) use versions;
