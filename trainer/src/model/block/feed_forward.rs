//! The feed-forward half of a block: a gated network on each token by itself.

use tch::Tensor;

use super::{BlockContext, DropoutSite};
use crate::{
    layers::{
        linear::{LoraHidden, Projections},
        norm::RmsNorm,
    },
    ops,
};

/// `x + down_proj(silu(gate_proj(norm(x))) ∘ up_proj(norm(x)))`.
#[derive(Debug)]
pub struct FeedForward {
    /// The index of the block, from 0; part of its dropout sites.
    pub layer: u64,
    /// Norm before the feed-forward layers.
    pub post_attention_layernorm: RmsNorm,
    /// The two inputs of SwiGLU: `gate_proj`, `up_proj`.
    pub gate_up_proj: Projections<2>,
    /// From the feed-forward width back to the model width.
    pub down_proj: Projections<1>,
}

/// The activations that the backward pass of [`FeedForward`] needs besides its input.
///
/// The norm's output and the gated product are not among them: recomputing them costs less than the
/// memory traffic of saving them.
pub(super) struct FeedForwardActivations {
    /// `[T, F]`.
    gate: Tensor,
    /// `[T, F]`.
    up: Tensor,
    /// The hidden activations of the adapters of `gate_up_proj`.
    gate_up_hidden: LoraHidden,
    /// The hidden activations of the adapter of `down_proj`.
    down_hidden: LoraHidden,
}

impl FeedForward {
    /// Computes the feed-forward layers and adds them to the residual stream.
    ///
    /// # Shapes
    /// `x` and the result are `[T, D]`.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        context: &BlockContext<'_>,
    ) -> (Tensor, FeedForwardActivations) {
        let normed = self.post_attention_layernorm.forward(x); // [T, D]
        let normed = context.input(normed, self.layer, DropoutSite::GateUp);
        let ([gate, up], gate_up_hidden) = self.gate_up_proj.forward(&normed); // [T, F] each
        drop(normed);
        let product = context.input(ops::swiglu(&gate, &up), self.layer, DropoutSite::Down);
        let ([down], down_hidden) = self.down_proj.forward(&product);
        let y = down + x; // [T, D]
        (y, FeedForwardActivations { gate, up, gate_up_hidden, down_hidden })
    }

    /// Adds the gradients of trained parameters, and returns the gradient of the input.
    ///
    /// # Shapes
    /// `x`, `dy` and the result are `[T, D]`.
    pub(super) fn backward(
        &self,
        x: &Tensor,
        activations: FeedForwardActivations,
        dy: &Tensor,
        context: &BlockContext<'_>,
    ) -> Tensor {
        let FeedForwardActivations { gate, up, gate_up_hidden, down_hidden } = activations;
        let mask = context.mask(self.layer, DropoutSite::Down, &gate);
        let mut grads = self.down_proj.backward_input([dy], mask, true);
        let d_product = grads.take_dx().expect("the input gradient was requested"); // [T, F]
        let (product, d_gate, d_up) = ops::swiglu_backward(d_product, gate, up); // [T, F] each
        let product = context.input(product, self.layer, DropoutSite::Down);
        self.down_proj.backward_weight(&product, &down_hidden, [dy], &grads);
        drop(product);
        let d_gate_up = [&d_gate, &d_up];
        let mask = context.mask(self.layer, DropoutSite::GateUp, x);
        let mut grads = self.gate_up_proj.backward_input(d_gate_up, mask, true);
        let normed = self.post_attention_layernorm.forward(x); // [T, D]
        let normed = context.input(normed, self.layer, DropoutSite::GateUp);
        self.gate_up_proj.backward_weight(&normed, &gate_up_hidden, d_gate_up, &grads);
        drop((normed, d_gate, d_up));
        let d_normed = grads.take_dx().expect("the input gradient was requested"); // [T, D]
        self.post_attention_layernorm.backward(x, d_normed, Some(dy)) // [T, D]
    }

    /// Reports whether any parameter of this half is trained.
    pub(super) fn is_trained(&self) -> bool {
        self.gate_up_proj.is_trained()
            || self.down_proj.is_trained()
            || self.post_attention_layernorm.weight.is_trained()
    }
}

#[cfg(test)]
impl FeedForwardActivations {
    /// Returns the saved tensors, without the hidden activations of adapters.
    pub(super) fn tensors(&self) -> Vec<&Tensor> {
        let Self { gate, up, gate_up_hidden: _, down_hidden: _ } = self;
        vec![gate, up]
    }
}
