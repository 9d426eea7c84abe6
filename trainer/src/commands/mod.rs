//! One file per subcommand beside training itself and its preflight.

pub mod bench;
pub mod data_check;
pub mod generate;
pub mod verify;
