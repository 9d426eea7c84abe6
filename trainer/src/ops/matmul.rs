//! Products of large matrices, on our kernels.

use finetune_kernels::matmul::{Side, Target, is_supported, multiply};
use half::bf16;
use tch::{Kind, Tensor};

use super::{
    pool::Threads,
    view::{elements, elements_mut, is_matrix_of_pairs, matrix},
};

/// From here on it pays to bring a weight into panels first.
const FEWEST_ROWS: i64 = 32;

/// Tells whether `x · weightᵀ` or `dy · weight` can be computed here.
pub(super) fn can(x: &Tensor, weight: &Tensor) -> bool {
    is_matrix_of_pairs(x)
        && is_matrix_of_pairs(weight)
        && x.size()[0] >= FEWEST_ROWS
        && is_supported()
}

/// Tells whether `leftᵀ · right` can be added to a gradient here.
pub(super) fn can_add_outer(left: &Tensor, right: &Tensor, grad: &Tensor) -> bool {
    can(left, right) && grad.is_contiguous() && grad.kind() == Kind::Float
}

pub(super) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
    let terms = [(Side::Plain(matrix(x)), Side::Transposed(matrix(weight)))];
    write(&terms, [x.size()[0], weight.size()[0]], x, bias)
}

pub(super) fn linear_backward(terms: &[(&Tensor, &Tensor)]) -> Tensor {
    let (dy, weight) = terms[0];
    let size = [dy.size()[0], weight.size()[1]];
    let plain = |of| Side::Plain(matrix(of));
    let terms: Vec<_> = terms.iter().map(|&(dy, weight)| (plain(dy), plain(weight))).collect();
    write(&terms, size, dy, None)
}

fn write(
    terms: &[(Side<'_>, Side<'_>)],
    size: [i64; 2],
    like: &Tensor,
    bias: Option<&Tensor>,
) -> Tensor {
    let mut y = Tensor::empty(size, (Kind::BFloat16, like.device()));
    let target = Target::Write(elements_mut::<bf16>(&mut y), bias.map(elements));
    multiply(&Threads, terms, size.map(|size| size as usize), target);
    y
}

pub(super) fn add_outer(left: &Tensor, right: &Tensor, grad: &Tensor) {
    let size = [left.size()[1], right.size()[1]].map(|size| size as usize);
    let terms = [(Side::Transposed(matrix(left)), Side::Plain(matrix(right)))];
    let mut grad = grad.shallow_clone();
    multiply(&Threads, &terms, size, Target::Add(elements_mut(&mut grad)));
}
