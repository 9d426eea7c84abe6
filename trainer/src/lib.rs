//! The trainer: one run configuration in, one published and proven result out.
//!
//! In the order data flows: [`store`] brings files here and takes results away, [`import`] turns a
//! GGUF file into a Hugging Face directory, [`extension`] adds tokens to a base model, [`inputs`] tells what is read apart, [`data`] turns rows into token sequences, [`preflight`]
//! checks all of it cheaply, [`launch`] starts the ranks of one machine and [`dist`] joins those of a
//! run, [`device`] is what they compute on, [`allocator`] keeps its memory, [`model`] is the network and its hand-written backward
//! pass, [`recipe`] is the story of a run, [`export`] writes what other software loads, [`verify`] proves it and
//! [`generate`] lets a person see it; [`data_check`] shows a person what of the rows is trained on.

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

/// Renders bytes as lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
