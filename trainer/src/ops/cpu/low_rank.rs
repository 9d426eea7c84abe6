//! Low-rank products, by our kernels.

use finetune_kernels::{
    GemmElement,
    low_rank::{self as kernels, MatrixMut, is_supported},
};
use tch::{Kind, Tensor};

use crate::ops::{
    Factor,
    cpu::{
        pool::Threads,
        view::{dispatch_dtype, elements_mut, is_word_aligned_matrix, matrix, matrix_mut, operand},
    },
};

/// Reports whether our kernels support a product `[T, K] · [K, N]` in which `K` or `N` is a low
/// rank.
pub(super) fn supports_multiply(left: &Tensor, factor: Factor<'_>, to: &Tensor) -> bool {
    let dense = factor.tensor();
    dense.is_contiguous()
        && dispatch_dtype!(left.kind(), E => {
            [left, dense, to].into_iter().all(is_word_aligned_matrix::<E>)
                && has_low_rank::<E>(left, to)
        })
}

/// Reports whether our kernels support adding `leftᵀ · right` to a gradient, where the width of
/// `left` or `right` is a low rank.
pub(super) fn supports_outer(left: &Tensor, right: &Tensor, grad: &Tensor) -> bool {
    grad.is_contiguous()
        && grad.kind() == Kind::Float
        && dispatch_dtype!(left.kind(), E => {
            [left, right].into_iter().all(is_word_aligned_matrix::<E>)
                && has_low_rank::<E>(left, right)
        })
}

fn has_low_rank<E: GemmElement>(one: &Tensor, other: &Tensor) -> bool {
    let [one, other] = [one, other].map(|matrix| matrix.size()[1] as usize);
    is_supported::<E>(one.max(other), one.min(other))
}

pub(super) fn multiply(
    left: &Tensor,
    factor: Factor<'_>,
    scale: f64,
    to: &mut Tensor,
    accumulate: bool,
) {
    let (columns, stride) = (to.size()[1] as usize, to.stride()[0] as usize);
    dispatch_dtype!(left.kind(), E => {
        let to = MatrixMut { data: matrix_mut::<E>(to), columns, stride };
        let multiply =
            if accumulate { kernels::multiply::<E, true> } else { kernels::multiply::<E, false> };
        multiply(&Threads, matrix(left), operand(factor), scale as f32, to);
    });
}

pub(super) fn add_outer(left: &Tensor, right: &Tensor, grad: &Tensor) {
    let mut grad = grad.shallow_clone();
    let grad = elements_mut::<f32>(&mut grad);
    dispatch_dtype!(left.kind(), E => {
        // The kernel's left operand is the narrower one.
        if left.size()[1] <= right.size()[1] {
            kernels::add_outer::<E, false>(&Threads, matrix(left), matrix(right), grad);
        } else {
            kernels::add_outer::<E, true>(&Threads, matrix(right), matrix(left), grad);
        }
    });
}
