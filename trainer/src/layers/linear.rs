//! Linear layers, frozen or trained, with or without LoRA adapters.

use finetune_kernels::dropout::DropoutMask;
use tch::{Kind, Tensor};

use crate::{ops, params::flat::Param, runtime::profile};

/// Linear layers that share an input, each `y = x Wᵀ + bias + scaling · dropout(x) Aᵀ Bᵀ`.
///
/// The `lora_A` matrices of all layers are stacked and multiplied at once: a product with few rows
/// or columns costs as much as reading its large operand.
///
/// # Source
/// LoRA, arXiv 2106.09685, equation 3; dropout on the adapter's input only, as in
/// `peft/tuners/lora/layer.py`, 0.21.2.
#[derive(Debug)]
pub struct Projections<const N: usize> {
    /// The layers.
    pub layers: [Linear; N],
    /// The stacked `lora_A` of the layers' adapters, if any has one.
    pub lora_a: Option<LoraA>,
}

/// One linear layer.
#[derive(Debug)]
pub struct Linear {
    /// `[out, in]`.
    pub weight: Param,
    /// `[out]`.
    pub bias: Option<Param>,
    /// The `lora_B` of its adapter, if it has one.
    pub lora_b: Option<LoraB>,
}

/// The `lora_A` matrices of layers that share an input, stacked.
#[derive(Debug)]
pub struct LoraA {
    /// `[ΣR, in]`.
    pub weight: Param,
    /// The factor on each adapter's product.
    pub scaling: f64,
}

/// The `lora_B` matrix of one layer.
#[derive(Debug)]
pub struct LoraB {
    /// `[out, R]`.
    pub weight: Param,
    /// The index in [`LoraA::weight`] of the first row that belongs to this layer.
    pub first_row: i64,
}

/// The input of [`Projections`], `[T, in]`, with and without dropout.
pub struct Input {
    x: Tensor,
    dropped: Option<Tensor>,
}

/// The adapters' hidden activations, `scaling · dropout(x) Aᵀ`, `[T, ΣR]`: small enough to be saved
/// for the backward pass. `None` without adapters.
pub struct LoraHidden(Option<Tensor>);

/// The gradients that [`Projections::backward_input`] computes.
pub struct InputGrads {
    /// The gradient of the input, `[T, in]`, if it was asked for.
    dx: Option<Tensor>,
    /// The gradient of the adapters' hidden activations, `[T, ΣR]`, if there are adapters.
    d_hidden: Option<Tensor>,
}

impl InputGrads {
    /// Takes the gradient of the input, `[T, in]`, if it was asked for.
    pub fn take_dx(&mut self) -> Option<Tensor> {
        self.dx.take()
    }
}

impl Input {
    /// Wraps an input `[T, in]`; `mask` drops elements of the adapters' input only.
    pub fn new(x: Tensor, mask: Option<DropoutMask>) -> Self {
        let dropped = mask.map(|mask| ops::dropout(&x, mask));
        Self { x, dropped }
    }

    /// Wraps an input `[T, in]` without dropout.
    pub fn without_dropout(x: Tensor) -> Self {
        Self { x, dropped: None }
    }

    fn lora_input(&self) -> &Tensor {
        self.dropped.as_ref().unwrap_or(&self.x)
    }
}

impl<const N: usize> Projections<N> {
    /// Reports whether any parameter of the layers is trained.
    pub fn is_trained(&self) -> bool {
        self.lora_a.is_some()
            || self.layers.iter().any(|layer| {
                layer.weight.is_trained() || layer.bias.as_ref().is_some_and(Param::is_trained)
            })
    }

    /// Computes the layers without saving anything for a backward pass.
    ///
    /// # Shapes
    /// Results are `[T, out]`.
    pub fn forward_only(&self, input: &Input) -> [Tensor; N] {
        self.forward(input).0
    }

    /// Computes the layers, and the activations that the backward pass needs.
    ///
    /// # Shapes
    /// Results are `[T, out]`.
    pub fn forward(&self, input: &Input) -> ([Tensor; N], LoraHidden) {
        let hidden = self.lora_a.as_ref().map(|lora_a| lora_a.forward(input));
        let results = self.layers.each_ref().map(|layer| {
            let adapter = layer.lora_b.as_ref().zip(hidden.as_ref());
            let adapter = adapter
                .map(|(lora_b, hidden)| (lora_b.slice(hidden), lora_b.weight.transposed_factor()));
            let mut terms = vec![(&input.x, layer.weight.transposed_factor())];
            terms.extend(adapter.as_ref().map(|(hidden, b)| (hidden, *b)));
            let bias = layer.bias.as_ref().map(Param::value);
            profile::time("linear", || ops::products(&terms, bias))
        });
        (results, LoraHidden(hidden))
    }

    /// Computes the gradients of the input and of the adapters' hidden activations; `mask` is the
    /// forward pass's.
    ///
    /// # Shapes
    /// `dy` are `[T, out]`.
    pub fn backward_input(
        &self,
        dy: [&Tensor; N],
        mask: Option<DropoutMask>,
        needs_input_grad: bool,
    ) -> InputGrads {
        let d_hidden = self.lora_a.as_ref().map(|lora_a| {
            let d_hidden = lora_a.empty_hidden(dy[0]);
            for (layer, dy) in self.layers.iter().zip(dy) {
                if let Some(lora_b) = &layer.lora_b {
                    let factor = lora_b.weight.factor();
                    ops::multiply(dy, factor, lora_a.scaling, &mut lora_b.slice(&d_hidden));
                }
            }
            d_hidden
        });
        let dx = needs_input_grad.then(|| {
            let weights = self.layers.iter().map(|layer| layer.weight.factor());
            let mut terms: Vec<_> = dy.into_iter().zip(weights).collect();
            let adapters = self.lora_a.as_ref().zip(d_hidden.as_ref());
            let adapters = adapters.map(|(lora_a, d_hidden)| (d_hidden, lora_a.weight.factor()));
            if mask.is_none() {
                terms.extend(adapters);
            }
            let mut dx = profile::time("linear, input gradient", || ops::products(&terms, None));
            if let (Some((d_hidden, a)), Some(mask)) = (adapters, mask) {
                let mut product = dx.empty_like();
                ops::multiply(d_hidden, a, 1.0, &mut product);
                ops::add_masked(&mut dx, &product, mask);
            }
            dx
        });
        InputGrads { dx, d_hidden }
    }

    /// Adds the weight gradients of trained parameters; `hidden` is the forward pass's.
    ///
    /// # Shapes
    /// `dy` are `[T, out]`.
    pub fn backward_weight(
        &self,
        input: &Input,
        hidden: &LoraHidden,
        dy: [&Tensor; N],
        input_grads: &InputGrads,
    ) {
        for (layer, dy) in self.layers.iter().zip(dy) {
            if let Some(grad) = &layer.weight.grad {
                grad.add_outer(dy, &input.x);
            }
            if let Some(grad) = layer.bias.as_ref().and_then(|bias| bias.grad.as_ref()) {
                ops::accumulate(grad.sum(), &dy.sum_dim_intlist(0, false, Kind::Float));
            }
        }
        let (Some(lora_a), Some(d_hidden), LoraHidden(Some(hidden))) =
            (&self.lora_a, &input_grads.d_hidden, hidden)
        else {
            return;
        };
        for (layer, dy) in self.layers.iter().zip(dy) {
            if let Some(lora_b) = &layer.lora_b
                && let Some(grad) = &lora_b.weight.grad
            {
                grad.add_outer(dy, &lora_b.slice(hidden));
            }
        }
        if let Some(grad) = &lora_a.weight.grad {
            grad.add_outer(d_hidden, input.lora_input());
        }
    }
}

impl LoraA {
    /// Computes `scaling · dropout(x) Aᵀ` for all adapters, `[T, ΣR]`.
    fn forward(&self, input: &Input) -> Tensor {
        let x = input.lora_input();
        let mut hidden = self.empty_hidden(x);
        ops::multiply(x, self.weight.transposed_factor(), self.scaling, &mut hidden);
        hidden
    }

    /// Allocates `[T, ΣR]` with the `T`, type and device of `like`, `[T, …]`.
    fn empty_hidden(&self, like: &Tensor) -> Tensor {
        let shape = [like.size()[0], self.weight.value().size()[0]];
        Tensor::empty(shape, (like.kind(), like.device()))
    }
}

impl LoraB {
    /// Returns this adapter's columns `[T, R]` of the hidden activations `[T, ΣR]`.
    fn slice(&self, hidden: &Tensor) -> Tensor {
        hidden.narrow(1, self.first_row, self.weight.value().size()[1])
    }
}
