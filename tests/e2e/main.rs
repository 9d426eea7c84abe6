//! Whole runs from manifests, through the real command and the real trainer.
//!
//! Most run on a model of a few thousand parameters that the tests write themselves. Those that
//! need more (a bucket, a real model) say `SKIPPED` with what they miss, and fail when `CI=true`.
#![allow(missing_docs, clippy::unwrap_used, clippy::print_stderr, reason = "a test")]

mod bench;
mod kills;
mod model;
mod objects;
mod real_model;
mod refusals;
mod runs;
