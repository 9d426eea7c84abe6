//! Products of large matrices, on our kernels.

use finetune_kernels::{
    matmul::{Target, is_supported, multiply},
    matrix::Side,
};
use tch::{Kind, Tensor};

use crate::ops::{
    Factor,
    cpu::{
        pool::Threads,
        view::{by_kind, elements, elements_mut, is_matrix_of_words, matrix, side},
    },
};

/// From here on it pays to bring a weight into panels first.
const FEWEST_ROWS: i64 = 32;

/// Tells whether this processor's large products are ours.
pub(in crate::ops) fn is_ours(kind: Kind) -> bool {
    by_kind!(kind, E => is_supported::<E>())
}

/// Tells whether a product of `left` and a factor, transposed or not, can be computed here.
pub(in crate::ops) fn can(left: &Tensor, factor: &Tensor) -> bool {
    left.size()[0] >= FEWEST_ROWS
        && by_kind!(left.kind(), E => {
            [left, factor].into_iter().all(is_matrix_of_words::<E>) && is_supported::<E>()
        })
}

/// Tells whether `leftᵀ · right` can be added to a gradient, or be one, here.
pub(in crate::ops) fn can_outer(left: &Tensor, right: &Tensor, grad: &Tensor) -> bool {
    can(left, right) && grad.is_contiguous() && grad.kind() == Kind::Float
}

pub(in crate::ops) fn products(terms: &[(&Tensor, Factor<'_>)], bias: Option<&Tensor>) -> Tensor {
    let (left, factor) = terms[0];
    let columns = match factor {
        Factor::Plain(factor) => factor.size()[1],
        Factor::Transposed(factor) => factor.size()[0],
    };
    let size = [left.size()[0], columns];
    let mut sum = Tensor::empty(size, (left.kind(), left.device()));
    by_kind!(left.kind(), E => {
        let terms: Vec<_> =
            terms.iter().map(|&(left, factor)| (Side::Plain(matrix(left)), side(factor))).collect();
        let target = Target::Write(elements_mut::<E>(&mut sum), bias.map(elements));
        multiply(&Threads, &terms, size.map(|size| size as usize), target);
    });
    sum
}

pub(in crate::ops) fn outer(left: &Tensor, right: &Tensor, grad: &Tensor, is_added: bool) {
    let size = [left.size()[1], right.size()[1]].map(|size| size as usize);
    let mut grad = grad.shallow_clone();
    let grad = elements_mut(&mut grad);
    by_kind!(left.kind(), E => {
        let terms = [(Side::Transposed(matrix::<E>(left)), Side::Plain(matrix(right)))];
        multiply(&Threads, &terms, size, Target::Sum { to: grad, is_added });
    });
}
