//! Chooses the instructions for matrix products on this machine: the fastest, by measurement.
//!
//! CPU features do not tell which instructions are fast: on Intel CPUs `VDPBF16PS` has half the
//! throughput of `VFMADD` in fp32, on AMD CPUs twice.

use std::{
    fmt,
    hint::black_box,
    str::FromStr,
    sync::{
        LazyLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::Instant,
};

use half::bf16;

use crate::{
    Element,
    amx::Amx,
    gemm::{Avx512, Avx512Bf16, MicroKernel, Words},
};

/// The instructions of a matrix product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// Intel AMX with bf16.
    Amx,
    /// AVX-512 with bf16.
    Avx512Bf16,
    /// AVX-512 with fp32; bf16 is converted while it is packed.
    Avx512,
}

/// The kernel chosen for bf16 in this process: its index in [`Kernel::ALL`] plus one, or 0 for
/// none.
static CHOSEN: AtomicUsize = AtomicUsize::new(0);

impl Kernel {
    /// All kernels, the widest instructions first.
    pub const ALL: [Self; 3] = [Self::Amx, Self::Avx512Bf16, Self::Avx512];

    /// Returns the name used in reports and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Amx => "amx",
            Self::Avx512Bf16 => "avx512-bf16",
            Self::Avx512 => "avx512",
        }
    }

    /// Reports whether this CPU has the instructions.
    pub fn is_supported(self) -> bool {
        match self {
            Self::Amx => Amx::is_supported(),
            Self::Avx512Bf16 => Avx512Bf16::is_supported(),
            Self::Avx512 => Avx512::is_supported(),
        }
    }

    /// Makes this the kernel for bf16 in this process, even if it is not the fastest.
    ///
    /// # Errors
    /// If this CPU lacks the instructions.
    pub fn choose(self) -> Result<(), String> {
        if !self.is_supported() {
            return Err(format!("this CPU lacks the instructions of the kernel {self}"));
        }
        let index = Self::ALL.into_iter().position(|kernel| kernel == self);
        CHOSEN.store(index.map_or(0, |index| index + 1), Ordering::Relaxed);
        Ok(())
    }

    /// Measures its throughput for some 20 microseconds, in multiplications per second.
    fn measure(self) -> f64 {
        match self {
            Self::Amx => measure::<Amx>(),
            Self::Avx512Bf16 => measure::<Avx512Bf16>(),
            Self::Avx512 => measure::<Avx512>(),
        }
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

impl FromStr for Kernel {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|kernel| kernel.name() == name);
        let names = || Self::ALL.map(Self::name).join(", ");
        found.ok_or_else(|| format!("{name:?} is not a kernel, must be one of {}", names()))
    }
}

/// An element type of matrix products.
pub trait GemmElement: Element {
    /// Returns the kernel for this type on this machine; `None` if none of ours is supported.
    fn kernel() -> Option<Kernel>;
}

impl GemmElement for f32 {
    fn kernel() -> Option<Kernel> {
        Avx512::is_supported().then_some(Kernel::Avx512)
    }
}

impl GemmElement for bf16 {
    fn kernel() -> Option<Kernel> {
        static FASTEST: LazyLock<Option<Kernel>> = LazyLock::new(fastest);
        match CHOSEN.load(Ordering::Relaxed) {
            0 => *FASTEST,
            index => Some(Kernel::ALL[index - 1]),
        }
    }
}

/// Evaluates an expression with `$K` as the micro-kernel for elements of type `$E`.
///
/// # Panics
/// If there is none.
macro_rules! by_kernel {
    ($E:ty, $K:ident => $call:expr) => {
        match <$E as $crate::choice::GemmElement>::kernel() {
            Some($crate::choice::Kernel::Amx) => {
                type $K = $crate::amx::Amx;
                $call
            }
            Some($crate::choice::Kernel::Avx512Bf16) => {
                type $K = $crate::gemm::Avx512Bf16;
                $call
            }
            Some($crate::choice::Kernel::Avx512) => {
                type $K = $crate::gemm::Avx512;
                $call
            }
            None => panic!("none of our kernels multiplies on this CPU"),
        }
    };
}

pub(crate) use by_kernel;

/// Rows, words and columns of the measured product, whose operands fit in the L1 cache.
const MEASURED: [usize; 3] = [32, 64, 48];
/// Measurements of each kernel, in turn; the fastest counts, as noise only slows a kernel down.
const ROUNDS: usize = 8;
/// Products in one measurement.
const PRODUCTS: usize = 16;

/// Returns the kernel with the highest bf16 throughput.
///
/// Kernels differ by a factor of two or more, so that noise does not change the choice.
fn fastest() -> Option<Kernel> {
    let mut candidates: Vec<(Kernel, f64)> = Kernel::ALL
        .into_iter()
        .filter(|kernel| kernel.is_supported())
        .map(|kernel| (kernel, 0.0))
        .collect();
    for _ in 0..ROUNDS {
        for (kernel, speed) in &mut candidates {
            *speed = kernel.measure().max(*speed);
        }
    }
    let fastest = candidates.into_iter().max_by(|(_, one), (_, other)| one.total_cmp(other));
    fastest.map(|(kernel, _)| kernel)
}

/// Returns the multiplications per second.
fn measure<K: MicroKernel>() -> f64 {
    let [rows, words, columns] = MEASURED;
    let one = K::word(1.0_f32, 1.0);
    let (left, right) = (vec![one; rows * words], vec![one; words * columns]);
    let mut sums = vec![0.0; rows * columns];
    let started = Instant::now();
    for _ in 0..PRODUCTS {
        #[expect(unsafe_code, reason = "needs certain CPU features")]
        // SAFETY: the CPU was checked.
        unsafe {
            let (left, right) =
                (Words { data: &left, stride: words }, Words { data: &right, stride: columns });
            K::product::<true>(MEASURED, left, right, black_box(&mut sums));
        }
    }
    let numbers = PRODUCTS * rows * words * K::PER_WORD * columns;
    let speed = numbers as f64 / started.elapsed().as_secs_f64();
    K::release();
    speed
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::{CHOSEN, GemmElement, Kernel, Ordering, fastest};

    #[test]
    fn the_fastest_kernel_is_supported_and_is_amx_if_available() {
        let fastest = fastest();
        assert!(fastest.is_none_or(Kernel::is_supported));
        assert_eq!(fastest.is_none(), !Kernel::ALL.into_iter().any(Kernel::is_supported));
        if Kernel::Amx.is_supported() {
            assert_eq!(fastest, Some(Kernel::Amx));
        }
    }

    #[test]
    fn names_parse_as_they_are_printed() {
        for kernel in Kernel::ALL {
            assert_eq!(kernel.to_string().parse(), Ok(kernel));
        }
        let error = "sse2".parse::<Kernel>().unwrap_err();
        assert_eq!(error, "\"sse2\" is not a kernel, must be one of amx, avx512-bf16, avx512");
    }

    #[test]
    fn a_supported_kernel_can_be_chosen_and_an_unsupported_one_cannot() {
        for kernel in Kernel::ALL {
            match kernel.choose() {
                Ok(()) => assert_eq!(bf16::kernel(), Some(kernel)),
                Err(_) => assert!(!kernel.is_supported()),
            }
        }
        CHOSEN.store(0, Ordering::Relaxed);
        assert_eq!(bf16::kernel(), fastest());
    }
}
