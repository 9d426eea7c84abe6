//! Merging an adapter into its base model: in fp32, rounded once, untied where it must be.
//!
//! On a model whose head is its embedding, an adapter on either changes one of two things that
//! share one tensor. Merged into it, the change would leak into the other; PEFT does that. Here the
//! merged model gets a head of its own.

use tch::{Kind, Tensor};

use crate::{
    architecture::names,
    export::Error,
    hf::weights::Checkpoint,
    lora::trainable::{LoraAdapters, Trainable, adapter_names},
    model::{Model, master::Masters},
};

/// Returns a weight of the result, in fp32: as trained, with its adapter merged, or as it was.
///
/// # Errors
/// [`Error`] if the base model's weight cannot be read or another rank is lost.
pub fn merged(masters: &mut Masters<'_>, base: &Checkpoint, name: &str) -> Result<Tensor, Error> {
    let model = masters.model();
    if let Some(master) = masters.get(name)? {
        return Ok(master);
    }
    let is_tied_head = name == head() && !base.contains(name);
    let stored = base.tensor(if is_tied_head { embedding() } else { name }).map_err(Error::Base)?;
    let stored = stored.to_kind(Kind::Float);
    let Trainable::Lora(LoraAdapters { scaling, targets, .. }) = model.trainable() else {
        return Ok(stored);
    };
    let path = name.strip_suffix(".weight").filter(|path| targets.contains_key(*path));
    let Some(path) = path else { return Ok(stored) };
    let [a, b] = adapter_names(path).map(|name| model.trained().master_of(&name));
    let (Some(a), Some(b)) = (a, b) else { return Ok(stored) };
    // A linear layer is [out, in] and so is B A; an embedding is [V, D], B A its transpose.
    let update = b.mm(&a) * *scaling;
    Ok(stored + if path == names::EMBED_TOKENS { update.tr() } else { update })
}

/// Tells whether the result's head must be a tensor of its own though the base model's is not.
pub(super) fn unties(model: &Model) -> bool {
    let is_tied = model.config().tie_word_embeddings;
    is_tied && matches!(model.trainable(), Trainable::Lora(lora) if lora.unties_embeddings())
}

fn head() -> String {
    format!("{}.weight", names::LM_HEAD)
}

const fn embedding() -> &'static str {
    "model.embed_tokens.weight"
}
