//! The engine against a simple reference with autograd.
//!
//! Every hand-written backward pass is compared with autograd through `reference`, for every option
//! of the architecture and every kind of
//! [`Trainable`](finetune_trainer::lora::trainable::Trainable).
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
#![allow(unreachable_pub, reason = "modules of a test binary share items by `pub`")]

mod fixture;
mod gradients;
mod invariance;
mod operators;
mod reference;
