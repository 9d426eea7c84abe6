//! Several ranks train what one does: the same losses, the same weights, and they end together.
//!
//! `equality` runs ranks as threads of this process, over real process groups; `processes` runs the
//! trainer's binary, and kills it.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]
#![allow(unreachable_pub, reason = "modules of a test binary share items by `pub`")]

mod equality;
#[path = "../engine/fixture.rs"]
#[expect(dead_code, reason = "shared with the engine's tests, which use all of it")]
mod fixture;
mod processes;
