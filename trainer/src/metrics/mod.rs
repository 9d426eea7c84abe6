//! What a run tells the outside while it trains.

pub mod recorder;
pub mod server;
