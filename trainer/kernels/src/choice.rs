//! Which instructions multiply numbers of a type on this machine: the fastest, by measurement.
//!
//! What a processor says it has does not tell which is fast: on Intel's, `VDPBF16PS` multiplies half
//! as much in a second as `VFMADD` does in fp32, on AMD's twice as much.

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

/// What multiplies bf16 in this process, as its place in [`Kernel::ALL`] and one, if it was chosen.
static CHOSEN: AtomicUsize = AtomicUsize::new(0);

impl Kernel {
    /// All of them, the widest first.
    pub const ALL: [Self; 3] = [Self::Amx, Self::Avx512Bf16, Self::Avx512];

    /// Returns its name, as reports and the command line have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Amx => "amx",
            Self::Avx512Bf16 => "avx512-bf16",
            Self::Avx512 => "avx512",
        }
    }

    /// Tells whether this processor has the instructions.
    pub fn is_supported(self) -> bool {
        match self {
            Self::Amx => Amx::is_supported(),
            Self::Avx512Bf16 => Avx512Bf16::is_supported(),
            Self::Avx512 => Avx512::is_supported(),
        }
    }

    /// Makes it multiply bf16 in this process from now on, whatever is fastest.
    ///
    /// # Errors
    /// If this processor cannot.
    pub fn choose(self) -> Result<(), String> {
        if !self.is_supported() {
            return Err(format!("this processor lacks the instructions of {self}"));
        }
        let place = Self::ALL.into_iter().position(|kernel| kernel == self);
        CHOSEN.store(place.map_or(0, |place| place + 1), Ordering::Relaxed);
        Ok(())
    }

    /// Returns the numbers it multiplies in a second, measured some 20 microseconds long.
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
        found.ok_or_else(|| format!("{name:?} is no kernel, must be one of {}", names()))
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
        match CHOSEN.load(Ordering::Relaxed) {
            0 => *FASTEST,
            place => Some(Kernel::ALL[place - 1]),
        }
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
///
/// They differ by a factor of two and more, so that noise does not change the choice.
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

/// Returns the numbers multiplied in a second.
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

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::{CHOSEN, Kernel, Multiplied, Ordering, fastest};

    #[test]
    fn the_fastest_is_one_that_the_processor_has_and_amx_where_it_has_that() {
        let fastest = fastest();
        assert!(fastest.is_none_or(Kernel::is_supported));
        assert_eq!(fastest.is_none(), !Kernel::ALL.into_iter().any(Kernel::is_supported));
        if Kernel::Amx.is_supported() {
            assert_eq!(fastest, Some(Kernel::Amx));
        }
    }

    #[test]
    fn names_are_read_as_they_are_written() {
        for kernel in Kernel::ALL {
            assert_eq!(kernel.to_string().parse(), Ok(kernel));
        }
        let error = "sse2".parse::<Kernel>().unwrap_err();
        assert_eq!(error, "\"sse2\" is no kernel, must be one of amx, avx512-bf16, avx512");
    }

    #[test]
    fn what_is_chosen_multiplies_and_what_is_not_there_cannot_be_chosen() {
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
