//! One module per subcommand of the trainer.

pub mod bench;
pub mod data_check;
mod documents;
pub mod generate;
pub mod preflight;
pub mod train;
pub mod verify;
