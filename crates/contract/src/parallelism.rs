//! How a run is divided over processes.

use serde::{Deserialize, Serialize};

/// How many ranks train one model, and what each of them holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Parallelism {
    /// Processes that train together.
    pub world_size: u32,
    /// What is divided over them beside the sequences.
    pub strategy: Strategy,
    /// How many of them share a pod or machine; the first of them starts the others there.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub local_world_size: u32,
}

/// What is divided over the ranks beside the sequences of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Strategy {
    /// Nothing: there is one rank.
    None,
    /// Nothing else: every rank holds the whole model and state (distributed data parallel).
    Ddp,
    /// Masters and moments; weights and gradients are whole on every rank (ZeRO stage 1).
    Zero1,
    /// Masters, moments and gradients; weights are whole on every rank (ZeRO stage 2).
    Zero2,
    /// Parameters, gradients, masters and moments; a block is gathered while it is used (ZeRO
    /// stage 3, as in FSDP's full sharding).
    Zero3,
}

impl Parallelism {
    /// The most ranks of a run.
    pub const MAX_RANKS: u32 = 64;
    /// One process that holds everything.
    pub const SINGLE: Self = Self { world_size: 1, strategy: Strategy::None, local_world_size: 1 };

    /// Returns whether there is one process that holds everything.
    pub fn is_single(&self) -> bool {
        *self == Self::SINGLE
    }

    /// Returns how many pods or machines the ranks are on.
    pub fn places(&self) -> u32 {
        self.world_size.div_ceil(self.local_world_size.max(1))
    }
}

const fn one() -> u32 {
    1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for a reference")]
const fn is_one(number: &u32) -> bool {
    *number == 1
}

impl Default for Parallelism {
    fn default() -> Self {
        Self::SINGLE
    }
}
