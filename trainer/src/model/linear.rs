//! A linear layer, frozen or trained, with or without a LoRA adapter.

use finetune_kernels::dropout::Noise;
use tch::{Kind, Tensor};

use super::{dropout::Dropout, params::Param};
use crate::{ops, profile};

/// `y = x Wᵀ + bias + scaling · dropout(x) Aᵀ Bᵀ`.
///
/// # Source
/// LoRA, arXiv 2106.09685, equation 3; dropout on the adapter's input only, as in
/// `peft/tuners/lora/layer.py`, 0.21.2.
#[derive(Debug)]
pub struct Linear {
    /// `[out, in]`.
    pub weight: Param,
    /// `[out]`.
    pub bias: Option<Param>,
    /// The adapter.
    pub adapter: Option<Adapter>,
}

/// A low-rank update of a linear layer.
#[derive(Debug)]
pub struct Adapter {
    /// `[R, in]`.
    pub a: Param,
    /// `[out, R]`.
    pub b: Param,
    /// The factor on the product.
    pub scaling: f64,
}

/// The input of one or several layers, with what dropout makes of it.
pub struct Input {
    x: Tensor,
    /// `x ∘ mask`, and the noise that makes the mask.
    dropped: Option<(Tensor, Noise)>,
}

impl Input {
    /// Prepares an input `[T, in]`; dropout acts only on adapters.
    pub fn new(x: Tensor, dropout: Option<&Dropout>, site: u64) -> Self {
        let dropped = dropout.map(|dropout| {
            let noise = dropout.noise(site);
            (ops::dropout(&x, noise), noise)
        });
        Self { x, dropped }
    }

    fn for_adapter(&self) -> &Tensor {
        self.dropped.as_ref().map_or(&self.x, |(dropped, _)| dropped)
    }
}

/// Sums the gradients that several layers give their common input.
#[derive(Default)]
pub struct InputGrad {
    direct: Option<Tensor>,
    /// What came through adapters, before the dropout mask.
    dropped: Option<Tensor>,
}

impl InputGrad {
    /// Returns the gradient of the input, `[T, in]`.
    pub fn finish(self, input: &Input) -> Tensor {
        let mut direct = self.direct.expect("every layer adds its direct part");
        if let (Some(dropped), &Some((_, noise))) = (self.dropped, &input.dropped) {
            ops::add_masked(&mut direct, &dropped, noise);
        }
        direct
    }
}

/// Adds `left · right` to an optional matrix.
fn add_product(sum: &mut Option<Tensor>, left: &Tensor, right: &Tensor) {
    match sum {
        Some(sum) => {
            let _ = sum.addmm_(left, right);
        }
        None => *sum = Some(left.mm(right)),
    }
}

/// Adds `leftᵀ · right` to a gradient in fp32.
fn add_weight_grad(grad: &Tensor, left: &Tensor, right: &Tensor) {
    let mut grad = grad.shallow_clone();
    if left.kind() == Kind::Float {
        let _ = grad.addmm_(&left.tr(), right);
    } else {
        ops::accumulate(&grad, &left.tr().mm(right));
    }
}

impl Linear {
    /// Makes a plain layer.
    pub fn new(weight: Param, bias: Option<Param>, adapter: Option<Adapter>) -> Self {
        Self { weight, bias, adapter }
    }

    /// Tells whether anything in the layer is trained.
    pub fn is_trained(&self) -> bool {
        self.adapter.is_some()
            || self.weight.is_trained()
            || self.bias.as_ref().is_some_and(Param::is_trained)
    }

    /// Computes the layer.
    ///
    /// # Shapes
    /// Input `[T, in]`, result `[T, out]`.
    pub fn forward(&self, input: &Input) -> Tensor {
        let mut y = profile::time("linear", || match &self.bias {
            Some(bias) => bias.value.addmm(&input.x, &self.weight.value.tr()),
            None => input.x.mm(&self.weight.value.tr()),
        });
        if let Some(adapter) = &self.adapter {
            profile::time("adapter", || {
                let u = adapter.down(input);
                let _ = y.addmm_(&u, &adapter.b.value.tr());
            });
        }
        y
    }

    /// Adds the gradients of trained parameters, and of the input where it is wanted.
    ///
    /// # Shapes
    /// `dy` is `[T, out]`.
    pub fn backward(&self, input: &Input, dy: &Tensor, input_grad: Option<&mut InputGrad>) {
        if let Some(grad) = &self.weight.grad {
            profile::time("linear, weight gradient", || add_weight_grad(grad, dy, &input.x));
        }
        if let Some(grad) = self.bias.as_ref().and_then(|bias| bias.grad.as_ref()) {
            let _ = grad.shallow_clone().g_add_(&dy.sum_dim_intlist(0, false, Kind::Float));
        }
        let through_adapter = self.adapter.as_ref().map(|adapter| {
            profile::time("adapter, backward", || {
                let v = dy.mm(&adapter.b.value) * adapter.scaling; // [T, R]
                if let Some(grad) = &adapter.b.grad {
                    add_weight_grad(grad, dy, &adapter.down(input));
                }
                if let Some(grad) = &adapter.a.grad {
                    add_weight_grad(grad, &v, input.for_adapter());
                }
                (v, &adapter.a.value)
            })
        });
        let Some(input_grad) = input_grad else { return };
        profile::time("linear, input gradient", || {
            add_product(&mut input_grad.direct, dy, &self.weight.value);
        });
        if let Some((v, a)) = through_adapter {
            let sum = if input.dropped.is_some() {
                &mut input_grad.dropped
            } else {
                &mut input_grad.direct
            };
            profile::time("adapter, backward", || add_product(sum, &v, a));
        }
    }
}

impl Adapter {
    /// Computes `scaling · dropout(x) Aᵀ`, `[T, R]`; cheap enough to compute again in backward.
    fn down(&self, input: &Input) -> Tensor {
        input.for_adapter().mm(&self.a.value.tr()) * self.scaling
    }
}
