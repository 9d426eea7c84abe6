//! Products of large matrices, by our kernels.

use finetune_kernels::{
    matmul::{Target, is_supported, multiply},
    matrix::Operand,
};
use tch::{Kind, Tensor};

use crate::ops::{
    Factor,
    cpu::{
        pool::Threads,
        view::{dispatch_dtype, elements, elements_mut, is_word_aligned_matrix, matrix, operand},
    },
};

/// With fewer rows, packing the weight into panels costs more than it saves.
const MIN_ROWS: i64 = 32;

/// Reports whether our kernels compute large products of a type on this CPU.
pub(super) fn has_kernel(kind: Kind) -> bool {
    dispatch_dtype!(kind, E => is_supported::<E>())
}

/// Reports whether our kernels support the product of `left` and a factor, transposed or not.
pub(super) fn supports_product(left: &Tensor, factor: &Tensor) -> bool {
    left.size()[0] >= MIN_ROWS
        && dispatch_dtype!(left.kind(), E => {
            [left, factor].into_iter().all(is_word_aligned_matrix::<E>) && is_supported::<E>()
        })
}

/// Reports whether our kernels support adding `leftᵀ · right` to a gradient, or writing it.
pub(super) fn supports_outer(left: &Tensor, right: &Tensor, grad: &Tensor) -> bool {
    supports_product(left, right) && grad.is_contiguous() && grad.kind() == Kind::Float
}

pub(super) fn products(terms: &[(&Tensor, Factor<'_>)], bias: Option<&Tensor>) -> Tensor {
    let (left, factor) = terms[0];
    let columns = match factor {
        Factor::Plain(factor) => factor.size()[1],
        Factor::Transposed(factor) => factor.size()[0],
    };
    let size = [left.size()[0], columns];
    let mut sum = Tensor::empty(size, (left.kind(), left.device()));
    dispatch_dtype!(left.kind(), E => {
        let terms: Vec<_> =
            terms.iter().map(|&(left, factor)| (Operand::Plain(matrix(left)), operand(factor))).collect();
        let target = Target::Write(elements_mut::<E>(&mut sum), bias.map(elements));
        multiply(&Threads, &terms, size.map(|size| size as usize), target);
    });
    sum
}

pub(super) fn outer(left: &Tensor, right: &Tensor, grad: &Tensor, accumulate: bool) {
    let size = [left.size()[1], right.size()[1]].map(|size| size as usize);
    let mut grad = grad.shallow_clone();
    let grad = elements_mut(&mut grad);
    dispatch_dtype!(left.kind(), E => {
        let terms = [(Operand::Transposed(matrix::<E>(left)), Operand::Plain(matrix(right)))];
        multiply(&Threads, &terms, size, Target::Sum { to: grad, accumulate });
    });
}
