//! The first call of each vector function of MKL, before threads call it together.

use std::sync::Once;

use tch::{Kind, Tensor};

/// Calls every vector function of MKL that libtorch uses for fp32 and fp64, once in a process.
///
/// MKL chooses the kernel of such a function at its first call. When several threads make that call
/// together, MKL before 2025.0 may give one of them the fast kernel with half of the digits, which
/// changes one chunk of one result: pytorch/pytorch#188792. After this function has returned, all
/// calls give the same result.
pub fn resolve_kernels() {
    static RESOLVED: Once = Once::new();
    /// The functions of `ATen/cpu/vml.h` that libtorch gives to MKL.
    const FUNCTIONS: [fn(&Tensor) -> Tensor; 15] = [
        Tensor::acos,
        Tensor::asin,
        Tensor::atan,
        Tensor::cos,
        Tensor::erf,
        Tensor::erfc,
        Tensor::erfinv,
        Tensor::exp,
        Tensor::log,
        Tensor::log10,
        Tensor::log2,
        Tensor::sin,
        Tensor::sqrt,
        Tensor::tan,
        Tensor::tanh,
    ];
    RESOLVED.call_once(|| {
        for kind in [Kind::Float, Kind::Double] {
            let argument = Tensor::from(0.5).to_kind(kind);
            for function in FUNCTIONS {
                let _ = function(&argument);
            }
        }
    });
}
