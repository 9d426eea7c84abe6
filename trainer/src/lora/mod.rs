//! LoRA adapters in PEFT's terms: target modules, trained tensors, and the files PEFT writes.

pub mod config;
mod error;
pub mod targets;
pub mod trainable;
pub mod weights;

pub use error::Error;

/// The prefix of every tensor name in PEFT's files.
pub const PREFIX: &str = "base_model.model.";
/// The file of an adapter's settings.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The file of an adapter's tensors.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";
