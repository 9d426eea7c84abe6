//! One module per subcommand of the trainer.

pub mod bench;
pub mod data_check;
mod documents;
pub mod generate;
pub mod preflight;
pub mod train;
pub mod verify;

use std::io::Write;

/// Prints one line to standard output; a closed pipe is not an error.
pub fn print_line(line: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}
