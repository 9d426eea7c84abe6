//! Milliseconds of each kernel on one thread, at the shapes of SmolLM2-135M and 1,024 positions.
#![expect(clippy::print_stdout, reason = "a benchmark prints")]

use std::{hint::black_box, time::Instant};

use finetune_kernels::{
    Element, GemmElement, adamw,
    adamw_8bit::{self, BLOCK, Moments},
    attention, cross_entropy,
    dropout::{self, DropoutMask},
    matmul::{self, Target},
    matrix::{Matrix, Operand},
    pool::Serial,
    rms_norm, rope, swiglu,
};
use half::bf16;

const POSITIONS: usize = 1024;
const WIDTH: usize = 576;
const FEED_FORWARD: usize = 1536;
const VOCABULARY: usize = 49152;

fn main() {
    let values = values::<bf16>;
    let (x, weight) = (values(POSITIONS * WIDTH), values(WIDTH));
    let mut y = x.to_vec();
    time("rms_norm::forward", || rms_norm::forward(x, weight, 1e-5, &mut y));
    time("rms_norm::backward", || {
        rms_norm::backward(x, weight, 1e-5, &mut y, Some(x), &mut []);
    });
    let (d_product, up) = (values(POSITIONS * FEED_FORWARD), values(POSITIONS * FEED_FORWARD));
    let (mut gate, mut product) = (up.to_vec(), up.to_vec());
    time("swiglu::forward", || swiglu::forward(&gate, up, &mut product));
    time("swiglu::backward", || swiglu::backward(d_product, &mut gate, &mut product));
    let angles = values(POSITIONS * 32);
    time("rope::rotate, queries", || {
        rope::rotate(&mut y, angles, angles, WIDTH, 32, 1.0);
    });
    let mask = DropoutMask { key: 1, threshold: 3277 };
    time("dropout::apply", || dropout::apply(mask, 0, x, &mut y));
    let labels = vec![1_i64; 64];
    let logits = values(64 * VOCABULARY);
    time("cross_entropy::backward, 64 rows", || {
        black_box(cross_entropy::backward(logits, &labels));
    });
    let mut state = [const { Vec::new() }; 3].map(|_: Vec<f32>| vec![1.0_f32; 1 << 20]);
    let (grad, mut compute) = (vec![1.0_f32; 1 << 20], vec![bf16::ZERO; 1 << 20]);
    let step = adamw::AdamWStep {
        grad_scale: 1.0,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay_factor: 1.0,
        step_size: 1e-3,
        bias_correction2_sqrt: 1.0,
    };
    time("adamw::step, a million parameters", || {
        let [master, exp_avg, exp_avg_sq] = &mut state;
        adamw::step(step, &grad, master, exp_avg, exp_avg_sq, &mut compute);
    });
    let (mut codes, mut codes_sq) = (vec![0_i8; 1 << 20], vec![0_u8; 1 << 20]);
    let mut scales = [const { Vec::new() }; 2].map(|_: Vec<f32>| vec![0.0; (1 << 20) / BLOCK]);
    time("adamw_8bit::step, a million parameters", || {
        let [exp_avg_scale, exp_avg_sq_scale] = &mut scales;
        let (exp_avg, exp_avg_sq) = (&mut codes[..], &mut codes_sq[..]);
        let moments = Moments { exp_avg, exp_avg_scale, exp_avg_sq, exp_avg_sq_scale };
        adamw_8bit::step(step, 1, 0, &grad, &mut state[0], moments, &mut compute);
    });
    products::<bf16>("bf16");
    products::<f32>("fp32");
}

/// Returns numbers that are aligned to a cache line, as libtorch's tensors are.
fn values<E: Element>(length: usize) -> &'static mut [E] {
    let all: Vec<E> = numbers(length + 64 / size_of::<E>());
    let all = all.leak();
    let first = all.as_ptr().align_offset(64);
    &mut all[first..first + length]
}

fn numbers<E: Element>(length: usize) -> Vec<E> {
    (0..length)
        .map(|index| E::from_f32((dropout::mix(index as u64) % 2048) as f32 / 1024.0 - 1.0))
        .collect()
}

fn products<E: GemmElement>(dtype: &str) {
    let Some(kernel) = E::kernel() else {
        println!("{dtype}: skipped, none of our kernels multiplies it on this CPU");
        return;
    };
    println!("{dtype}, by {kernel}:");
    matmul::<E>();
    for (segments, length) in [(4, 256), (2, 1024), (16, 64)] {
        attention::<E>(&format!("{segments}x{length}"), &vec![length; segments]);
    }
    attention::<E>("mixed lengths", &[37, 310, 128, 5, 411, 96, 250, 203, 64, 33, 511]);
}

fn matmul<E: GemmElement>() {
    for (depth, columns) in [(WIDTH, FEED_FORWARD), (FEED_FORWARD, WIDTH), (WIDTH, VOCABULARY)] {
        let (x, weight) = (values::<E>(POSITIONS * depth), values::<E>(columns * depth));
        let y = values::<E>(POSITIONS * columns);
        let mut grad = vec![0.0; depth * columns];
        let size = [POSITIONS, columns];
        time_product("forward", [POSITIONS, depth, columns], || {
            let right = Operand::Transposed(matrix(weight, columns, depth));
            let terms = [(Operand::Plain(matrix(x, POSITIONS, depth)), right)];
            matmul::multiply(&Serial, &terms, size, Target::Write(y, None));
        });
        // As in a training step, where no operand is still in the L1 or L2 cache.
        let many: Vec<_> = (0..24)
            .map(|_| (values::<E>(POSITIONS * depth), values::<E>(columns * depth)))
            .collect();
        let mut operands = many.iter().cycle();
        time_product("forward, from memory", [POSITIONS, depth, columns], || {
            let Some((x, weight)) = operands.next() else { return };
            let right = Operand::Transposed(matrix(weight, columns, depth));
            let terms = [(Operand::Plain(matrix(x, POSITIONS, depth)), right)];
            matmul::multiply(&Serial, &terms, size, Target::Write(y, None));
        });
        time_product("input's gradient", [POSITIONS, depth, columns], || {
            let right = Operand::Plain(matrix(weight, depth, columns));
            let terms = [(Operand::Plain(matrix(x, POSITIONS, depth)), right)];
            matmul::multiply(&Serial, &terms, size, Target::Write(y, None));
        });
        time_product("weight's gradient", [depth, POSITIONS, columns], || {
            let left = Operand::Transposed(matrix(x, POSITIONS, depth));
            let terms = [(left, Operand::Plain(matrix(y, POSITIONS, columns)))];
            let target = Target::Sum { to: &mut grad, accumulate: true };
            matmul::multiply(&Serial, &terms, [depth, columns], target);
        });
    }
}

fn matrix<E>(data: &[E], rows: usize, columns: usize) -> Matrix<'_, E> {
    Matrix { data, rows, columns, stride: columns }
}

fn time_product(what: &str, [rows, depth, columns]: [usize; 3], run: impl FnMut()) {
    let best = time(&format!("matmul, {what}, {rows}x{depth}x{columns}"), run);
    if best.is_nan() {
        return;
    }
    println!("{:40} {:.0} GFLOP/s", "", 2e-6 * (rows * depth * columns) as f64 / best);
}

fn attention<E: GemmElement>(what: &str, lengths: &[usize]) {
    let shape = attention::Shape { heads: 9, kv_heads: 3, width: 64, window: usize::MAX };
    let positions: usize = lengths.iter().sum();
    let (q, k) = (values::<E>(positions * 576), values::<E>(positions * 192));
    let (mut out, mut lse) = (q.to_vec(), vec![0.0; positions * 9]);
    time(&format!("attention::forward, {what}"), || {
        attention::forward(&Serial, shape, lengths, [q, k, k], &mut out, &mut lse);
    });
    let (mut dq, mut dk, mut dv) = (q.to_vec(), k.to_vec(), k.to_vec());
    let backward_inputs = attention::BackwardInputs { out: &out, logsumexp: &lse, d_out: q };
    time(&format!("attention::backward, {what}"), || {
        let grads = [&mut dq[..], &mut dk, &mut dv];
        attention::backward(&Serial, shape, lengths, [q, k, k], backward_inputs, grads);
    });
}

/// Prints the best and the median of 30 runs, and returns the best, in milliseconds.
///
/// Measures only benchmarks whose name contains the command line's first word, if there is one.
fn time(what: &str, mut run: impl FnMut()) -> f64 {
    let wanted = std::env::args().skip(1).find(|word| !word.starts_with('-'));
    if wanted.is_some_and(|wanted| !what.contains(&wanted)) {
        return f64::NAN;
    }
    let mut times: Vec<f64> = (0..30)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed().as_secs_f64() * 1e3
        })
        .collect();
    times.sort_by(f64::total_cmp);
    println!("{what:<40} best {:8.3} ms, median {:8.3} ms", times[0], times[times.len() / 2]);
    times[0]
}
