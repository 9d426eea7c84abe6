//! Progress of a run while it trains: recorded by the training loop, and passed to sinks, which
//! print, store and serve it.

pub mod history;
mod prometheus;
pub mod recorder;
pub mod server;
pub mod sink;
pub mod stdout;
