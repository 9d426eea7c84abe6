//! Linear layers, frozen or trained, with or without LoRA adapters.

use finetune_kernels::dropout::Noise;
use tch::{Kind, Tensor};

use crate::{
    ops::{self, Factor},
    params::flat::Param,
    runtime::profile,
};

/// Layers that read one input, each `y = x Wᵀ + bias + scaling · dropout(x) Aᵀ Bᵀ`.
///
/// Their adapters' `A` lie one below the other and are multiplied as one: products with few rows
/// or columns cost as much as the memory they pass over.
///
/// # Source
/// LoRA, arXiv 2106.09685, equation 3; dropout on the adapter's input only, as in
/// `peft/tuners/lora/layer.py`, 0.21.2.
#[derive(Debug)]
pub struct Projections<const N: usize> {
    /// The layers.
    pub layers: [Linear; N],
    /// What their adapters share.
    pub down: Option<Down>,
}

/// One of the layers.
#[derive(Debug)]
pub struct Linear {
    /// `[out, in]`.
    pub weight: Param,
    /// `[out]`.
    pub bias: Option<Param>,
    /// Its part of an adapter.
    pub up: Option<Up>,
}

/// The first half of the adapters of layers with one input.
#[derive(Debug)]
pub struct Down {
    /// Each adapter's `A`, `[ΣR, in]`.
    pub a: Param,
    /// The factor on the products.
    pub scaling: f64,
}

/// The second half of an adapter.
#[derive(Debug)]
pub struct Up {
    /// `[out, R]`.
    pub b: Param,
    /// The first of its rows in [`Down::a`].
    pub first: i64,
}

/// The input of some layers, with what dropout makes of it.
pub struct Input {
    x: Tensor,
    dropped: Option<Tensor>,
}

/// What adapters' first halves give, `[T, ΣR]`: small enough to be kept for the backward pass.
pub struct Low(Option<Tensor>);

/// Gradients on their way through some layers.
pub struct Passed {
    /// That of the input, `[T, in]`.
    dx: Option<Tensor>,
    /// Those of what adapters' first halves give, `[T, ΣR]`.
    d_low: Option<Tensor>,
}

impl Passed {
    /// Takes the gradient of the input, `[T, in]`, where it was wanted.
    pub fn take_input_grad(&mut self) -> Option<Tensor> {
        self.dx.take()
    }
}

impl Input {
    /// Prepares an input `[T, in]`; dropout acts only on adapters.
    pub fn new(x: Tensor, noise: Option<Noise>) -> Self {
        let dropped = noise.map(|noise| ops::dropout(&x, noise));
        Self { x, dropped }
    }

    /// Prepares an input without noise.
    pub fn plain(x: Tensor) -> Self {
        Self { x, dropped: None }
    }

    fn for_adapter(&self) -> &Tensor {
        self.dropped.as_ref().unwrap_or(&self.x)
    }
}

impl<const N: usize> Projections<N> {
    /// Tells whether anything in the layers is trained.
    pub fn is_trained(&self) -> bool {
        self.down.is_some()
            || self.layers.iter().any(|layer| {
                layer.weight.is_trained() || layer.bias.as_ref().is_some_and(Param::is_trained)
            })
    }

    /// Computes the layers, and keeps nothing.
    ///
    /// # Shapes
    /// Results are `[T, out]`.
    pub fn apply(&self, input: &Input) -> [Tensor; N] {
        self.forward(input).0
    }

    /// Computes the layers, with what the backward pass wants.
    ///
    /// # Shapes
    /// Results are `[T, out]`.
    pub fn forward(&self, input: &Input) -> ([Tensor; N], Low) {
        let low = self.down.as_ref().map(|down| down.forward(input));
        let results = self.layers.each_ref().map(|layer| {
            let adapter = layer.up.as_ref().zip(low.as_ref());
            let adapter = adapter.map(|(up, low)| (up.rows(low), Factor::Transposed(&up.b.value)));
            let mut terms = vec![(&input.x, Factor::Transposed(&layer.weight.value))];
            terms.extend(adapter.as_ref().map(|(low, b)| (low, *b)));
            let bias = layer.bias.as_ref().map(|bias| &bias.value);
            profile::time("linear", || ops::products(&terms, bias))
        });
        (results, Low(low))
    }

    /// Takes gradients `[T, out]` to the layers' input, `noise` being that of its dropout.
    pub fn pass_back(
        &self,
        dy: [&Tensor; N],
        noise: Option<Noise>,
        wants_input_grad: bool,
    ) -> Passed {
        let d_low = self.down.as_ref().map(|down| {
            let d_low = down.empty_low(dy[0]);
            for (layer, dy) in self.layers.iter().zip(dy) {
                if let Some(up) = &layer.up {
                    let factor = Factor::Plain(&up.b.value);
                    ops::multiply(dy, factor, down.scaling, &mut up.rows(&d_low));
                }
            }
            d_low
        });
        let dx = wants_input_grad.then(|| {
            let weights = self.layers.iter().map(|layer| Factor::Plain(&layer.weight.value));
            let mut terms: Vec<_> = dy.into_iter().zip(weights).collect();
            let adapters = self.down.as_ref().zip(d_low.as_ref());
            let adapters = adapters.map(|(down, d_low)| (d_low, Factor::Plain(&down.a.value)));
            if noise.is_none() {
                terms.extend(adapters);
            }
            let mut dx = profile::time("linear, input gradient", || ops::products(&terms, None));
            if let (Some((d_low, a)), Some(noise)) = (adapters, noise) {
                let mut product = dx.empty_like();
                ops::multiply(d_low, a, 1.0, &mut product);
                ops::add_masked(&mut dx, &product, noise);
            }
            dx
        });
        Passed { dx, d_low }
    }

    /// Adds the gradients of trained parameters; `low` is the forward pass's.
    ///
    /// # Shapes
    /// `dy` are `[T, out]`.
    pub fn add_gradients(&self, input: &Input, low: &Low, dy: [&Tensor; N], passed: &Passed) {
        for (layer, dy) in self.layers.iter().zip(dy) {
            if let Some(grad) = &layer.weight.grad {
                grad.add_outer(dy, &input.x);
            }
            if let Some(grad) = layer.bias.as_ref().and_then(|bias| bias.grad.as_ref()) {
                ops::accumulate(grad.sum(), &dy.sum_dim_intlist(0, false, Kind::Float));
            }
        }
        let (Some(down), Some(d_low), Low(Some(low))) = (&self.down, &passed.d_low, low) else {
            return;
        };
        for (layer, dy) in self.layers.iter().zip(dy) {
            if let Some(up) = &layer.up
                && let Some(grad) = &up.b.grad
            {
                grad.add_outer(dy, &up.rows(low));
            }
        }
        if let Some(grad) = &down.a.grad {
            grad.add_outer(d_low, input.for_adapter());
        }
    }
}

impl Down {
    /// Computes `scaling · dropout(x) Aᵀ` for all adapters, `[T, ΣR]`.
    fn forward(&self, input: &Input) -> Tensor {
        let x = input.for_adapter();
        let mut low = self.empty_low(x);
        ops::multiply(x, Factor::Transposed(&self.a.value), self.scaling, &mut low);
        low
    }

    /// Makes room for `[T, ΣR]` beside `[T, …]`.
    fn empty_low(&self, beside: &Tensor) -> Tensor {
        let shape = [beside.size()[0], self.a.value.size()[0]];
        Tensor::empty(shape, (beside.kind(), beside.device()))
    }
}

impl Up {
    /// Returns this adapter's part of `[T, ΣR]`.
    fn rows(&self, low: &Tensor) -> Tensor {
        low.narrow(1, self.first, self.b.value.size()[1])
    }
}
