//! Process-wide facilities: device, allocator, memory, clock, random numbers, profile and standard
//! output.

pub mod allocator;
pub mod clock;
pub mod device;
pub mod memory;
pub(crate) mod parallel_map;
pub mod profile;
pub mod rng;
pub(crate) mod shim;
pub mod stdout;
pub mod vml;
