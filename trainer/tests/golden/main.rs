//! The engine against transformers, PEFT and torch: `data/` holds what they computed, `gen.py` how.
//!
//! Everything here is fp32 on the CPU. Two tensors are compared by the largest absolute difference
//! over the largest absolute value of the reference ([`golden::distance`]).
#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests may fail like tests")]

mod adapters;
mod engine;
mod exports;
mod full;
mod golden;
mod templates;
