//! The engine against transformers, PEFT and torch: `data/` holds their results, written by
//! `gen.py`.
//!
//! Everything here is fp32 on the CPU. Two tensors are compared by the largest absolute difference
//! over the largest absolute value of the reference ([`golden::distance`]).
#![expect(clippy::unwrap_used, clippy::panic, reason = "test helpers may panic like tests")]

mod adapters;
mod engine;
mod exports;
mod full;
mod golden;
mod templates;
