//! The network: a Llama-like decoder whose blocks carry hand-written backward passes.
//!
//! Letters in shapes, everywhere in this module: `T` tokens of a micro-batch, flat, without
//! padding; `D` model width, `H` query heads, `K` key/value heads, `E` head width, `F` feed-forward
//! width, `V` vocabulary, `R` LoRA rank.
//!
//! Parameters are addressed by checkpoint name only (`model.layers.3.self_attn.q_proj.weight`).

pub mod config;
pub mod header;
pub mod names;
pub mod weights;
