//! Our kernels against libtorch's operators: equal in fp32, and in bf16 at least as close to fp32.

use finetune_kernels::dropout::DropoutMask;
use finetune_trainer::{
    layers::attention::Segments,
    ops::{
        self, Factor,
        aten::{self, scores},
    },
    runtime::{rng::RngKey, vml},
};
use tch::{Device, Kind, Tensor};

fn numbers(shape: &[i64], seed: u64) -> Tensor {
    vml::resolve_kernels();
    RngKey::from_seed(seed).normal_tensor(shape, Device::Cpu)
}

/// Root mean square of the difference, relative to that of `exact`.
fn error(found: &Tensor, exact: &Tensor) -> f64 {
    let norm = |x: &Tensor| x.to_kind(Kind::Double).norm().double_value(&[]);
    norm(&(found.to_kind(Kind::Double) - exact.to_kind(Kind::Double))) / norm(exact)
}

/// Compares the results of our kernel and of libtorch's operators on the same inputs.
fn compare(
    what: &str,
    inputs: &[Tensor],
    ours: impl Fn(&[Tensor]) -> Vec<Tensor>,
    plain: impl Fn(&[Tensor]) -> Vec<Tensor>,
) {
    let copies = |kind| inputs.iter().map(|input| input.to_kind(kind).copy()).collect::<Vec<_>>();
    let exact = plain(&copies(Kind::Float));
    for (index, (found, exact)) in ours(&copies(Kind::Float)).iter().zip(&exact).enumerate() {
        let error = error(found, exact);
        assert!(error < 2e-6, "{what}, result {index}: {error:e} in fp32");
    }
    // In bf16, compared with fp32 results of the rounded inputs.
    let round = |inputs: Vec<Tensor>| -> Vec<Tensor> {
        inputs.iter().map(|input| input.to_kind(Kind::BFloat16).to_kind(Kind::Float)).collect()
    };
    let exact = plain(&round(copies(Kind::Float)));
    let theirs = plain(&copies(Kind::BFloat16));
    for (index, ((found, theirs), exact)) in
        ours(&copies(Kind::BFloat16)).iter().zip(&theirs).zip(&exact).enumerate()
    {
        let (ours, theirs) = (error(found, exact), error(theirs, exact));
        assert!(ours < 1.05 * theirs + 1e-6, "{what}, result {index}: {ours:e}, theirs {theirs:e}");
        assert!(ours < 4e-3, "{what}, result {index}: {ours:e} in bf16");
    }
}

#[test]
fn norms_equal_libtorch() {
    type Backward = fn(&Tensor, &Tensor, f64, Tensor, Option<&Tensor>, Option<&Tensor>) -> Tensor;
    let inputs = [
        numbers(&[37, 96], 1),
        numbers(&[96], 2) + 1.0,
        numbers(&[37, 96], 3),
        numbers(&[37, 96], 4),
    ];
    let all = |forward: fn(&Tensor, &Tensor, f64) -> Tensor, backward: Backward| {
        move |inputs: &[Tensor]| {
            let [x, weight, dy, residual] = inputs else { unreachable!() };
            let grad = Tensor::zeros([96], (Kind::Float, Device::Cpu));
            vec![
                forward(x, weight, 1e-5),
                backward(x, weight, 1e-5, dy.copy(), None, Some(&grad)),
                backward(x, weight, 1e-5, dy.copy(), Some(residual), None),
                grad,
            ]
        }
    };
    compare(
        "rms norm",
        &inputs,
        all(ops::rms_norm, ops::rms_norm_backward),
        all(aten::rms_norm, aten::rms_norm_backward),
    );
}

#[test]
fn gated_products_equal_libtorch() {
    type Backward = fn(Tensor, Tensor, Tensor) -> (Tensor, Tensor, Tensor);
    let inputs = [numbers(&[33, 50], 1) * 3.0, numbers(&[33, 50], 2), numbers(&[33, 50], 3)];
    let all = |forward: fn(&Tensor, &Tensor) -> Tensor, backward: Backward| {
        move |inputs: &[Tensor]| {
            let [gate, up, dy] = inputs else { unreachable!() };
            let product = forward(gate, up);
            let (again, d_gate, d_up) = backward(dy.copy(), gate.copy(), up.copy());
            vec![product, again, d_gate, d_up]
        }
    };
    compare(
        "swiglu",
        &inputs,
        all(ops::swiglu, ops::swiglu_backward),
        all(aten::swiglu, aten::swiglu_backward),
    );
}

#[test]
fn rotations_equal_libtorch() {
    let angles = numbers(&[29, 1, 8], 2);
    for direction in [1.0, -1.0] {
        compare(
            "rope",
            &[numbers(&[29, 3, 16], 1), angles.cos(), angles.sin()],
            |inputs| vec![ops::rotate(inputs[0].copy(), &inputs[1], &inputs[2], direction)],
            |inputs| vec![aten::rotate(&inputs[0], &inputs[1], &inputs[2], direction)],
        );
    }
}

#[test]
fn cross_entropy_equals_libtorch() {
    let labels = Tensor::from_slice(&[3_i64, 0, 99, 50, 7]);
    let logits = numbers(&[5, 100], 1) * 4.0;
    let loss = |loss: f64| Tensor::from_slice(&[loss]);
    compare(
        "cross-entropy",
        &[logits],
        |inputs| {
            let (sum, grad) = ops::cross_entropy_backward(inputs[0].copy(), &labels);
            vec![loss(sum), loss(ops::cross_entropy(&inputs[0], &labels)), grad]
        },
        |inputs| {
            let (sum, grad) = aten::cross_entropy_backward(&inputs[0].copy(), &labels);
            vec![loss(sum), loss(aten::cross_entropy(&inputs[0], &labels)), grad]
        },
    );
}

#[test]
fn dropout_equals_libtorch() {
    let mask = DropoutMask { key: 5, threshold: 20_000 };
    compare(
        "dropout",
        &[numbers(&[31, 77], 1), numbers(&[31, 77], 2)],
        |inputs| {
            let mut sum = inputs[1].copy();
            ops::add_masked(&mut sum, &inputs[0], mask);
            vec![ops::dropout(&inputs[0], mask), sum]
        },
        |inputs| {
            let mut sum = inputs[1].copy();
            aten::add_masked(&mut sum, &inputs[0], mask);
            vec![aten::dropout(&inputs[0], mask), sum]
        },
    );
}

/// A step of AdamW in the middle of a run, with clipping and weight decay.
const STEP: ops::AdamWStep = ops::AdamWStep {
    grad_scale: 0.5,
    beta1: 0.9,
    beta2: 0.999,
    epsilon: 1e-8,
    weight_decay_factor: 0.99,
    step_size: 1e-2,
    bias_correction2_sqrt: 0.8,
};

#[test]
fn adamw_equals_libtorch() {
    // More than one chunk of the libtorch implementation.
    let length = [(1 << 22) + 7];
    let after = |update: fn(ops::AdamWStep, &Tensor, [Tensor; 3], Tensor), kind| {
        let state = [numbers(&length, 1), numbers(&length, 2), numbers(&length, 3).square()];
        let compute = match kind {
            Kind::Float => state[0].shallow_clone(),
            kind => state[0].to_kind(kind),
        };
        let handles = state.each_ref().map(Tensor::shallow_clone);
        update(STEP, &numbers(&length, 4), handles, compute.shallow_clone());
        let [master, exp_avg, exp_avg_sq] = state;
        [master, exp_avg, exp_avg_sq, compute]
    };
    for kind in [Kind::Float, Kind::BFloat16] {
        let (ours, theirs) = (after(ops::adamw, kind), after(aten::adamw, kind));
        for (ours, theirs) in ours[..3].iter().zip(&theirs) {
            assert!(error(ours, theirs) < 1e-6, "{kind:?}: {:e}", error(ours, theirs));
        }
        // Rounded from our own masters.
        assert_eq!(ours[3], ours[0].to_kind(kind));
    }
}

#[test]
fn adamw_with_8_bit_moments_equals_libtorch() {
    type Update = fn(ops::AdamWStep, u64, &Tensor, Tensor, [&ops::QuantizedState; 2], Tensor);
    let step = |number| ops::AdamWStep {
        bias_correction2_sqrt: (1.0_f32 - 0.999_f32.powi(number)).sqrt(),
        ..STEP
    };
    // The last block is incomplete.
    let length = [3 * 4096 + 7];
    let after = |update: Update, kind| {
        let master = numbers(&length, 1);
        let compute = match kind {
            Kind::Float => master.shallow_clone(),
            kind => master.to_kind(kind),
        };
        let moments = [true, false]
            .map(|is_signed| ops::QuantizedState::zeros(length[0], is_signed, Device::Cpu));
        for number in 1..=5 {
            let (grad, key) = (numbers(&length, 3 + number as u64), number as u64);
            let (master, compute) = (master.shallow_clone(), compute.shallow_clone());
            update(step(number), key, &grad, master, moments.each_ref(), compute);
        }
        let [exp_avg, exp_avg_sq] = moments.map(|state| state.dequantize(0, length[0]));
        [master, exp_avg, exp_avg_sq, compute]
    };
    for kind in [Kind::Float, Kind::BFloat16] {
        let (ours, theirs) = (after(ops::adamw_8bit, kind), after(aten::adamw_8bit, kind));
        for (ours, theirs) in ours[..3].iter().zip(&theirs) {
            // Rarely, a rounding error decides between two codes of the stochastic rounding.
            let differs = (ours - theirs).abs().gt(1e-5).to_kind(Kind::Double).mean(Kind::Double);
            assert!(differs.double_value(&[]) < 1e-3, "{kind:?}");
        }
        assert_eq!(ours[3], ours[0].to_kind(kind));
    }
}

#[test]
fn tiled_attention_equals_libtorch() {
    type Forward = fn([&Tensor; 3], ops::AttentionMask<'_>) -> (Tensor, Vec<Tensor>);
    type Backward =
        fn([&Tensor; 3], &Tensor, &[Tensor], &Tensor, ops::AttentionMask<'_>) -> [Tensor; 3];
    for (heads, kv_heads, width, window, lengths) in [
        (4, 2, 32, None, &[70, 1, 64, 129][..]),
        (3, 3, 64, None, &[200]),
        (4, 1, 32, Some(40), &[90, 90, 10]),
    ] {
        let positions = lengths.iter().sum::<usize>() as i64;
        let segments = Segments::new(lengths);
        let mask = ops::AttentionMask { runs: segments.runs(), window };
        let inputs = [
            numbers(&[positions, heads, width], 1),
            numbers(&[positions, kv_heads, width], 2),
            numbers(&[positions, kv_heads, width], 3),
            numbers(&[positions, heads, width], 4),
        ];
        let all = |forward: Forward, backward: Backward| {
            move |inputs: &[Tensor]| {
                let [q, k, v, d_out] = inputs else { unreachable!() };
                let (out, logsumexp) = forward([q, k, v], mask);
                let [dq, dk, dv] = backward([q, k, v], &out, &logsumexp, d_out, mask);
                vec![out, dq, dk, dv]
            }
        };
        compare(
            "attention",
            &inputs,
            all(ops::attention, ops::attention_backward),
            all(aten::attention, aten::attention_backward),
        );
        compare(
            "attention with all scores",
            &inputs,
            all(scores::attention, scores::attention_backward),
            all(aten::attention, aten::attention_backward),
        );
    }
}

#[test]
fn products_of_layers_equal_libtorchs() {
    type Products = fn(&[(&Tensor, Factor<'_>)], Option<&Tensor>) -> Tensor;
    fn plain(terms: &[(&Tensor, Factor<'_>)], bias: Option<&Tensor>) -> Tensor {
        let mut sum = aten::product(terms[0].0, terms[0].1, bias);
        for (left, factor) in &terms[1..] {
            aten::add_product(left, *factor, &mut sum);
        }
        sum
    }
    // Products with few rows or an odd rank are computed by libtorch.
    for (rows, width, out, rank) in
        [(37, 96, 50, 8), (300, 576, 192, 2), (5, 64, 64, 4), (64, 48, 98, 3)]
    {
        let inputs = [
            numbers(&[rows, width], 1),
            numbers(&[out, width], 2),
            numbers(&[rows, rank + 6], 3),
            numbers(&[out, rank], 4),
            numbers(&[out], 5),
            numbers(&[rows, out], 6),
        ];
        let all = |products: Products, add_outer: fn(&Tensor, &Tensor, &Tensor)| {
            move |inputs: &[Tensor]| {
                let [x, weight, hidden, b, bias, dy] = inputs else { unreachable!() };
                let hidden = hidden.narrow(1, 6, rank);
                let [weights, bs] = [weight, b].map(Factor::Transposed);
                let y = products(&[(x, weights), (&hidden, bs)], Some(bias));
                let terms = [(dy, Factor::Plain(weight)), (&y, Factor::Plain(weight))];
                let grad = Tensor::ones([out, width], (Kind::Float, Device::Cpu));
                add_outer(dy, x, &grad);
                vec![products(&terms[..1], None), products(&terms, None), y, grad]
            }
        };
        compare(
            &format!("layers of {width} and {out}"),
            &inputs,
            all(ops::products, ops::add_outer),
            all(plain, aten::add_outer),
        );
    }
}

#[test]
fn products_of_low_rank_equal_libtorchs() {
    type Multiply = fn(&Tensor, Factor<'_>, f64, &mut Tensor);
    type Add = fn(&Tensor, Factor<'_>, &mut Tensor);
    type AddOuter = fn(&Tensor, &Tensor, &Tensor);
    for (rows, width, rank, others) in [(37, 96, 8, 16), (300, 576, 2, 0), (5, 64, 7, 0)] {
        // The stacked hidden activations, x, y, and the layer's lora_A and lora_B.
        let inputs = [
            numbers(&[rows, rank + others], 1),
            numbers(&[rows, width], 2),
            numbers(&[rows, width], 3),
            numbers(&[rank, width], 4),
            numbers(&[width, rank], 5),
        ];
        let all = |multiply: Multiply, add: Add, add_outer: AddOuter| {
            move |inputs: &[Tensor]| {
                let [hidden, x, y, a, b] = inputs else { unreachable!() };
                let mut part = hidden.narrow(1, others, rank);
                let mut sum = y.copy();
                add(&part, Factor::Transposed(b), &mut sum);
                add(&part, Factor::Plain(a), &mut sum);
                let grads = [[rank, width], [width, rank]]
                    .map(|shape| Tensor::ones(shape, (Kind::Float, Device::Cpu)));
                add_outer(&part, x, &grads[0]);
                add_outer(x, &part, &grads[1]);
                multiply(x, Factor::Transposed(a), 0.5, &mut part);
                let first = hidden.copy();
                multiply(x, Factor::Plain(b), 0.5, &mut part);
                let [grad_a, grad_b] = grads;
                vec![sum, grad_a, grad_b, first, hidden.copy()]
            }
        };
        compare(
            &format!("products of rank {rank}"),
            &inputs,
            all(ops::multiply, ops::add_product, ops::add_outer),
            all(aten::multiply, aten::add_product, aten::add_outer),
        );
    }
}
