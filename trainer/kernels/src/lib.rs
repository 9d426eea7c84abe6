//! The trainer's own CPU kernels, on plain slices, for operators that are slow in libtorch.
//!
//! Each function computes some rows and knows nothing of tensors or threads; the caller divides the
//! rows among threads. Arithmetic is fp32 whatever the element type. The result of a row depends on
//! that row alone, so results do not change with the number of threads.
//!
//! The same source is compiled for AVX-512, for AVX2 and for the baseline (`versions`). Only the
//! matrix products, `attention`, `low_rank` and `matmul`, use intrinsics: they need AVX-512, and
//! multiply bf16 with the fastest instructions of the CPU (`choice`).

mod versions;

pub mod adamw;
pub mod adamw_8bit;
#[cfg(target_arch = "x86_64")]
mod aligned;
#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
pub mod attention;
#[cfg(target_arch = "x86_64")]
mod choice;
pub mod cross_entropy;
pub mod dropout;
mod element;
mod exp;
#[cfg(target_arch = "x86_64")]
mod gemm;
#[cfg(target_arch = "x86_64")]
pub mod low_rank;
#[cfg(target_arch = "x86_64")]
pub mod matmul;
pub mod matrix;
#[cfg(target_arch = "x86_64")]
mod pack;
pub mod pool;
pub mod rms_norm;
pub mod rope;
pub mod sum;
pub mod swiglu;
#[cfg(target_arch = "x86_64")]
mod transpose;

#[cfg(target_arch = "x86_64")]
pub use choice::{GemmElement, Kernel};
pub use element::Element;

#[cfg(test)]
mod testing;
