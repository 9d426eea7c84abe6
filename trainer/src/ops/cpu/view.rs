//! Views of the elements of CPU tensors as slices and matrices.

use finetune_kernels::matrix::{Matrix, Operand};
use half::bf16;
use tch::{Device, Kind, Tensor};

use crate::ops::Factor;

/// Evaluates an expression with `$E` as the element type of a tensor kind.
macro_rules! dispatch_dtype {
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

pub(super) use dispatch_dtype;

/// An element type of tensors.
pub(super) trait TensorElement: Copy {
    /// The tensor kind of the type.
    const KIND: Kind;
}

impl TensorElement for f32 {
    const KIND: Kind = Kind::Float;
}

impl TensorElement for bf16 {
    const KIND: Kind = Kind::BFloat16;
}

impl TensorElement for i8 {
    const KIND: Kind = Kind::Int8;
}

impl TensorElement for u8 {
    const KIND: Kind = Kind::Uint8;
}

impl TensorElement for i64 {
    const KIND: Kind = Kind::Int64;
}

/// Returns the elements of a contiguous CPU tensor.
///
/// # Panics
/// If the tensor has another type or device, or is not contiguous.
pub(super) fn elements<E: TensorElement>(tensor: &Tensor) -> &[E] {
    check::<E>(tensor);
    #[expect(unsafe_code, reason = "libtorch's memory")]
    // SAFETY: the tensor holds that many contiguous elements of the type for as long as it lives.
    // A tensor without elements may have no address.
    unsafe {
        match tensor.numel() {
            0 => &[],
            length => std::slice::from_raw_parts(tensor.data_ptr().cast(), length),
        }
    }
}

/// Returns the elements of a contiguous CPU tensor, mutable.
///
/// # Panics
/// If the tensor has another type or device, or is not contiguous.
pub(super) fn elements_mut<E: TensorElement>(tensor: &mut Tensor) -> &mut [E] {
    check::<E>(tensor);
    #[expect(unsafe_code, reason = "libtorch's memory")]
    // SAFETY: as above; only one thread of the trainer accesses tensors.
    unsafe {
        match tensor.numel() {
            0 => &mut [],
            length => std::slice::from_raw_parts_mut(tensor.data_ptr().cast(), length),
        }
    }
}

/// Reports whether a tensor is a CPU matrix of the type whose rows are aligned to 32-bit words, so
/// that bf16 elements can be read in pairs.
pub(super) fn is_word_aligned_matrix<E: TensorElement>(tensor: &Tensor) -> bool {
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

/// Views a word-aligned matrix, which may be a column slice of a wider one.
///
/// # Panics
/// If [`is_word_aligned_matrix`] is false.
pub(super) fn matrix<E: TensorElement>(tensor: &Tensor) -> Matrix<'_, E> {
    assert!(is_word_aligned_matrix::<E>(tensor), "{:?} {:?}", tensor.size(), tensor.stride());
    #[expect(unsafe_code, reason = "libtorch's memory")]
    // SAFETY: the tensor holds these elements for as long as it lives.
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

/// Views the right operand of a product.
///
/// # Panics
/// If [`is_word_aligned_matrix`] is false.
pub(super) fn operand<E: TensorElement>(factor: Factor<'_>) -> Operand<'_, E> {
    match factor {
        Factor::Plain(factor) => Operand::Plain(matrix(factor)),
        Factor::Transposed(factor) => Operand::Transposed(matrix(factor)),
    }
}

/// Returns the elements of a word-aligned matrix from the first to the last, mutable. In a column
/// slice this includes the elements between its rows.
///
/// # Panics
/// If [`is_word_aligned_matrix`] is false.
pub(super) fn matrix_mut<E: TensorElement>(tensor: &mut Tensor) -> &mut [E] {
    assert!(is_word_aligned_matrix::<E>(tensor), "{:?} {:?}", tensor.size(), tensor.stride());
    #[expect(unsafe_code, reason = "libtorch's memory")]
    // SAFETY: as above; only one thread of the trainer accesses tensors.
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

fn check<E: TensorElement>(tensor: &Tensor) {
    assert!(
        tensor.kind() == E::KIND && tensor.device() == Device::Cpu && tensor.is_contiguous(),
        "{:?} {:?} on {:?} with strides {:?}",
        tensor.size(),
        tensor.kind(),
        tensor.device(),
        tensor.stride(),
    );
}
