//! Decisions about a job's life, in a [`crate::operator::job::testing::World`] that carries them out.

mod again;
mod attempts;
mod life;
mod memory;
mod preflight;
mod ranks;
mod upgrade;
