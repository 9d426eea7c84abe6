//! Progress of a run while it trains: recorded by the training loop, printed, stored and served.

pub mod recorder;
pub mod server;
