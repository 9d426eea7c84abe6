//! Products with a factor of low rank, on our kernels.

use finetune_kernels::{
    Multiplied,
    low_rank::{self as kernels, MatrixMut, is_supported},
};
use tch::{Kind, Tensor};

use crate::ops::{
    Factor,
    cpu::{
        pool::Threads,
        view::{by_kind, elements_mut, is_matrix_of_words, matrix, matrix_mut, side},
    },
};

/// Tells whether a product `[T, K] · [K, N]` can be computed here; either `K` or `N` is low.
pub(in crate::ops) fn can_multiply(left: &Tensor, factor: Factor<'_>, to: &Tensor) -> bool {
    let dense = factor.tensor();
    dense.is_contiguous()
        && by_kind!(left.kind(), E => {
            [left, dense, to].into_iter().all(is_matrix_of_words::<E>)
                && has_low_rank::<E>(left, to)
        })
}

/// Tells whether `leftᵀ · right` can be added to a gradient here; `left` or `right` is low.
pub(in crate::ops) fn can_add_outer(left: &Tensor, right: &Tensor, grad: &Tensor) -> bool {
    grad.is_contiguous()
        && grad.kind() == Kind::Float
        && by_kind!(left.kind(), E => {
            [left, right].into_iter().all(is_matrix_of_words::<E>)
                && has_low_rank::<E>(left, right)
        })
}

fn has_low_rank<E: Multiplied>(one: &Tensor, other: &Tensor) -> bool {
    let [one, other] = [one, other].map(|matrix| matrix.size()[1] as usize);
    is_supported::<E>(one.max(other), one.min(other))
}

pub(in crate::ops) fn multiply(
    left: &Tensor,
    factor: Factor<'_>,
    scale: f64,
    to: &mut Tensor,
    is_added: bool,
) {
    let (columns, stride) = (to.size()[1] as usize, to.stride()[0] as usize);
    by_kind!(left.kind(), E => {
        let to = MatrixMut { data: matrix_mut::<E>(to), columns, stride };
        let multiply =
            if is_added { kernels::multiply::<E, true> } else { kernels::multiply::<E, false> };
        multiply(&Threads, matrix(left), side(factor), scale as f32, to);
    });
}

pub(in crate::ops) fn add_outer(left: &Tensor, right: &Tensor, grad: &Tensor) {
    let mut grad = grad.shallow_clone();
    let grad = elements_mut::<f32>(&mut grad);
    by_kind!(left.kind(), E => {
        // The kernel's left side is the narrow one.
        if left.size()[1] <= right.size()[1] {
            kernels::add_outer::<E, false>(&Threads, matrix(left), matrix(right), grad);
        } else {
            kernels::add_outer::<E, true>(&Threads, matrix(right), matrix(left), grad);
        }
    });
}
