//! Causal attention inside segments and its gradient, tile by tile; the matrix of scores never
//! exists.
//!
//! # Source
//! FlashAttention (arXiv 2205.14135), algorithms 1 and 4. Differs: query heads that share a key
//! head are computed together, so that keys are packed once and their gradients need no second
//! sum.

mod amx;
mod generic;
mod rows;

use half::bf16;

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
    if K::HAS_TILES {
        let inputs = [q, k, v].map(as_bf16);
        let (out, logsumexp) = (Shared::new(as_bf16_mut(out)), Shared::new(logsumexp));
        run::<K>(pool, &tasks, &|task| {
            #[expect(unsafe_code, reason = "needs certain CPU features")]
            // SAFETY: the CPU was checked, and tasks have different queries.
            unsafe {
                amx::forward(task, shape, positions, inputs, &out, &logsumexp);
            }
        });
        return;
    }
    let (out, logsumexp) = (Shared::new(out), Shared::new(logsumexp));
    run::<K>(pool, &tasks, &|task| {
        #[expect(unsafe_code, reason = "needs certain CPU features")]
        // SAFETY: as above.
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
    if K::HAS_TILES {
        let BackwardInputs { out, logsumexp, d_out } = backward_inputs;
        let inputs = [q, k, v].map(as_bf16);
        let backward_inputs =
            BackwardInputs { out: as_bf16(out), logsumexp, d_out: as_bf16(d_out) };
        let grads = [dq, dk, dv].map(|grad| Shared::new(as_bf16_mut(grad)));
        run::<K>(pool, &tasks, &|task| {
            #[expect(unsafe_code, reason = "needs certain CPU features")]
            // SAFETY: the CPU was checked, and tasks have different heads or segments.
            unsafe {
                amx::backward(task, shape, positions, inputs, backward_inputs, &grads);
            }
        });
        return;
    }
    let grads = [dq, dk, dv].map(Shared::new);
    run::<K>(pool, &tasks, &|task| {
        #[expect(unsafe_code, reason = "needs certain CPU features")]
        // SAFETY: as above.
        unsafe {
            generic::backward::<E, K>(task, shape, positions, [q, k, v], backward_inputs, &grads);
        }
    });
}

/// Runs tasks on a pool; each releases the kernel's CPU state when it ends.
fn run<K: MicroKernel>(pool: &dyn Pool, tasks: &[Task], pass: &(dyn Fn(&Task) + Sync)) {
    pool.run(tasks.len(), &|index| {
        let _release = ReleaseGuard::<K>::new();
        pass(&tasks[index]);
    });
}

fn as_bf16<E: Element>(values: &[E]) -> &[bf16] {
    E::as_bf16(values).expect(HOLDS_BF16)
}

fn as_bf16_mut<E: Element>(values: &mut [E]) -> &mut [bf16] {
    E::as_bf16_mut(values).expect(HOLDS_BF16)
}

const HOLDS_BF16: &str = "AMX is chosen for bf16 alone";

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

    #[test]
    fn follows_the_formula_where_chunks_and_groups_of_keys_end() {
        check_chunks::<bf16, Amx>(1.0 / 512.0);
        check_chunks::<bf16, Avx512Bf16>(1.0 / 512.0);
        check_chunks::<f32, Avx512>(1e-6);
    }

    fn check_chunks<E: Element, K: MicroKernel>(rounding: f64) {
        if !K::is_supported() {
            eprintln!("skipped: this CPU has no {}", std::any::type_name::<K>());
            return;
        }
        let all = usize::MAX;
        for (heads, kv_heads, width, window, lengths) in [
            (9, 3, 64, all, &[1, 31, 32, 33, 127, 129][..]),
            (3, 1, 96, all, &[257, 65]),
            (2, 2, 160, all, &[40]),
            (1, 1, 64, 2, &[70]),
            (2, 1, 64, 31, &[130]),
            (2, 1, 64, 33, &[161]),
            (3, 1, 64, 300, &[700]),
        ] {
            // Another task leaves numbers in the buffers that must not matter.
            leave_nan::<E, K>(Shape { heads, kv_heads, width, window });
            check::<E, K>(Shape { heads, kv_heads, width, window }, lengths, rounding);
        }
    }

    /// Fills this thread's buffers with NaN.
    fn leave_nan<E: Element, K: MicroKernel>(shape: Shape) {
        let length = 300;
        let nan = |heads: usize| vec![E::from_f32(f32::NAN); length * heads * shape.width];
        let (q, k) = (nan(shape.heads), nan(shape.kv_heads));
        let (mut out, mut dq, mut dk, mut dv) = (q.clone(), q.clone(), k.clone(), k.clone());
        let mut logsumexp = vec![f32::NAN; length * shape.heads];
        let lengths = [length];
        forward_with::<E, K>(&Serial, shape, &lengths, [&q, &k, &k], &mut out, &mut logsumexp);
        assert!(out.iter().all(|value| value.to_f32().is_nan()));
        let backward_inputs = BackwardInputs { out: &out, logsumexp: &logsumexp, d_out: &q };
        let grads = [&mut dq[..], &mut dk, &mut dv];
        backward_with::<E, K>(&Serial, shape, &lengths, [&q, &k, &k], backward_inputs, grads);
        assert!(dq.iter().chain(&dk).chain(&dv).all(|value| value.to_f32().is_nan()));
    }

    #[test]
    fn denominators_are_exact_even_if_scores_differ_by_hundreds() {
        check_denominators::<bf16, Amx>();
        check_denominators::<bf16, Avx512Bf16>();
        check_denominators::<f32, Avx512>();
    }

    fn check_denominators<E: Element, K: MicroKernel>() {
        if !K::is_supported() {
            eprintln!("skipped: this CPU has no {}", std::any::type_name::<K>());
            return;
        }
        let (length, width) = (200, 64);
        let shape = Shape { heads: 1, kv_heads: 1, width, window: usize::MAX };
        for factor in [0.1, 1.0, 8.0] {
            let of = |seed| {
                let values = numbers(length * width, seed);
                rounded::<E>(&values.iter().map(|value| factor * value).collect::<Vec<_>>())
            };
            let (q, k) = (of(1), of(2));
            let (mut out, mut logsumexp) = (q.clone(), vec![f32::NAN; length]);
            forward_with::<E, K>(&Serial, shape, &[length], [&q, &k, &k], &mut out, &mut logsumexp);
            for (i, found) in logsumexp.iter().enumerate() {
                let row = |of: &[E], row: usize| {
                    of[row * width..][..width].iter().map(|x| f64::from(x.to_f32())).collect()
                };
                let query: Vec<f64> = row(&q, i);
                let scores = (0..=i).map(|j| {
                    let key: Vec<f64> = row(&k, j);
                    query.iter().zip(&key).map(|(q, k)| q * k).sum::<f64>() / 8.0
                });
                let exact = scores.map(f64::exp).sum::<f64>().ln();
                let error = (f64::from(*found) - exact).abs();
                assert!(error < 1e-6 * exact.abs().max(2.0), "query {i}: {found}, not {exact}");
            }
        }
    }

    #[test]
    fn a_segment_does_not_depend_on_the_others() {
        check_segments::<bf16, Amx>();
        check_segments::<bf16, Avx512Bf16>();
        check_segments::<f32, Avx512>();
    }

    fn check_segments<E: Element, K: MicroKernel>() {
        if !K::is_supported() {
            eprintln!("skipped: this CPU has no {}", std::any::type_name::<K>());
            return;
        }
        let shape = Shape { heads: 3, kv_heads: 1, width: 64, window: 90 };
        let (first, second) = (45, 333);
        let of = |heads: usize, seed| {
            rounded::<E>(&numbers((first + second) * heads * shape.width, seed))
        };
        let (q, k, v, d_out) = (of(3, 1), of(1, 2), of(1, 3), of(3, 4));
        let run = |lengths: &[usize], from: usize| {
            let positions: usize = lengths.iter().sum();
            let part = |values: &[E], heads: usize| {
                let row = heads * shape.width;
                values[from * row..(from + positions) * row].to_vec()
            };
            let (q, k, v, d_out) = (part(&q, 3), part(&k, 1), part(&v, 1), part(&d_out, 3));
            let mut logsumexp = vec![0.0; positions * 3];
            let (mut out, mut dq, mut dk, mut dv) = (q.clone(), q.clone(), k.clone(), k.clone());
            let inputs = [&q[..], &k, &v];
            forward_with::<E, K>(&Serial, shape, lengths, inputs, &mut out, &mut logsumexp);
            let backward_inputs =
                BackwardInputs { out: &out, logsumexp: &logsumexp, d_out: &d_out };
            let grads = [&mut dq[..], &mut dk, &mut dv];
            backward_with::<E, K>(&Serial, shape, lengths, inputs, backward_inputs, grads);
            let bits = |values: &[E], heads: usize| {
                let last = values.len() - second * heads * shape.width;
                values[last..].iter().map(|value| value.to_f32().to_bits()).collect::<Vec<_>>()
            };
            [bits(&out, 3), bits(&dq, 3), bits(&dk, 1), bits(&dv, 1)]
        };
        assert!(run(&[first, second], 0) == run(&[second], first));
    }
}
