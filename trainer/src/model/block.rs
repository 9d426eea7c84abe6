//! One block of the decoder: attention and feed-forward, each on a normalised residual stream.

use finetune_contract::Recompute;
use finetune_kernels::dropout::Noise;
use tch::Tensor;

use crate::{
    layers::{
        attention::{Attended, Attention, Segments},
        dropout::Dropout,
        linear::{Input, Low, Projections},
        norm::RmsNorm,
        rope::Rotary,
    },
    ops,
};

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
    /// Queries, keys and values: `q_proj`, `k_proj`, `v_proj`.
    pub qkv_proj: Projections<3>,
    /// Output of attention.
    pub o_proj: Projections<1>,
    /// Norms of queries and keys per head (Qwen3).
    pub qk_norm: Option<(RmsNorm, RmsNorm)>,
    /// Norm before the feed-forward layers.
    pub post_attention_layernorm: RmsNorm,
    /// The gate of SwiGLU and what is gated: `gate_proj`, `up_proj`.
    pub gate_up_proj: Projections<2>,
    /// Back to the model's width.
    pub down_proj: Projections<1>,
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
/// attention's result, the residual stream between the halves, gate and up, and what adapters' first
/// halves give. Norm outputs and the gated product are computed again: they cost less than the memory
/// traffic of keeping them.
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
    /// By [`Site`].
    low: [Low; 4],
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
        let Inner { qk_raw, q, k, v, attended, x_mid, gate, up, low } =
            inner.unwrap_or_else(|| self.compute(&x, around).1);

        let [low_qkv, low_o, low_gate_up, low_down] = &low;

        // Feed-forward half.
        let noise = self.noise(around, Site::Down, &gate);
        let mut passed = self.down_proj.pass_back([dy], noise, true);
        let d_product = passed.take_input_grad().expect("it was wanted"); // [T, F]
        let (product, d_gate, d_up) = ops::swiglu_backward(d_product, gate, up);
        let product = self.input(product, around, Site::Down);
        self.down_proj.add_gradients(&product, low_down, [dy], &passed);
        drop(product);
        let grads = [&d_gate, &d_up];
        let noise = self.noise(around, Site::GateUp, &x_mid);
        let mut passed = self.gate_up_proj.pass_back(grads, noise, true);
        let normed =
            self.input(self.post_attention_layernorm.forward(&x_mid), around, Site::GateUp);
        self.gate_up_proj.add_gradients(&normed, low_gate_up, grads, &passed);
        drop((normed, d_gate, d_up));
        let d_normed = passed.take_input_grad().expect("it was wanted"); // [T, D]
        let d_mid = self.post_attention_layernorm.backward(&x_mid, d_normed, Some(dy));

        // Attention half.
        let noise = self.noise(around, Site::O, &attended.out);
        let mut passed = self.o_proj.pass_back([&d_mid], noise, true);
        let heads = self.input(flatten_heads(&attended.out), around, Site::O);
        self.o_proj.add_gradients(&heads, low_o, [&d_mid], &passed);
        let d_heads = self.split_heads(&passed.take_input_grad().expect("it was wanted")); // [T, H, E]
        let [dq, dk, dv] =
            self.attention.backward(&d_heads, [&q, &k, &v], &attended, around.segments);
        drop((d_heads, heads, q, k, v, attended));
        let (mut dq, mut dk) = (around.rotary.rotate_back(dq), around.rotary.rotate_back(dk));
        if let (Some((q_norm, k_norm)), Some((q_raw, k_raw))) = (&self.qk_norm, &qk_raw) {
            dq = q_norm.backward(q_raw, dq, None);
            dk = k_norm.backward(k_raw, dk, None);
        }
        let [dq, dk, dv] = [dq, dk, dv].map(|grad| flatten_heads(&grad));
        let grads = [&dq, &dk, &dv];
        let wants_norm_grad = wants_input_grad || self.input_layernorm.weight.is_trained();
        let noise = self.noise(around, Site::Qkv, &x);
        let mut passed = self.qkv_proj.pass_back(grads, noise, wants_norm_grad);
        let normed = self.input(self.input_layernorm.forward(&x), around, Site::Qkv);
        self.qkv_proj.add_gradients(&normed, low_qkv, grads, &passed);
        let dx = self.input_layernorm.backward(&x, passed.take_input_grad()?, Some(&d_mid));
        wants_input_grad.then_some(dx)
    }

    /// Tells whether anything in the block is trained.
    pub fn is_trained(&self) -> bool {
        let qk_norms = self.qk_norm.iter().flat_map(|(q_norm, k_norm)| [q_norm, k_norm]);
        let mut norms =
            [&self.input_layernorm, &self.post_attention_layernorm].into_iter().chain(qk_norms);
        self.qkv_proj.is_trained()
            || self.o_proj.is_trained()
            || self.gate_up_proj.is_trained()
            || self.down_proj.is_trained()
            || norms.any(|norm| norm.weight.is_trained())
    }

    fn compute(&self, x: &Tensor, around: &Surroundings<'_>) -> (Tensor, Inner) {
        let normed = self.input(self.input_layernorm.forward(x), around, Site::Qkv);
        let (qkv, low_qkv) = self.qkv_proj.forward(&normed);
        drop(normed);
        let [mut q, mut k, v] = qkv.each_ref().map(|x| self.split_heads(x)); // [T, H or K, E]
        drop(qkv);
        let mut qk_raw = None;
        if let Some((q_norm, k_norm)) = &self.qk_norm {
            let normed = (q_norm.forward(&q), k_norm.forward(&k));
            qk_raw = Some((q, k));
            (q, k) = normed;
        }
        let (q, k) = (around.rotary.rotate(q), around.rotary.rotate(k));
        let attended = self.attention.forward(&q, &k, &v, around.segments);
        let heads = self.input(flatten_heads(&attended.out), around, Site::O);
        let ([o], low_o) = self.o_proj.forward(&heads);
        let x_mid = o + x; // [T, D]
        drop(heads);

        let normed =
            self.input(self.post_attention_layernorm.forward(&x_mid), around, Site::GateUp);
        let ([gate, up], low_gate_up) = self.gate_up_proj.forward(&normed); // [T, F] each
        drop(normed);
        let product = self.input(ops::swiglu(&gate, &up), around, Site::Down);
        let ([down], low_down) = self.down_proj.forward(&product);
        let y = down + &x_mid; // [T, D]
        let low = [low_qkv, low_o, low_gate_up, low_down];
        (y, Inner { qk_raw, q, k, v, attended, x_mid, gate, up, low })
    }

    /// Returns the noise on an input that is as wide as `like`, `[T, …]`.
    fn noise(&self, around: &Surroundings<'_>, site: Site, like: &Tensor) -> Option<Noise> {
        let dropout = around.dropout?;
        let width = like.numel() / like.size()[0] as usize;
        Some(dropout.noise(self.layer * 4 + site as u64, width))
    }

    fn input(&self, x: Tensor, around: &Surroundings<'_>, site: Site) -> Input {
        let noise = self.noise(around, site, &x);
        Input::new(x, noise)
    }

    fn split_heads(&self, x: &Tensor) -> Tensor {
        x.view([x.size()[0], -1, self.head_dim])
    }
}

/// Views `[T, heads, E]` as `[T, heads · E]`.
fn flatten_heads(x: &Tensor) -> Tensor {
    x.reshape([x.size()[0], -1])
}
