//! Several ranks train the same model as one rank, and all end when one is lost.
//!
//! `equality` runs ranks as threads of this process over real process groups; `processes` runs the
//! binary of the trainer and kills ranks.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]
#![allow(unreachable_pub, reason = "modules of a test binary share items by `pub`")]

mod equality;
#[path = "../engine/fixture.rs"]
#[expect(dead_code, reason = "shared with the engine's tests, which use all of it")]
mod fixture;
mod processes;
