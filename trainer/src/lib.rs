//! The trainer: one run configuration in, one published and proven result out.
//!
//! In the order data flows: [`store`] brings files here and takes results away, [`import`] turns a
//! GGUF file into a Hugging Face directory, [`extension`] adds tokens to a base model, [`inputs`] tells what is read apart, [`data`] turns rows into token sequences, [`preflight`]
//! checks all of it cheaply, [`launch`] starts the ranks of one machine and [`dist`] joins those of a
//! run, [`device`] is what they compute on, [`allocator`] keeps its memory, [`model`] is the network and its hand-written backward
//! pass, [`recipe`] is the story of a run, [`export`] writes what other software loads, [`verify`] proves it and
//! [`generate`] lets a person see it; [`data_check`] shows a person what of the rows is trained on.

pub mod allocator;
pub mod bench;
pub mod checkpoint;
pub mod clock;
pub mod data;
pub mod data_check;
pub mod device;
mod directory;
pub mod dist;
pub mod export;
pub mod extension;
pub mod failure;
pub mod generate;
pub mod import;
pub mod inputs;
pub mod launch;
pub mod memory;
pub mod model;
pub mod ops;
pub mod optimizer;
pub mod preflight;
pub mod profile;
pub mod progress;
pub mod proof;
pub mod recipe;
pub mod seed;
pub mod serve;
mod shim;
pub mod store;
pub mod tensor_file;
pub mod train;
pub mod verify;

/// Renders bytes as lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
