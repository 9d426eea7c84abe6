//! Causal attention inside segments and its gradient, tile by tile; the matrix of scores never
//! exists.
//!
//! # Source
//! FlashAttention (arXiv 2205.14135), algorithms 1 and 4. Differs: query heads that share a key
//! head are computed together, so that keys are packed once and their gradients need no second
//! sum.

mod generic;
mod rows;

use crate::{
    Element,
    choice::{GemmElement, by_kernel},
    gemm::{LANES, MicroKernel, ReleaseGuard},
    pool::{Pool, Shared},
};

/// Queries of one task of the forward pass; keys are packed once per task.
const QUERIES: usize = 256;
/// The largest supported head width.
const MAX_HEAD_DIM: usize = 256;

/// The shape of the heads, and the window.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Query heads, `H`.
    pub heads: usize,
    /// Key and value heads, `K`.
    pub kv_heads: usize,
    /// Width of a head, `E`.
    pub width: usize,
    /// How many positions back a query attends, itself included.
    pub window: usize,
}

/// Reports whether this CPU and these kernels support heads of a width.
pub fn is_supported<E: GemmElement>(width: usize) -> bool {
    width.is_multiple_of(2 * LANES) && width <= MAX_HEAD_DIM && E::kernel().is_some()
}

/// Computes attention inside each segment.
///
/// # Shapes
/// `q` and `out` are `[T, H · E]`, `k` and `v` are `[T, K · E]`; `logsumexp` is `[H, T]`.
/// `lengths` sum to `T` at most.
///
/// # Panics
/// If a size is wrong, or the CPU is not supported ([`is_supported`]).
pub fn forward<E: GemmElement>(
    pool: &dyn Pool,
    shape: Shape,
    lengths: &[usize],
    [q, k, v]: [&[E]; 3],
    out: &mut [E],
    logsumexp: &mut [f32],
) {
    assert!(is_supported::<E>(shape.width), "heads of width {}", shape.width);
    by_kernel!(E, K => {
        forward_with::<E, K>(pool, shape, lengths, [q, k, v], out, logsumexp);
    });
}

fn forward_with<E: Element, K: MicroKernel>(
    pool: &dyn Pool,
    shape: Shape,
    lengths: &[usize],
    [q, k, v]: [&[E]; 3],
    out: &mut [E],
    logsumexp: &mut [f32],
) {
    assert!(K::is_supported());
    let positions = logsumexp.len() / shape.heads;
    let mut tasks = Vec::new();
    for (start, length) in starts(lengths) {
        for first in (0..length).step_by(QUERIES) {
            let queries = QUERIES.min(length - first);
            for kv_head in 0..shape.kv_heads {
                tasks.push(Task { start, length, kv_head, first, queries });
            }
        }
    }
    // Long tasks first, so that no thread is left with one at the end.
    tasks.sort_by_key(|task| std::cmp::Reverse(task.first + task.queries));
    let (out, logsumexp) = (Shared::new(out), Shared::new(logsumexp));
    pool.run(tasks.len(), &|index| {
        let _release = ReleaseGuard::<K>::new();
        let task = &tasks[index];
        #[expect(unsafe_code, reason = "needs certain CPU features")]
        // SAFETY: the CPU was checked.
        unsafe {
            generic::forward::<E, K>(task, shape, positions, [q, k, v], &out, &logsumexp);
        }
    });
}

/// The saved results of the forward pass, and the gradient of its output.
#[derive(Debug, Clone, Copy)]
pub struct BackwardInputs<'a, E> {
    /// The output of the forward pass, `[T, H · E]`.
    pub out: &'a [E],
    /// The logarithms of the softmax denominators, `[H, T]`.
    pub logsumexp: &'a [f32],
    /// The gradient of `out`, `[T, H · E]`.
    pub d_out: &'a [E],
}

/// Writes the gradients of `q`, `k` and `v`.
///
/// # Shapes
/// As in [`forward`]; gradients are of their inputs' shapes.
///
/// # Panics
/// If a size is wrong, or the CPU is not supported ([`is_supported`]).
pub fn backward<E: GemmElement>(
    pool: &dyn Pool,
    shape: Shape,
    lengths: &[usize],
    [q, k, v]: [&[E]; 3],
    backward_inputs: BackwardInputs<'_, E>,
    [dq, dk, dv]: [&mut [E]; 3],
) {
    assert!(is_supported::<E>(shape.width), "heads of width {}", shape.width);
    by_kernel!(E, K => {
        backward_with::<E, K>(pool, shape, lengths, [q, k, v], backward_inputs, [dq, dk, dv]);
    });
}

fn backward_with<E: Element, K: MicroKernel>(
    pool: &dyn Pool,
    shape: Shape,
    lengths: &[usize],
    [q, k, v]: [&[E]; 3],
    backward_inputs: BackwardInputs<'_, E>,
    [dq, dk, dv]: [&mut [E]; 3],
) {
    assert!(K::is_supported());
    let positions = backward_inputs.logsumexp.len() / shape.heads;
    let mut tasks: Vec<Task> = starts(lengths)
        .flat_map(|(start, length)| {
            (0..shape.kv_heads).map(move |kv_head| Task {
                start,
                length,
                kv_head,
                first: 0,
                queries: length,
            })
        })
        .collect();
    tasks.sort_by_key(|task| std::cmp::Reverse(task.length));
    let grads = [dq, dk, dv].map(Shared::new);
    pool.run(tasks.len(), &|index| {
        let _release = ReleaseGuard::<K>::new();
        let task = &tasks[index];
        #[expect(unsafe_code, reason = "needs certain CPU features")]
        // SAFETY: the CPU was checked.
        unsafe {
            generic::backward::<E, K>(task, shape, positions, [q, k, v], backward_inputs, &grads);
        }
    });
}

/// Returns the first position and the length of each segment.
fn starts(lengths: &[usize]) -> impl Iterator<Item = (usize, usize)> {
    lengths.iter().scan(0, |next, &length| {
        let start = *next;
        *next += length;
        Some((start, length))
    })
}

/// The work on some queries of a segment, in all heads that share a key head.
struct Task {
    start: usize,
    length: usize,
    kv_head: usize,
    /// The first query, counted from the segment's start.
    first: usize,
    queries: usize,
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::{BackwardInputs, Shape, backward_with, forward_with};
    use crate::{
        Element,
        amx::Amx,
        gemm::{Avx512, Avx512Bf16, MicroKernel},
        pool::Serial,
        testing::{assert_close, numbers, rounded},
    };

    /// The formulas in f64: result, and gradients of q, k and v.
    fn exact<E: Element>(
        shape: Shape,
        lengths: &[usize],
        [q, k, v, d_out]: [&[E]; 4],
    ) -> [Vec<f64>; 4] {
        let wide = |x: E| f64::from(x.to_f32());
        let Shape { heads, kv_heads, width, window } = shape;
        let [mut out, mut dq] = [vec![0.0; q.len()], vec![0.0; q.len()]];
        let [mut dk, mut dv] = [vec![0.0; k.len()], vec![0.0; k.len()]];
        let scale = 1.0 / (width as f64).sqrt();
        let mut start = 0;
        for &length in lengths {
            for head in 0..heads {
                let kv_head = head / (heads / kv_heads);
                let q_at = |i: usize| ((start + i) * heads + head) * width;
                let k_at = |j: usize| ((start + j) * kv_heads + kv_head) * width;
                let dot = |a: &[E], b: &[E]| -> f64 {
                    a[..width].iter().zip(b).map(|(&a, &b)| wide(a) * wide(b)).sum()
                };
                for i in 0..length {
                    let keys = (i + 1).saturating_sub(window)..i + 1;
                    let weights: Vec<f64> = keys
                        .clone()
                        .map(|j| (dot(&q[q_at(i)..], &k[k_at(j)..]) * scale).exp())
                        .collect();
                    let total: f64 = weights.iter().sum();
                    let dp: Vec<f64> =
                        keys.clone().map(|j| dot(&d_out[q_at(i)..], &v[k_at(j)..])).collect();
                    let delta: f64 = weights.iter().zip(&dp).map(|(w, dp)| w / total * dp).sum();
                    for ((j, weight), dp) in keys.zip(&weights).zip(&dp) {
                        let p = weight / total;
                        let ds = p * (dp - delta) * scale;
                        for e in 0..width {
                            out[q_at(i) + e] += p * wide(v[k_at(j) + e]);
                            dq[q_at(i) + e] += ds * wide(k[k_at(j) + e]);
                            dk[k_at(j) + e] += ds * wide(q[q_at(i) + e]);
                            dv[k_at(j) + e] += p * wide(d_out[q_at(i) + e]);
                        }
                    }
                }
            }
            start += length;
        }
        [out, dq, dk, dv]
    }

    fn check<E: Element, K: MicroKernel>(shape: Shape, lengths: &[usize], rounding: f64) {
        let positions: usize = lengths.iter().sum();
        let of = |heads: usize, factor: f32, seed| {
            let values = numbers(positions * heads * shape.width, seed);
            rounded::<E>(&values.iter().map(|value| factor * value).collect::<Vec<_>>())
        };
        let (q, k) = (of(shape.heads, 2.0, 1), of(shape.kv_heads, 2.0, 2));
        let (v, d_out) = (of(shape.kv_heads, 1.0, 3), of(shape.heads, 1.0, 4));
        let [out, dq, dk, dv] = exact(shape, lengths, [&q, &k, &v, &d_out]);
        let mut found = vec![E::from_f32(f32::NAN); q.len()];
        let mut logsumexp = vec![f32::NAN; positions * shape.heads];
        forward_with::<E, K>(&Serial, shape, lengths, [&q, &k, &v], &mut found, &mut logsumexp);
        let wide = |values: &[E]| values.iter().map(|value| value.to_f32()).collect::<Vec<_>>();
        // Both the results and the probabilities are rounded.
        assert_close(&wide(&found), &out, 4.0 * rounding);
        let mut grads =
            [q.len(), k.len(), v.len()].map(|length| vec![E::from_f32(f32::NAN); length]);
        let backward_inputs = BackwardInputs { out: &found, logsumexp: &logsumexp, d_out: &d_out };
        let [a, b, c] = &mut grads;
        backward_with::<E, K>(&Serial, shape, lengths, [&q, &k, &v], backward_inputs, [a, b, c]);
        for (found, exact) in grads.iter().zip([dq, dk, dv]) {
            assert_close(&wide(found), &exact, 8.0 * rounding);
        }
    }

    #[test]
    fn follows_the_formula_for_all_shapes_of_heads_and_lengths() {
        // bf16 has 8 bits.
        check_shapes::<bf16, Amx>(1.0 / 512.0);
        check_shapes::<bf16, Avx512Bf16>(1.0 / 512.0);
        check_shapes::<bf16, Avx512>(1.0 / 512.0);
        check_shapes::<f32, Avx512>(1e-6);
    }

    fn check_shapes<E: Element, K: MicroKernel>(rounding: f64) {
        if !K::is_supported() {
            eprintln!("skipped: this CPU has no {}", std::any::type_name::<K>());
            return;
        }
        let all = usize::MAX;
        for (heads, kv_heads, width, window, lengths) in [
            (1, 1, 32, all, &[1][..]),
            (2, 2, 64, all, &[64]),
            (3, 1, 64, all, &[5, 63, 65, 1, 2]),
            (6, 2, 32, all, &[130, 17]),
            (1, 1, 128, all, &[300]),
            (1, 1, 256, all, &[70]),
            (2, 1, 32, 2, &[66]),
            (2, 1, 32, 5, &[150]),
            (2, 1, 32, 64, &[200]),
            (2, 1, 32, 100, &[300, 3]),
        ] {
            check::<E, K>(Shape { heads, kv_heads, width, window }, lengths, rounding);
        }
    }
}
