//! What every operator has, whichever kinds it knows: a client, the Lease, metrics and the probes.

pub mod client;
pub mod leader;
pub mod metrics;
pub mod server;
