//! Products of large matrices, on our kernels.

use finetune_kernels::{
    matmul::{Target, is_supported, multiply},
    matrix::Side,
};
use half::bf16;
use tch::{Kind, Tensor};

use super::{
    Factor,
    pool::Threads,
    view::{elements, elements_mut, is_matrix_of_pairs, matrix, side},
};

/// From here on it pays to bring a weight into panels first.
const FEWEST_ROWS: i64 = 32;

/// Tells whether a product of `left` and a factor, transposed or not, can be computed here.
pub(super) fn can(left: &Tensor, factor: &Tensor) -> bool {
    is_matrix_of_pairs(left)
        && is_matrix_of_pairs(factor)
        && left.size()[0] >= FEWEST_ROWS
        && is_supported()
}

/// Tells whether `leftᵀ · right` can be added to a gradient, or be one, here.
pub(super) fn can_outer(left: &Tensor, right: &Tensor, grad: &Tensor) -> bool {
    can(left, right) && grad.is_contiguous() && grad.kind() == Kind::Float
}

pub(super) fn products(terms: &[(&Tensor, Factor<'_>)], bias: Option<&Tensor>) -> Tensor {
    let (left, factor) = terms[0];
    let columns = match factor {
        Factor::Plain(factor) => factor.size()[1],
        Factor::Transposed(factor) => factor.size()[0],
    };
    let size = [left.size()[0], columns];
    let mut sum = Tensor::empty(size, (Kind::BFloat16, left.device()));
    let terms: Vec<_> =
        terms.iter().map(|&(left, factor)| (Side::Plain(matrix(left)), side(factor))).collect();
    let target = Target::Write(elements_mut::<bf16>(&mut sum), bias.map(elements));
    multiply(&Threads, &terms, size.map(|size| size as usize), target);
    sum
}

pub(super) fn outer(left: &Tensor, right: &Tensor, grad: &Tensor, has_sums: bool) {
    let size = [left.size()[1], right.size()[1]].map(|size| size as usize);
    let terms = [(Side::Transposed(matrix(left)), Side::Plain(matrix(right)))];
    let mut grad = grad.shallow_clone();
    let grad = elements_mut(&mut grad);
    let target = if has_sums { Target::Add(grad) } else { Target::Set(grad) };
    multiply(&Threads, &terms, size, target);
}
