//! Merges an adapter into its base model: in fp32, rounded once, and untied where necessary.
//!
//! In a tied model the head and the embedding share one tensor. An adapter on one of them, merged into
//! that tensor, would change the other as well. Differs: PEFT does that; here the merged model gets a
//! separate head.

use tch::{Kind, Tensor};

use crate::{
    architecture::names,
    export::Error,
    hf::weights::WeightFiles,
    lora::trainable::{LoraAdapters, Trainable, adapter_names},
    model::{Model, master::Masters},
};

/// Returns a weight of the result in fp32: as trained, with its adapter merged, or as in the base
/// model.
///
/// # Errors
/// [`Error`] if the weight of the base model cannot be read or another rank is lost.
pub fn merged(masters: &mut Masters<'_>, base: &WeightFiles, name: &str) -> Result<Tensor, Error> {
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
    // B A has the shape of a linear weight, [out, in], but is the transpose of an embedding, [V, D].
    let update = b.mm(&a) * *scaling;
    Ok(stored + if path == names::EMBED_TOKENS { update.tr() } else { update })
}

/// Returns whether the result needs a separate head although the base model is tied.
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
