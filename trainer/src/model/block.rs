//! One block of the decoder: attention and feed-forward, each on a normalised residual stream.

use finetune_contract::Recompute;
use tch::Tensor;

use super::{
    attention::{Attended, Attention, Segments},
    dropout::Dropout,
    linear::{Input, InputGrad, Linear},
    norm::RmsNorm,
    rope::Rotary,
};
use crate::ops;

/// `x + attention(norm(x))`, then `x + feed_forward(norm(x))`.
#[derive(Debug)]
pub struct Block {
    /// Its place, from 0; part of the dropout's counter.
    pub layer: u64,
    /// Width of one head, `E`.
    pub head_dim: i64,
    /// Grouping and window.
    pub attention: Attention,
    /// Norm before attention.
    pub input_layernorm: RmsNorm,
    /// Queries.
    pub q_proj: Linear,
    /// Keys.
    pub k_proj: Linear,
    /// Values.
    pub v_proj: Linear,
    /// Output of attention.
    pub o_proj: Linear,
    /// Norms of queries and keys per head (Qwen3).
    pub qk_norm: Option<(RmsNorm, RmsNorm)>,
    /// Norm before the feed-forward layers.
    pub post_attention_layernorm: RmsNorm,
    /// The gate of SwiGLU.
    pub gate_proj: Linear,
    /// What is gated.
    pub up_proj: Linear,
    /// Back to the model's width.
    pub down_proj: Linear,
}

/// What one micro-batch means to every block.
pub struct Surroundings<'a> {
    /// Angles of each token's position.
    pub rotary: &'a Rotary,
    /// Who sees whom.
    pub segments: &'a Segments,
    /// Noise on adapters' inputs while training.
    pub dropout: Option<&'a Dropout>,
}

/// What a block keeps for its backward pass.
///
/// Always its input. Unless it is recomputed, also queries, keys and values as attention saw them,
/// attention's result, the residual stream between the halves, gate and up. Norm outputs and the
/// gated product are computed again: they cost less than the memory traffic of keeping them.
pub struct Kept {
    x: Tensor,
    inner: Option<Inner>,
}

struct Inner {
    /// Queries and keys before their norms, where there are any.
    qk_raw: Option<(Tensor, Tensor)>,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attended: Attended,
    x_mid: Tensor,
    gate: Tensor,
    up: Tensor,
}

/// The four inputs of linear layers in a block, as numbers for the dropout's counter.
#[derive(Clone, Copy)]
enum Site {
    Qkv,
    O,
    GateUp,
    Down,
}

impl Block {
    /// Computes the block and keeps what `recompute` says; `None` keeps nothing (evaluation).
    ///
    /// # Shapes
    /// `x` and the result are `[T, D]`.
    pub fn forward(
        &self,
        x: Tensor,
        around: &Surroundings<'_>,
        recompute: Option<Recompute>,
    ) -> (Tensor, Option<Kept>) {
        let (y, inner) = self.compute(&x, around);
        let kept = recompute.map(|recompute| Kept {
            x,
            inner: match recompute {
                Recompute::None => Some(inner),
                Recompute::Block => None,
            },
        });
        (y, kept)
    }

    /// Adds the gradients of trained parameters; returns that of the input where it is wanted.
    ///
    /// # Shapes
    /// `dy` and the result are `[T, D]`.
    pub fn backward(
        &self,
        kept: Kept,
        dy: &Tensor,
        around: &Surroundings<'_>,
        wants_input_grad: bool,
    ) -> Option<Tensor> {
        let Kept { x, inner } = kept;
        let Inner { qk_raw, q, k, v, attended, x_mid, gate, up } =
            inner.unwrap_or_else(|| self.compute(&x, around).1);

        // Feed-forward half.
        let product = self.input(ops::swiglu(&gate, &up), around, Site::Down);
        let mut d_product = InputGrad::default();
        self.down_proj.backward(&product, dy, Some(&mut d_product));
        let d_product = d_product.finish(&product); // [T, F]
        drop(product);
        let (d_gate, d_up) = ops::swiglu_backward(&d_product, gate, up);
        drop(d_product);
        let normed =
            self.input(self.post_attention_layernorm.forward(&x_mid), around, Site::GateUp);
        let mut d_normed = InputGrad::default();
        self.gate_proj.backward(&normed, &d_gate, Some(&mut d_normed));
        drop(d_gate);
        self.up_proj.backward(&normed, &d_up, Some(&mut d_normed));
        drop(d_up);
        let d_normed = d_normed.finish(&normed); // [T, D]
        let d_mid = self.post_attention_layernorm.backward(&x_mid, d_normed, Some(dy));

        // Attention half.
        let heads = self.input(flatten_heads(&attended.out), around, Site::O);
        let mut d_heads = InputGrad::default();
        self.o_proj.backward(&heads, &d_mid, Some(&mut d_heads));
        let d_heads = self.split_heads(&d_heads.finish(&heads)); // [T, H, E]
        let [dq, dk, dv] =
            self.attention.backward(&d_heads, [&q, &k, &v], &attended, around.segments);
        let (mut dq, mut dk) = (around.rotary.rotate_back(dq), around.rotary.rotate_back(dk));
        if let (Some((q_norm, k_norm)), Some((q_raw, k_raw))) = (&self.qk_norm, &qk_raw) {
            dq = q_norm.backward(q_raw, dq, None);
            dk = k_norm.backward(k_raw, dk, None);
        }
        let normed = self.input(self.input_layernorm.forward(&x), around, Site::Qkv);
        let wants_norm_grad = wants_input_grad || self.input_layernorm.weight.is_trained();
        let mut d_normed = wants_norm_grad.then(InputGrad::default);
        for (layer, grad) in [(&self.q_proj, dq), (&self.k_proj, dk), (&self.v_proj, dv)] {
            layer.backward(&normed, &flatten_heads(&grad), d_normed.as_mut());
        }
        let d_normed = d_normed?.finish(&normed);
        let dx = self.input_layernorm.backward(&x, d_normed, Some(&d_mid));
        wants_input_grad.then_some(dx)
    }

    /// Tells whether anything in the block is trained.
    pub fn is_trained(&self) -> bool {
        let linears = [
            &self.q_proj,
            &self.k_proj,
            &self.v_proj,
            &self.o_proj,
            &self.gate_proj,
            &self.up_proj,
            &self.down_proj,
        ];
        let qk_norms = self.qk_norm.iter().flat_map(|(q_norm, k_norm)| [q_norm, k_norm]);
        linears.into_iter().any(Linear::is_trained)
            || [&self.input_layernorm, &self.post_attention_layernorm]
                .into_iter()
                .chain(qk_norms)
                .any(|norm| norm.weight.is_trained())
    }

    fn compute(&self, x: &Tensor, around: &Surroundings<'_>) -> (Tensor, Inner) {
        let normed = self.input(self.input_layernorm.forward(x), around, Site::Qkv);
        let mut q = self.split_heads(&self.q_proj.forward(&normed)); // [T, H, E]
        let mut k = self.split_heads(&self.k_proj.forward(&normed)); // [T, K, E]
        let v = self.split_heads(&self.v_proj.forward(&normed)); // [T, K, E]
        drop(normed);
        let mut qk_raw = None;
        if let Some((q_norm, k_norm)) = &self.qk_norm {
            let normed = (q_norm.forward(&q), k_norm.forward(&k));
            qk_raw = Some((q, k));
            (q, k) = normed;
        }
        let (q, k) = (around.rotary.rotate(q), around.rotary.rotate(k));
        let attended = self.attention.forward(&q, &k, &v, around.segments);
        let heads = self.input(flatten_heads(&attended.out), around, Site::O);
        let x_mid = self.o_proj.forward(&heads) + x; // [T, D]
        drop(heads);

        let normed =
            self.input(self.post_attention_layernorm.forward(&x_mid), around, Site::GateUp);
        let gate = self.gate_proj.forward(&normed); // [T, F]
        let up = self.up_proj.forward(&normed); // [T, F]
        drop(normed);
        let product = self.input(ops::swiglu(&gate, &up), around, Site::Down);
        let y = self.down_proj.forward(&product) + &x_mid; // [T, D]
        (y, Inner { qk_raw, q, k, v, attended, x_mid, gate, up })
    }

    fn input(&self, x: Tensor, around: &Surroundings<'_>, site: Site) -> Input {
        Input::new(x, around.dropout, self.layer * 4 + site as u64)
    }

    fn split_heads(&self, x: &Tensor) -> Tensor {
        x.view([x.size()[0], -1, self.head_dim])
    }
}

/// Views `[T, heads, E]` as `[T, heads · E]`.
fn flatten_heads(x: &Tensor) -> Tensor {
    x.reshape([x.size()[0], -1])
}
