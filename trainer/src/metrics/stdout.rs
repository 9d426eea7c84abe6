//! Prints the progress of a run to standard output, as one JSON line per update.

use finetune_contract::{Progress, render};

use crate::{metrics::sink::Sink, runtime::stdout::print_line};

/// Prints every update.
pub struct JsonLines;

impl Sink for JsonLines {
    fn record_stage(&mut self, progress: &Progress) {
        print_line(&render(progress));
    }

    fn record_metrics(&mut self, progress: &Progress) {
        print_line(&render(progress));
    }

    /// Does nothing: a line that is printed stays.
    fn resume(&mut self, _step: u64) {}
}
