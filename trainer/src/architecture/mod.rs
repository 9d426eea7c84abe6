//! What a model is: the network its `config.json` describes, and its modules by checkpoint path.
//!
//! No tensor is here, so that the preflight reads a model's shape as training does.

pub mod config;
mod cost;
pub mod families;
mod keys;
pub mod modules;
pub mod names;
pub mod rope;

pub use config::ModelConfig;
pub use families::{Family, GgufFamily};
