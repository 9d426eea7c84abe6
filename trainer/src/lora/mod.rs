//! Adapters in PEFT's terms: which modules they are on, what is trained, and the files PEFT writes.

pub mod config;
mod error;
pub mod targets;
pub mod trainable;
pub mod weights;

pub use error::Error;

/// What PEFT puts before every name.
pub const PREFIX: &str = "base_model.model.";
/// The adapter's settings.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The adapter's tensors.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";
