//! Fixtures of the operator's tests.

mod invariants;
mod world;

pub(crate) use world::World;
