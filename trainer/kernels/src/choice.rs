//! Which instructions multiply numbers of a type on this machine: the fastest, by measurement.
//!
//! What a processor says it has does not tell which is fast: on Intel's, `VDPBF16PS` multiplies half
//! as much in a second as `VFMADD` does in fp32, on AMD's twice as much.

use std::{fmt, hint::black_box, sync::LazyLock, time::Instant};

use half::bf16;

use crate::{
    Element,
    amx::Amx,
    gemm::{Avx512, Avx512Bf16, MicroKernel, Words},
};

/// Instructions that multiply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// Intel AMX with bf16.
    Amx,
    /// AVX-512 with bf16.
    Avx512Bf16,
    /// AVX-512 with fp32, to which bf16 is widened while it is packed.
    Avx512,
}

impl fmt::Display for Kernel {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Amx => "AMX",
            Self::Avx512Bf16 => "AVX512-BF16",
            Self::Avx512 => "AVX-512 in fp32",
        })
    }
}

/// A type whose products are ours on some machines.
pub trait Multiplied: Element {
    /// Returns what multiplies it here, if anything of ours does.
    fn kernel() -> Option<Kernel>;
}

impl Multiplied for f32 {
    fn kernel() -> Option<Kernel> {
        Avx512::is_supported().then_some(Kernel::Avx512)
    }
}

impl Multiplied for bf16 {
    fn kernel() -> Option<Kernel> {
        static FASTEST: LazyLock<Option<Kernel>> = LazyLock::new(fastest);
        *FASTEST
    }
}

/// Calls with `$K` as the type of the kernel that multiplies numbers of type `$E`.
///
/// # Panics
/// If there is none.
macro_rules! by_kernel {
    ($E:ty, $K:ident => $call:expr) => {
        match <$E as $crate::choice::Multiplied>::kernel() {
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
            None => panic!("no kernel of ours multiplies on this processor"),
        }
    };
}

pub(crate) use by_kernel;

/// Rows, words and columns of the product that is measured: its operands stay in the first cache.
const MEASURED: [usize; 3] = [32, 64, 48];
/// Measurements of each kernel, in turn; the fastest counts, for a machine is never faster than it is.
const ROUNDS: usize = 8;
/// Products in one measurement.
const PRODUCTS: usize = 16;

/// Returns the kernel that multiplies most bf16 numbers in a second.
fn fastest() -> Option<Kernel> {
    let candidates: Vec<(Kernel, fn() -> f64)> = [
        (Kernel::Amx, Amx::is_supported(), measure::<Amx> as fn() -> f64),
        (Kernel::Avx512Bf16, Avx512Bf16::is_supported(), measure::<Avx512Bf16>),
        (Kernel::Avx512, Avx512::is_supported(), measure::<Avx512>),
    ]
    .into_iter()
    .filter_map(|(kernel, is_supported, measure)| is_supported.then_some((kernel, measure)))
    .collect();
    let mut speeds = vec![0.0_f64; candidates.len()];
    for _ in 0..ROUNDS {
        for (speed, (_, measure)) in speeds.iter_mut().zip(&candidates) {
            *speed = speed.max(measure());
        }
    }
    let fastest = speeds.iter().zip(candidates).max_by(|(a, _), (b, _)| a.total_cmp(b));
    fastest.map(|(_, (kernel, _))| kernel)
}

/// Returns the numbers multiplied in a second, some 20 microseconds long.
fn measure<K: MicroKernel>() -> f64 {
    let [rows, words, columns] = MEASURED;
    let one = K::word(1.0_f32, 1.0);
    let (left, right) = (vec![one; rows * words], vec![one; words * columns]);
    let mut sums = vec![0.0; rows * columns];
    let started = Instant::now();
    for _ in 0..PRODUCTS {
        #[expect(unsafe_code, reason = "for certain processors")]
        // SAFETY: the processor was asked.
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
