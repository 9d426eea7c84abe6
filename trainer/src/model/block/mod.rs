//! One block of the decoder: attention and feed-forward, each on a normalised residual stream.

pub mod feed_forward;
pub mod self_attention;

use finetune_contract::Recompute;
use finetune_kernels::dropout::DropoutMask;
use tch::Tensor;

use self::{
    feed_forward::{FeedForward, FeedForwardActivations},
    self_attention::{AttentionActivations, SelfAttention},
};
use crate::layers::{attention::Segments, dropout::Dropout, linear::Input, rope::Rotary};

/// The attention half, then the feed-forward half.
#[derive(Debug)]
pub struct Block {
    /// The attention half, `self_attn` with its norm.
    pub self_attention: SelfAttention,
    /// The feed-forward half, `mlp` with its norm.
    pub feed_forward: FeedForward,
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
struct Intermediates {
    self_attention: AttentionActivations,
    /// The residual stream between the halves, `[T, D]`.
    x_mid: Tensor,
    feed_forward: FeedForwardActivations,
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
        let Intermediates { self_attention, x_mid, feed_forward } =
            intermediates.unwrap_or_else(|| self.compute(&x, context).1);
        let d_mid = self.feed_forward.backward(&x_mid, feed_forward, dy, context); // [T, D]
        self.self_attention.backward(&x, self_attention, &d_mid, context, needs_input_grad)
    }

    /// Reports whether any parameter of the block is trained.
    pub fn is_trained(&self) -> bool {
        self.self_attention.is_trained() || self.feed_forward.is_trained()
    }

    fn compute(&self, x: &Tensor, context: &BlockContext<'_>) -> (Tensor, Intermediates) {
        let (x_mid, self_attention) = self.self_attention.forward(x, context); // [T, D]
        let (y, feed_forward) = self.feed_forward.forward(&x_mid, context); // [T, D]
        (y, Intermediates { self_attention, x_mid, feed_forward })
    }
}

impl BlockContext<'_> {
    /// Wraps the input `[T, …]` of linear layers, with its dropout.
    fn input(&self, x: Tensor, layer: u64, site: DropoutSite) -> Input {
        let mask = self.mask(layer, site, &x);
        Input::new(x, mask)
    }

    /// Returns the dropout mask of an input that is as wide as `like`, `[T, …]`.
    fn mask(&self, layer: u64, site: DropoutSite, like: &Tensor) -> Option<DropoutMask> {
        let dropout = self.dropout?;
        let width = like.numel() / like.size()[0] as usize;
        Some(dropout.mask(layer * 4 + site as u64, width))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use finetune_contract::{Dtype, Recompute};
    use tch::{Device, Tensor};

    use super::{BlockContext, Intermediates, SavedActivations};
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
            let Intermediates { self_attention, x_mid, feed_forward } = inner;
            let halves = self_attention.tensors().into_iter().chain(feed_forward.tensors());
            halves.chain([x_mid]).map(size).sum()
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
