//! Standard output, which carries the documents and progress of a command.

use std::io::Write;

/// Prints one line to standard output; a closed pipe is not an error.
pub fn print_line(line: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}
