//! The elements of tensors as slices.

use half::bf16;
use tch::{Device, Kind, Tensor};

/// A type that tensors are made of.
pub(super) trait Native: Copy {
    /// libtorch's name for it.
    const KIND: Kind;
}

impl Native for f32 {
    const KIND: Kind = Kind::Float;
}

impl Native for bf16 {
    const KIND: Kind = Kind::BFloat16;
}

impl Native for i64 {
    const KIND: Kind = Kind::Int64;
}

/// Returns the elements of a dense CPU tensor.
///
/// # Panics
/// If it is another's.
pub(super) fn elements<E: Native>(tensor: &Tensor) -> &[E] {
    check::<E>(tensor);
    #[expect(unsafe_code, reason = "libtorch's memory")]
    // SAFETY: it holds that many elements of the type, dense, for as long as the tensor lives.
    // A tensor without elements may have no address.
    unsafe {
        match tensor.numel() {
            0 => &[],
            length => std::slice::from_raw_parts(tensor.data_ptr().cast(), length),
        }
    }
}

/// Returns the elements of a dense CPU tensor, to be written to.
///
/// # Panics
/// If it is another's.
pub(super) fn elements_mut<E: Native>(tensor: &mut Tensor) -> &mut [E] {
    check::<E>(tensor);
    #[expect(unsafe_code, reason = "libtorch's memory")]
    // SAFETY: as above; the trainer has one thread that touches tensors.
    unsafe {
        match tensor.numel() {
            0 => &mut [],
            length => std::slice::from_raw_parts_mut(tensor.data_ptr().cast(), length),
        }
    }
}

fn check<E: Native>(tensor: &Tensor) {
    assert!(
        tensor.kind() == E::KIND && tensor.device() == Device::Cpu && tensor.is_contiguous(),
        "{:?} {:?} on {:?} with strides {:?}",
        tensor.size(),
        tensor.kind(),
        tensor.device(),
        tensor.stride(),
    );
}
