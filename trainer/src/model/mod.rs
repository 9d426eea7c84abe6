//! The network: a Llama-like decoder whose blocks carry hand-written backward passes.
//!
//! Letters in shapes, everywhere in this crate: `T` tokens of a micro-batch, flat, with padding at
//! the end only; `N` target tokens; `D` model width, `H` query heads, `K` key/value heads, `E` head
//! width, `F` feed-forward width, `V` vocabulary, `R` LoRA rank.
//!
//! Parameters are addressed by checkpoint name only (`model.layers.3.self_attn.q_proj.weight`).
//! No tensor here records a graph: each layer's `backward` is written out beside its `forward` and
//! tested against autograd in `tests/`.

pub mod adapter;
pub mod block;
mod load;
pub mod master;
mod micro_batch;
pub mod network;

pub use network::{DataParallel, Model};
