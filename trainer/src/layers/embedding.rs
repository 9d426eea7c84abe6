//! The token embedding, frozen or trained, with or without a LoRA adapter.

use tch::{Kind, Tensor};

use crate::params::flat::Param;

/// A row of `weight` per token, plus `scaling · B A[:, token]`.
///
/// # Source
/// `peft/tuners/lora/layer.py: Embedding`, 0.21.2; there is no dropout on this path.
#[derive(Debug)]
pub struct Embedding {
    /// `[V, D]`.
    pub weight: Param,
    /// The adapter, if it has one.
    pub adapter: Option<EmbeddingAdapter>,
}

/// A low-rank update of the embedding.
#[derive(Debug)]
pub struct EmbeddingAdapter {
    /// `lora_embedding_A`, `[R, V]`.
    pub lora_a: Param,
    /// `lora_embedding_B`, `[D, R]`.
    pub lora_b: Param,
    /// The factor on the product.
    pub scaling: f64,
}

impl Embedding {
    /// Embeds tokens `[T]`; the result is `[T, D]`.
    pub fn forward(&self, tokens: &Tensor) -> Tensor {
        let mut x = self.weight.value().index_select(0, tokens);
        if let Some(adapter) = &self.adapter {
            let hidden = adapter.lora_a.value().index_select(1, tokens).tr() * adapter.scaling; // [T, R]
            let _ = x.addmm_(&hidden, &adapter.lora_b.value().tr());
        }
        x
    }

    /// Adds the gradients of trained parameters; `dy` is `[T, D]`.
    pub fn backward(&self, tokens: &Tensor, dy: &Tensor) {
        if let Some(grad) = &self.weight.grad {
            let _ = grad.sum().shallow_clone().index_add_(0, tokens, &dy.to_kind(Kind::Float));
        }
        let Some(adapter) = &self.adapter else { return };
        let hidden = adapter.lora_a.value().index_select(1, tokens) * adapter.scaling; // [R, T]
        if let Some(grad) = &adapter.lora_b.grad {
            let _ = grad.sum().shallow_clone().g_add_(&dy.tr().mm(&hidden.tr())); // [D, R]
        }
        if let Some(grad) = &adapter.lora_a.grad {
            let d_a = dy.mm(adapter.lora_b.value()) * adapter.scaling; // [T, R]
            let _ =
                grad.sum().shallow_clone().index_add_(1, tokens, &d_a.to_kind(Kind::Float).tr());
        }
    }

    /// Reports whether any parameter of the layer is trained.
    pub fn is_trained(&self) -> bool {
        self.adapter.is_some() || self.weight.is_trained()
    }
}
