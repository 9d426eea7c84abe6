//! One block of the decoder: attention and feed-forward, each on a normalised residual stream.

use finetune_contract::Recompute;
use finetune_kernels::dropout::DropoutMask;
use tch::Tensor;

use crate::{
    layers::{
        attention::{Attention, AttentionOutput, Segments},
        dropout::Dropout,
        linear::{Input, LoraHidden, Projections},
        norm::RmsNorm,
        rope::Rotary,
    },
    ops,
};

/// `x + attention(norm(x))`, then `x + feed_forward(norm(x))`.
#[derive(Debug)]
pub struct Block {
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
    /// Output of attention.
    pub o_proj: Projections<1>,
    /// Norms of queries and keys per head (Qwen3).
    pub qk_norm: Option<(RmsNorm, RmsNorm)>,
    /// Norm before the feed-forward layers.
    pub post_attention_layernorm: RmsNorm,
    /// The two inputs of SwiGLU: `gate_proj`, `up_proj`.
    pub gate_up_proj: Projections<2>,
    /// From the feed-forward width back to the model width.
    pub down_proj: Projections<1>,
}

/// What every block needs to know of a micro-batch.
pub struct BlockContext<'a> {
    /// The rotation of each token's position.
    pub rotary: &'a Rotary,
    /// The segments, inside which tokens attend.
    pub segments: &'a Segments,
    /// Dropout on the adapters' inputs while training.
    pub dropout: Option<&'a Dropout>,
}

/// The activations that a block saves for its backward pass.
///
/// With activation checkpointing this is only its input; without, also the activations inside it.
pub struct SavedActivations {
    /// The block's input, `[T, D]`.
    x: Tensor,
    intermediates: Option<Intermediates>,
}

/// The activations inside a block that its backward pass needs.
///
/// Norm outputs and the gated product are not among them: recomputing them costs less than the
/// memory traffic of saving them.
struct Intermediates {
    /// Queries and keys before their norms, `[T, H or K, E]`, with `qk_norm`.
    qk_raw: Option<(Tensor, Tensor)>,
    /// `[T, H, E]`, rotated.
    q: Tensor,
    /// `[T, K, E]`, rotated.
    k: Tensor,
    /// `[T, K, E]`.
    v: Tensor,
    attention: AttentionOutput,
    /// The residual stream between the halves, `[T, D]`.
    x_mid: Tensor,
    /// `[T, F]`.
    gate: Tensor,
    /// `[T, F]`.
    up: Tensor,
    /// The hidden activations of adapters, by [`DropoutSite`].
    lora_hidden: [LoraHidden; 4],
}

/// The inputs of linear layers in a block, as numbers of dropout sites.
#[derive(Clone, Copy)]
enum DropoutSite {
    Qkv,
    O,
    GateUp,
    Down,
}

impl Block {
    /// Computes the block, and saves the activations that `recompute` asks for; with `None`, for
    /// evaluation, none.
    ///
    /// # Shapes
    /// `x` and the result are `[T, D]`.
    pub fn forward(
        &self,
        x: Tensor,
        context: &BlockContext<'_>,
        recompute: Option<Recompute>,
    ) -> (Tensor, Option<SavedActivations>) {
        let (y, intermediates) = self.compute(&x, context);
        let saved = recompute.map(|recompute| SavedActivations {
            x,
            intermediates: match recompute {
                Recompute::None => Some(intermediates),
                Recompute::Block => None,
            },
        });
        (y, saved)
    }

    /// Adds the gradients of trained parameters; returns the gradient of the input if it is needed.
    ///
    /// # Shapes
    /// `dy` and the result are `[T, D]`.
    pub fn backward(
        &self,
        saved: SavedActivations,
        dy: &Tensor,
        context: &BlockContext<'_>,
        needs_input_grad: bool,
    ) -> Option<Tensor> {
        let SavedActivations { x, intermediates } = saved;
        let Intermediates { qk_raw, q, k, v, attention, x_mid, gate, up, lora_hidden } =
            intermediates.unwrap_or_else(|| self.compute(&x, context).1);
        let [qkv_hidden, o_hidden, gate_up_hidden, down_hidden] = &lora_hidden;

        // Feed-forward half.
        let mask = self.mask(context, DropoutSite::Down, &gate);
        let mut grads = self.down_proj.backward_input([dy], mask, true);
        let d_product = grads.take_dx().expect("the input gradient was requested"); // [T, F]
        let (product, d_gate, d_up) = ops::swiglu_backward(d_product, gate, up); // [T, F] each
        let product = self.input(product, context, DropoutSite::Down);
        self.down_proj.backward_weight(&product, down_hidden, [dy], &grads);
        drop(product);
        let d_gate_up = [&d_gate, &d_up];
        let mask = self.mask(context, DropoutSite::GateUp, &x_mid);
        let mut grads = self.gate_up_proj.backward_input(d_gate_up, mask, true);
        let normed = self.post_attention_layernorm.forward(&x_mid); // [T, D]
        let normed = self.input(normed, context, DropoutSite::GateUp);
        self.gate_up_proj.backward_weight(&normed, gate_up_hidden, d_gate_up, &grads);
        drop((normed, d_gate, d_up));
        let d_normed = grads.take_dx().expect("the input gradient was requested"); // [T, D]
        let d_mid = self.post_attention_layernorm.backward(&x_mid, d_normed, Some(dy)); // [T, D]

        // Attention half.
        let mask = self.mask(context, DropoutSite::O, &attention.out);
        let mut grads = self.o_proj.backward_input([&d_mid], mask, true);
        let heads = self.input(flatten_heads(&attention.out), context, DropoutSite::O);
        self.o_proj.backward_weight(&heads, o_hidden, [&d_mid], &grads);
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
        let mask = self.mask(context, DropoutSite::Qkv, &x);
        let mut grads = self.qkv_proj.backward_input(d_qkv, mask, needs_norm_grad);
        let normed = self.input(self.input_layernorm.forward(&x), context, DropoutSite::Qkv);
        self.qkv_proj.backward_weight(&normed, qkv_hidden, d_qkv, &grads);
        let dx = self.input_layernorm.backward(&x, grads.take_dx()?, Some(&d_mid)); // [T, D]
        needs_input_grad.then_some(dx)
    }

    /// Reports whether any parameter of the block is trained.
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

    fn compute(&self, x: &Tensor, context: &BlockContext<'_>) -> (Tensor, Intermediates) {
        let normed = self.input(self.input_layernorm.forward(x), context, DropoutSite::Qkv);
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
        let heads = self.input(flatten_heads(&attention.out), context, DropoutSite::O);
        let ([o], o_hidden) = self.o_proj.forward(&heads);
        let x_mid = o + x; // [T, D]
        drop(heads);

        let normed = self.post_attention_layernorm.forward(&x_mid); // [T, D]
        let normed = self.input(normed, context, DropoutSite::GateUp);
        let ([gate, up], gate_up_hidden) = self.gate_up_proj.forward(&normed); // [T, F] each
        drop(normed);
        let product = self.input(ops::swiglu(&gate, &up), context, DropoutSite::Down);
        let ([down], down_hidden) = self.down_proj.forward(&product);
        let y = down + &x_mid; // [T, D]
        let lora_hidden = [qkv_hidden, o_hidden, gate_up_hidden, down_hidden];
        (y, Intermediates { qk_raw, q, k, v, attention, x_mid, gate, up, lora_hidden })
    }

    /// Returns the dropout mask of an input that is as wide as `like`, `[T, …]`.
    fn mask(
        &self,
        context: &BlockContext<'_>,
        site: DropoutSite,
        like: &Tensor,
    ) -> Option<DropoutMask> {
        let dropout = context.dropout?;
        let width = like.numel() / like.size()[0] as usize;
        Some(dropout.mask(self.layer * 4 + site as u64, width))
    }

    fn input(&self, x: Tensor, context: &BlockContext<'_>, site: DropoutSite) -> Input {
        let mask = self.mask(context, site, &x);
        Input::new(x, mask)
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
mod tests {
    use std::path::Path;

    use finetune_contract::{Dtype, Recompute};
    use tch::{Device, Tensor};

    use super::{BlockContext, SavedActivations};
    use crate::{
        hf::read_config,
        layers::attention::Segments,
        lora::trainable::Trainable,
        model::{Model, network::kind_of},
        runtime::rng::RngKey,
    };

    /// Returns the bytes of what a block saved, without the hidden activations of adapters.
    fn bytes(saved: &SavedActivations) -> u64 {
        let SavedActivations { x, intermediates } = saved;
        let size = |tensor: &Tensor| (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64;
        let inner = intermediates.as_ref().map_or(0, |inner| {
            let raw = inner.qk_raw.iter().flat_map(|(q, k)| [q, k]);
            let attention =
                std::iter::once(&inner.attention.out).chain(inner.attention.logsumexp());
            let rest = [&inner.q, &inner.k, &inner.v, &inner.x_mid, &inner.gate, &inner.up];
            raw.chain(attention).chain(rest).map(size).sum()
        });
        size(x) + inner
    }

    /// Compares what the blocks of a model save with what its architecture declares.
    fn check(family: &str, dtype: Dtype) {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/data");
        let directory = golden.join(family);
        let config = read_config(&directory).unwrap();
        let cost = config.cost();
        let width = config.hidden_size as i64;
        let model = Model::load(
            &directory,
            config,
            Trainable::Full,
            dtype,
            Device::Cpu,
            RngKey::from_seed(0),
        )
        .unwrap();
        let lengths = [32, 8];
        let positions: Vec<i64> = lengths.iter().flat_map(|&length| 0..length as i64).collect();
        let context = BlockContext {
            rotary: &model.rotary(&positions),
            segments: &Segments::new(&lengths),
            dropout: None,
        };
        let tokens = positions.len() as i64;
        for recompute in [Recompute::None, Recompute::Block] {
            let x = || Tensor::randn([tokens, width], (kind_of(dtype), Device::Cpu));
            let saved = model.blocks().iter().map(|block| {
                let (_, saved) = block.forward(x(), &context, Some(recompute));
                bytes(&saved.unwrap())
            });
            let declared = match recompute {
                Recompute::None => dtype.bytes() * cost.saved_elements + cost.saved_bytes,
                Recompute::Block => dtype.bytes() * cost.checkpointed_elements,
            };
            let expected = tokens as u64 * declared;
            assert_eq!(saved.sum::<u64>(), expected, "{family} {dtype:?} {recompute:?}");
        }
    }

    #[test]
    fn blocks_save_what_their_architecture_declares() {
        for family in ["llama", "llama-biases", "mistral-window", "qwen2-window", "qwen3"] {
            for dtype in [Dtype::Fp32, Dtype::Bf16] {
                check(family, dtype);
            }
        }
    }
}
