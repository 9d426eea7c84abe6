//! The arithmetic of a run's memory, network and time: the only place that holds it.

mod memory;
mod network;
mod time;
mod workload;

pub use memory::{
    DEVICE_RUNTIME_BYTES, Memory, RUNTIME_BYTES, STATE_BYTES, UPLOAD_BYTES, USABLE_MEMORY, budget,
    is_computed_as_stored, memory,
};
pub use network::sent_bytes;
pub use time::{ACCELERATOR_EFFICIENCY, CPU_EFFICIENCY, flops_per_token, seconds};
pub use workload::Workload;
