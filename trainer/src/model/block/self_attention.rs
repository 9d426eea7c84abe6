//! The attention half of a block: each token attends to earlier tokens of its segment.

use tch::Tensor;

use super::{BlockContext, DropoutSite};
use crate::layers::{
    attention::{Attention, AttentionOutput},
    linear::{LoraHidden, Projections},
    norm::RmsNorm,
};

/// `x + o_proj(attention(qkv_proj(norm(x))))`.
#[derive(Debug)]
pub struct SelfAttention {
    /// The index of the block, from 0; part of its dropout sites.
    pub layer: u64,
    /// Width of one head, `E`.
    pub head_dim: i64,
    /// The attention, with its window.
    pub attention: Attention,
    /// Norm before attention.
    pub input_layernorm: RmsNorm,
    /// Queries, keys and values: `q_proj`, `k_proj`, `v_proj`.
    pub qkv_proj: Projections<3>,
    /// Norms of queries and keys per head (Qwen3).
    pub qk_norm: Option<(RmsNorm, RmsNorm)>,
    /// Output of attention.
    pub o_proj: Projections<1>,
}

/// The activations that the backward pass of [`SelfAttention`] needs besides its input.
///
/// The norm's output is not among them: recomputing it costs less than the memory traffic of saving
/// it.
pub(super) struct AttentionActivations {
    /// Queries and keys before their norms, `[T, H or K, E]`, with `qk_norm`.
    qk_raw: Option<(Tensor, Tensor)>,
    /// `[T, H, E]`, rotated.
    q: Tensor,
    /// `[T, K, E]`, rotated.
    k: Tensor,
    /// `[T, K, E]`.
    v: Tensor,
    attention: AttentionOutput,
    /// The hidden activations of the adapters of `qkv_proj`.
    qkv_hidden: LoraHidden,
    /// The hidden activations of the adapter of `o_proj`.
    o_hidden: LoraHidden,
}

impl SelfAttention {
    /// Computes attention and adds it to the residual stream.
    ///
    /// # Shapes
    /// `x` and the result are `[T, D]`.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        context: &BlockContext<'_>,
    ) -> (Tensor, AttentionActivations) {
        let normed = self.input_layernorm.forward(x); // [T, D]
        let normed = context.input(normed, self.layer, DropoutSite::Qkv);
        let (qkv, qkv_hidden) = self.qkv_proj.forward(&normed);
        drop(normed);
        let [mut q, mut k, v] = qkv.each_ref().map(|x| self.split_heads(x)); // [T, H or K, E]
        drop(qkv);
        let mut qk_raw = None;
        if let Some((q_norm, k_norm)) = &self.qk_norm {
            let normed = (q_norm.forward(&q), k_norm.forward(&k));
            qk_raw = Some((q, k));
            (q, k) = normed;
        }
        let (q, k) = (context.rotary.rotate(q), context.rotary.rotate(k));
        let attention = self.attention.forward(&q, &k, &v, context.segments);
        let heads = context.input(flatten_heads(&attention.out), self.layer, DropoutSite::O);
        let ([o], o_hidden) = self.o_proj.forward(&heads);
        let y = o + x; // [T, D]
        (y, AttentionActivations { qk_raw, q, k, v, attention, qkv_hidden, o_hidden })
    }

    /// Adds the gradients of trained parameters; returns the gradient of the input if it is needed.
    ///
    /// # Shapes
    /// `x`, `dy` and the result are `[T, D]`.
    pub(super) fn backward(
        &self,
        x: &Tensor,
        activations: AttentionActivations,
        dy: &Tensor,
        context: &BlockContext<'_>,
        needs_input_grad: bool,
    ) -> Option<Tensor> {
        let AttentionActivations { qk_raw, q, k, v, attention, qkv_hidden, o_hidden } = activations;
        let mask = context.mask(self.layer, DropoutSite::O, &attention.out);
        let mut grads = self.o_proj.backward_input([dy], mask, true);
        let heads = context.input(flatten_heads(&attention.out), self.layer, DropoutSite::O);
        self.o_proj.backward_weight(&heads, &o_hidden, [dy], &grads);
        let d_heads = self.split_heads(&grads.take_dx().expect("the input gradient was requested")); // [T, H, E]
        let [dq, dk, dv] =
            self.attention.backward(&d_heads, [&q, &k, &v], &attention, context.segments);
        drop((d_heads, heads, q, k, v, attention));
        let (mut dq, mut dk) =
            (context.rotary.rotate_backward(dq), context.rotary.rotate_backward(dk));
        if let (Some((q_norm, k_norm)), Some((q_raw, k_raw))) = (&self.qk_norm, &qk_raw) {
            dq = q_norm.backward(q_raw, dq, None);
            dk = k_norm.backward(k_raw, dk, None);
        }
        let [dq, dk, dv] = [dq, dk, dv].map(|grad| flatten_heads(&grad)); // [T, H · E or K · E]
        let d_qkv = [&dq, &dk, &dv];
        let needs_norm_grad = needs_input_grad || self.input_layernorm.weight.is_trained();
        let mask = context.mask(self.layer, DropoutSite::Qkv, x);
        let mut grads = self.qkv_proj.backward_input(d_qkv, mask, needs_norm_grad);
        let normed = self.input_layernorm.forward(x); // [T, D]
        let normed = context.input(normed, self.layer, DropoutSite::Qkv);
        self.qkv_proj.backward_weight(&normed, &qkv_hidden, d_qkv, &grads);
        let dx = self.input_layernorm.backward(x, grads.take_dx()?, Some(dy)); // [T, D]
        needs_input_grad.then_some(dx)
    }

    /// Reports whether any parameter of this half is trained.
    pub(super) fn is_trained(&self) -> bool {
        let qk_norms = self.qk_norm.iter().flat_map(|(q_norm, k_norm)| [q_norm, k_norm]);
        let mut norms = std::iter::once(&self.input_layernorm).chain(qk_norms);
        self.qkv_proj.is_trained()
            || self.o_proj.is_trained()
            || norms.any(|norm| norm.weight.is_trained())
    }

    fn split_heads(&self, x: &Tensor) -> Tensor {
        x.view([x.size()[0], -1, self.head_dim])
    }
}

/// Views `[T, heads, E]` as `[T, heads · E]`.
fn flatten_heads(x: &Tensor) -> Tensor {
    x.reshape([x.size()[0], -1])
}

#[cfg(test)]
impl AttentionActivations {
    /// Returns the saved tensors, without the hidden activations of adapters.
    pub(super) fn tensors(&self) -> Vec<&Tensor> {
        let Self { qk_raw, q, k, v, attention, qkv_hidden: _, o_hidden: _ } = self;
        let qk_raw = qk_raw.iter().flat_map(|(q, k)| [q, k]);
        let attention = std::iter::once(&attention.out).chain(attention.logsumexp());
        qk_raw.chain([q, k, v]).chain(attention).collect()
    }
}
