//! The elements of tensors as slices.

use finetune_kernels::matrix::{Matrix, Side};
use half::bf16;
use tch::{Device, Kind, Tensor};

use crate::ops::Factor;

/// Calls with `$E` as the type of a kind's elements.
macro_rules! by_kind {
    ($kind:expr, $E:ident => $call:expr) => {
        match $kind {
            ::tch::Kind::Float => {
                type $E = f32;
                $call
            }
            ::tch::Kind::BFloat16 => {
                type $E = ::half::bf16;
                $call
            }
            kind => unreachable!("models are computed in fp32 or bf16, not {kind:?}"),
        }
    };
}

pub(super) use by_kind;

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

impl Native for i8 {
    const KIND: Kind = Kind::Int8;
}

impl Native for u8 {
    const KIND: Kind = Kind::Uint8;
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

/// Tells whether [`matrix`] has a matrix's elements, in words of 32 bits: in bf16 each two neighbours
/// of a row are aligned as one.
pub(super) fn is_matrix_of_words<E: Native>(tensor: &Tensor) -> bool {
    let (size, stride) = (tensor.size(), tensor.stride());
    let per_word = (size_of::<u32>() / size_of::<E>()).max(1) as i64;
    tensor.device() == Device::Cpu
        && tensor.kind() == E::KIND
        && size.len() == 2
        && size[1] % per_word == 0
        && stride[1] == 1
        && stride[0] % per_word == 0
        && tensor.data_ptr().addr().is_multiple_of(align_of::<u32>())
}

/// Views a matrix of words, which may be some columns of a wider one.
///
/// # Panics
/// If it is none.
pub(super) fn matrix<E: Native>(tensor: &Tensor) -> Matrix<'_, E> {
    assert!(is_matrix_of_words::<E>(tensor), "{:?} {:?}", tensor.size(), tensor.stride());
    #[expect(unsafe_code, reason = "libtorch's memory")]
    // SAFETY: it holds them for as long as the tensor lives.
    let data = unsafe {
        match extent(tensor) {
            0 => &[],
            length => std::slice::from_raw_parts(tensor.data_ptr().cast(), length),
        }
    };
    let [rows, columns, stride] =
        [tensor.size()[0], tensor.size()[1], tensor.stride()[0]].map(|size| size as usize);
    Matrix { data, rows, columns, stride }
}

/// Views the right side of a product.
///
/// # Panics
/// If it is no matrix of words.
pub(super) fn side<E: Native>(factor: Factor<'_>) -> Side<'_, E> {
    match factor {
        Factor::Plain(factor) => Side::Plain(matrix(factor)),
        Factor::Transposed(factor) => Side::Transposed(matrix(factor)),
    }
}

/// Returns the elements of a matrix of words, from the first to the last, with those between its
/// rows if it is a part of a wider one, to be written to.
///
/// # Panics
/// If it is none.
pub(super) fn matrix_mut<E: Native>(tensor: &mut Tensor) -> &mut [E] {
    assert!(is_matrix_of_words::<E>(tensor), "{:?} {:?}", tensor.size(), tensor.stride());
    #[expect(unsafe_code, reason = "libtorch's memory")]
    // SAFETY: as above; the trainer has one thread that touches tensors.
    unsafe {
        match extent(tensor) {
            0 => &mut [],
            length => std::slice::from_raw_parts_mut(tensor.data_ptr().cast(), length),
        }
    }
}

fn extent(matrix: &Tensor) -> usize {
    let (rows, columns) = matrix.size2().expect("a matrix has two axes");
    if matrix.numel() == 0 { 0 } else { ((rows - 1) * matrix.stride()[0] + columns) as usize }
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
