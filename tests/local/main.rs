//! Whole runs from manifests, through the real command and the real trainer.
//!
//! Most run on a model of a few thousand parameters that the tests write themselves. Those that
//! need more (a bucket, a real model) say `SKIPPED` with what they miss, and fail when `CI=true`.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on has failed"
)]
#![allow(clippy::print_stderr, reason = "what is skipped is said")]
#![allow(unreachable_pub, reason = "modules of a test binary share items by `pub`")]

mod data_check;
mod inputs;
mod kills;
mod objects;
mod ranks;
mod real_model;
mod refusals;
mod runs;
mod sandbox;
#[path = "../support/tiny_model.rs"]
mod tiny_model;
mod upgrade;
