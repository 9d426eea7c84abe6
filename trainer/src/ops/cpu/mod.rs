//! The operators as single passes over memory, by our kernels.

#[cfg(target_arch = "x86_64")]
mod attention;
#[cfg(target_arch = "x86_64")]
mod low_rank;
#[cfg(target_arch = "x86_64")]
mod matmul;
mod pool;
mod view;

use std::{cell::RefCell, ops::Range};

use finetune_kernels::{
    adamw::{self, AdamWStep},
    adamw_8bit::{self, BLOCK, Moments},
    cross_entropy,
    dropout::{self, DropoutMask},
    pool::{Pool, Shared},
    rms_norm, rope, sum, swiglu,
};
use tch::Tensor;

use crate::ops::{
    AttentionMask, QuantizedState, aten,
    backend::Backend,
    cpu::{
        pool::{Threads, for_each_chunk},
        view::{dispatch_dtype, elements, elements_mut},
    },
};
#[cfg(target_arch = "x86_64")]
use {
    crate::ops::{Factor, backend::Aten},
    crate::runtime::profile,
    tch::Kind,
};

/// Elements of one task: they and their results fit in the L2 cache.
const TASK_ELEMENTS: usize = 1 << 15;

// Reused by each thread, because fresh memory costs page faults.
thread_local! {
    static PARTIALS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Our kernels on CPUs. Products of matrices, and attention, need AVX-512; libtorch computes them
/// elsewhere.
pub(super) struct Cpu;

impl Backend for Cpu {
    #[cfg(target_arch = "x86_64")]
    fn token_multiple(&self, kind: Kind) -> usize {
        if matmul::has_kernel(kind) { 8 } else { Aten.token_multiple(kind) }
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
        let mut y = x.empty_like();
        dispatch_dtype!(x.kind(), E => {
            let (x, weight) = (elements::<E>(x), elements::<E>(weight));
            write_rows(elements_mut(&mut y), weight.len(), |range, y| {
                rms_norm::forward(&x[range], weight, eps as f32, y);
            });
        });
        y
    }

    fn rms_norm_backward(
        &self,
        x: &Tensor,
        weight: &Tensor,
        eps: f64,
        mut dy: Tensor,
        residual: Option<&Tensor>,
        weight_grad: Option<&Tensor>,
    ) -> Tensor {
        dispatch_dtype!(x.kind(), E => {
            let (x, weight) = (elements::<E>(x), elements::<E>(weight));
            let residual = residual.map(elements::<E>);
            let width = weight.len();
            // Each task has its own partial sum, so that the total does not depend on the number of
            // threads.
            let partial_width = if weight_grad.is_some() { width } else { 0 };
            let task_elements = width * (TASK_ELEMENTS / width).max(1);
            PARTIALS.with_borrow_mut(|partial| {
                partial.clear();
                partial.resize(x.len().div_ceil(task_elements) * partial_width, 0.0);
                let partials = Shared::new(partial);
                write_rows(elements_mut(&mut dy), width, |range, dy| {
                    let index = range.start / task_elements * partial_width;
                    #[expect(unsafe_code, reason = "tasks write to disjoint ranges")]
                    // SAFETY: these elements belong to this task.
                    let weight_grad = unsafe { partials.range(index..index + partial_width) };
                    let residual = residual.map(|residual| &residual[range.clone()]);
                    rms_norm::backward(&x[range], weight, eps as f32, dy, residual, weight_grad);
                });
                if let Some(grad) = weight_grad {
                    let mut grad = grad.shallow_clone();
                    let grad = elements_mut::<f32>(&mut grad);
                    partial.chunks(width).for_each(|partial| sum::add(grad, partial));
                }
            });
        });
        dy
    }

    fn swiglu(&self, gate: &Tensor, up: &Tensor) -> Tensor {
        let mut product = gate.empty_like();
        dispatch_dtype!(gate.kind(), E => {
            let (gate, up) = (elements::<E>(gate), elements::<E>(up));
            write_rows(elements_mut(&mut product), 1, |range, product| {
                swiglu::forward(&gate[range.clone()], &up[range], product);
            });
        });
        product
    }

    fn swiglu_backward(
        &self,
        mut d_product: Tensor,
        mut gate: Tensor,
        mut up: Tensor,
    ) -> (Tensor, Tensor, Tensor) {
        dispatch_dtype!(gate.kind(), E => {
            let up = Shared::new(elements_mut::<E>(&mut up));
            let d_product = Shared::new(elements_mut::<E>(&mut d_product));
            write_rows(elements_mut(&mut gate), 1, |range, gate| {
                #[expect(unsafe_code, reason = "tasks write to disjoint ranges")]
                // SAFETY: these elements belong to this task.
                let [d_product, up] = unsafe { [d_product.range(range.clone()), up.range(range)] };
                swiglu::backward(d_product, gate, up);
            });
        });
        (d_product, gate, up)
    }

    fn rotate(&self, mut x: Tensor, cos: &Tensor, sin: &Tensor, direction: f64) -> Tensor {
        let width = (x.size()[1] * x.size()[2]) as usize;
        let half = cos.size()[2] as usize;
        dispatch_dtype!(x.kind(), E => {
            let (cos, sin) = (elements::<E>(cos), elements::<E>(sin));
            write_rows(elements_mut(&mut x), width, |range, x| {
                let angles = range.start / width * half..range.end / width * half;
                rope::rotate(x, &cos[angles.clone()], &sin[angles], width, half, direction as f32);
            });
        });
        x
    }

    fn cross_entropy_backward(&self, mut logits: Tensor, labels: &Tensor) -> (f64, Tensor) {
        let labels = elements::<i64>(labels);
        let loss = dispatch_dtype!(logits.kind(), E => {
            let logits = elements_mut::<E>(&mut logits);
            let vocabulary = logits.len() / labels.len().max(1);
            let logits = Shared::new(logits);
            sum_tasks(labels.len(), |row| {
                #[expect(unsafe_code, reason = "tasks write to disjoint ranges")]
                // SAFETY: this row belongs to this task.
                let logits = unsafe { logits.range(row * vocabulary..(row + 1) * vocabulary) };
                cross_entropy::backward(logits, &labels[row..=row])
            })
        });
        (loss, logits)
    }

    fn cross_entropy(&self, logits: &Tensor, labels: &Tensor) -> f64 {
        let labels = elements::<i64>(labels);
        dispatch_dtype!(logits.kind(), E => {
            let logits = elements::<E>(logits);
            let vocabulary = logits.len() / labels.len().max(1);
            sum_tasks(labels.len(), |row| {
                cross_entropy::loss(&logits[row * vocabulary..(row + 1) * vocabulary], &labels[row..=row])
            })
        })
    }

    fn dropout(&self, x: &Tensor, mask: DropoutMask) -> Tensor {
        let mut y = x.empty_like();
        dispatch_dtype!(x.kind(), E => {
            let x = elements::<E>(x);
            write_rows(elements_mut(&mut y), 4, |range, y| {
                dropout::apply(mask, range.start, &x[range], y);
            });
        });
        y
    }

    fn add_masked(&self, sum: &mut Tensor, grad: &Tensor, mask: DropoutMask) {
        dispatch_dtype!(sum.kind(), E => {
            let grad = elements::<E>(grad);
            write_rows(elements_mut(sum), 4, |range, sum| {
                dropout::add_masked(mask, range.start, &grad[range], sum);
            });
        });
    }

    fn accumulate(&self, to: &Tensor, more: &Tensor) {
        let mut to = to.shallow_clone();
        dispatch_dtype!(more.kind(), E => {
            let more = elements::<E>(more);
            write_rows(elements_mut::<f32>(&mut to), 1, |range, to| sum::add(to, &more[range]));
        });
    }

    #[cfg(target_arch = "x86_64")]
    fn products(&self, terms: &[(&Tensor, Factor<'_>)], bias: Option<&Tensor>) -> Tensor {
        if terms.iter().all(|(left, factor)| matmul::supports_product(left, factor.tensor())) {
            return matmul::products(terms, bias);
        }
        aten::products(terms, bias, |left, factor, to| self.add_product(left, factor, to))
    }

    #[cfg(target_arch = "x86_64")]
    fn multiply(&self, left: &Tensor, factor: Factor<'_>, scale: f64, to: &mut Tensor) {
        if low_rank::supports_multiply(left, factor, to) {
            low_rank::multiply(left, factor, scale, to, false);
        } else {
            aten::multiply(left, factor, scale, to);
        }
    }

    #[cfg(target_arch = "x86_64")]
    fn add_product(&self, left: &Tensor, factor: Factor<'_>, to: &mut Tensor) {
        if low_rank::supports_multiply(left, factor, to) {
            low_rank::multiply(left, factor, 1.0, to, true);
        } else {
            aten::add_product(left, factor, to);
        }
    }

    #[cfg(target_arch = "x86_64")]
    fn outer(&self, left: &Tensor, right: &Tensor, grad: &Tensor, accumulate: bool) {
        if low_rank::supports_outer(left, right, grad) {
            if !accumulate {
                let _ = grad.shallow_clone().zero_();
            }
            profile::time("lora", || low_rank::add_outer(left, right, grad));
        } else if matmul::supports_outer(left, right, grad) {
            profile::time("weight gradient", || matmul::outer(left, right, grad, accumulate));
        } else {
            Aten.outer(left, right, grad, accumulate);
        }
    }

    fn adamw(
        &self,
        step: AdamWStep,
        grad: &Tensor,
        [mut master, mut exp_avg, mut exp_avg_sq]: [Tensor; 3],
        mut compute: Tensor,
    ) {
        let grad = elements::<f32>(grad);
        let is_master = compute.data_ptr() == master.data_ptr();
        let exp_avg = Shared::new(elements_mut::<f32>(&mut exp_avg));
        let exp_avg_sq = Shared::new(elements_mut::<f32>(&mut exp_avg_sq));
        dispatch_dtype!(compute.kind(), E => {
            // If the model computes with the masters, there is nothing to copy.
            let none: &mut [E] = &mut [];
            let compute = Shared::new(if is_master { none } else { elements_mut::<E>(&mut compute) });
            write_rows(elements_mut(&mut master), 1, |range, master| {
                let copied = if is_master { 0..0 } else { range.clone() };
                #[expect(unsafe_code, reason = "tasks write to disjoint ranges")]
                // SAFETY: these elements belong to this task.
                let [exp_avg, exp_avg_sq] =
                    unsafe { [exp_avg.range(range.clone()), exp_avg_sq.range(range.clone())] };
                #[expect(unsafe_code, reason = "tasks write to disjoint ranges")]
                // SAFETY: as above.
                let compute = unsafe { compute.range(copied) };
                adamw::step(step, &grad[range], master, exp_avg, exp_avg_sq, compute);
            });
        });
    }

    fn adamw_8bit(
        &self,
        step: AdamWStep,
        key: u64,
        grad: &Tensor,
        mut master: Tensor,
        [exp_avg, exp_avg_sq]: [&QuantizedState; 2],
        mut compute: Tensor,
    ) {
        let grad = elements::<f32>(grad);
        let is_master = compute.data_ptr() == master.data_ptr();
        let [mut codes, mut codes_sq] =
            [exp_avg, exp_avg_sq].map(|moments| moments.codes.shallow_clone());
        let [mut scales, mut scales_sq] =
            [exp_avg, exp_avg_sq].map(|moments| moments.scales.shallow_clone());
        let (codes, codes_sq) = (
            Shared::new(elements_mut::<i8>(&mut codes)),
            Shared::new(elements_mut::<u8>(&mut codes_sq)),
        );
        let scales = Shared::new(elements_mut::<f32>(&mut scales));
        let scales_sq = Shared::new(elements_mut::<f32>(&mut scales_sq));
        dispatch_dtype!(compute.kind(), E => {
            // If the model computes with the masters, there is nothing to copy.
            let none: &mut [E] = &mut [];
            let compute = Shared::new(if is_master { none } else { elements_mut::<E>(&mut compute) });
            write_rows(elements_mut(&mut master), BLOCK, |range, master| {
                let blocks = range.start / BLOCK..range.end.div_ceil(BLOCK);
                let copied = if is_master { 0..0 } else { range.clone() };
                #[expect(unsafe_code, reason = "tasks write to disjoint ranges")]
                // SAFETY: these blocks and their elements belong to this task.
                let moments = unsafe {
                    Moments {
                        exp_avg: codes.range(range.clone()),
                        exp_avg_scale: scales.range(blocks.clone()),
                        exp_avg_sq: codes_sq.range(range.clone()),
                        exp_avg_sq_scale: scales_sq.range(blocks),
                    }
                };
                #[expect(unsafe_code, reason = "tasks write to disjoint ranges")]
                // SAFETY: as above.
                let compute = unsafe { compute.range(copied) };
                let first = range.start;
                adamw_8bit::step(step, key, first, &grad[range], master, moments, compute);
            });
        });
    }

    fn sum_of_squares(&self, values: &Tensor) -> f64 {
        let values = elements::<f32>(values);
        sum_tasks(values.len().div_ceil(TASK_ELEMENTS), |task| {
            sum::squares(
                &values[task * TASK_ELEMENTS..values.len().min((task + 1) * TASK_ELEMENTS)],
            )
        })
    }

    fn attention(&self, inputs: [&Tensor; 3], mask: AttentionMask<'_>) -> (Tensor, Vec<Tensor>) {
        #[cfg(target_arch = "x86_64")]
        if attention::is_supported(inputs[0]) {
            return attention::attention(inputs, mask);
        }
        aten::attention(inputs, mask)
    }

    fn attention_backward(
        &self,
        inputs: [&Tensor; 3],
        out: &Tensor,
        logsumexp: &[Tensor],
        d_out: &Tensor,
        mask: AttentionMask<'_>,
    ) -> [Tensor; 3] {
        #[cfg(target_arch = "x86_64")]
        if attention::is_supported(inputs[0]) {
            return attention::attention_backward(inputs, out, logsumexp, d_out, mask);
        }
        aten::attention_backward(inputs, out, logsumexp, d_out, mask)
    }
}

/// Calls `task` with chunks of whole rows of `out` and their ranges in `out`.
fn write_rows<T: Send>(out: &mut [T], width: usize, task: impl Fn(Range<usize>, &mut [T]) + Sync) {
    let length = out.len();
    let out = Shared::new(out);
    for_each_chunk(length.div_ceil(width), TASK_ELEMENTS / width, &|rows| {
        let range = rows.start * width..length.min(rows.end * width);
        #[expect(unsafe_code, reason = "tasks write to disjoint ranges")]
        // SAFETY: chunks of rows do not overlap.
        task(range.clone(), unsafe { out.range(range) });
    });
}

/// Sums the results of tasks in the order of their indices.
fn sum_tasks(count: usize, task: impl Fn(usize) -> f64 + Sync) -> f64 {
    let mut sums = vec![0.0; count];
    let shared = Shared::new(&mut sums);
    Threads.run(count, &|index| {
        #[expect(unsafe_code, reason = "tasks write to disjoint ranges")]
        // SAFETY: this sum belongs to this task.
        unsafe { shared.range(index..index + 1) }.fill(task(index));
    });
    sums.iter().sum()
}
