//! The trainer: takes one run configuration, and publishes and verifies one result.
//!
//! - [`commands`] has the subcommands of the binary; [`recipe`] is one training run, top to bottom,
//!   and [`train`] its loop.
//! - Inputs: [`store`] reads and writes buckets, hubs and directories, [`hf`] and [`gguf`] read model
//!   files, [`data`] turns rows into token sequences, [`inputs`] computes digests of everything that is
//!   read, [`preflight`] checks all of it before any training.
//! - The model: [`architecture`] parses `config.json`, [`model`] is the network with its hand-written
//!   backward pass, built from [`layers`] and [`ops`]; [`lora`] resolves adapters, [`objective`]
//!   computes the loss, [`params`] lays out the trained parameters and [`optim`] updates them.
//! - The process: [`runtime`] has device, memory, clock and random numbers, [`distributed`] connects
//!   the ranks, [`checkpoint`] saves and restores training, [`metrics`] reports progress.
//! - Results: [`export`] writes files that other software loads, [`verification`] verifies them after
//!   publication.

pub mod architecture;
pub mod checkpoint;
pub mod commands;
pub mod context;
pub mod data;
pub mod distributed;
pub mod export;
pub mod failure;
pub mod gguf;
pub mod hf;
pub mod inputs;
pub mod layers;
pub mod lora;
pub mod metrics;
pub mod model;
pub mod objective;
pub mod ops;
pub mod optim;
pub mod params;
pub mod preflight;
pub mod recipe;
pub mod runtime;
pub mod store;
pub mod train;
pub mod verification;

/// Formats bytes as lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
