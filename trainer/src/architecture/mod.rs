//! What a model is: the numbers of its `config.json`, and its modules by checkpoint path. No tensor.

pub mod config;
pub mod modules;
pub mod names;

pub use config::ModelConfig;
