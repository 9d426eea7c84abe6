//! The trainer's own CPU kernels: what libtorch does slowly, on plain slices.
//!
//! Each function works on some rows and knows nothing of tensors or threads; the caller divides
//! the rows. Arithmetic is fp32 whatever the element type. A row's result depends on that row
//! alone, so results do not change with the number of threads.
//!
//! One plain text is compiled for AVX-512, for AVX2 and for any processor (`versions`); only what
//! multiplies matrices, `attention`, `low_rank` and `matmul`, is written with instructions of its
//! own: it needs AVX-512, and takes what multiplies bf16 fastest (`choice`).

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
pub use choice::{Kernel, Multiplied};
pub use element::Element;

#[cfg(test)]
mod testing;
