//! The history of a run: a file in the work directory with the metrics of its steps and evaluations.

use std::{
    fs::OpenOptions,
    io::Write,
    path::{Path, PathBuf},
};

use finetune_contract::{Progress, parse, render};

use crate::metrics::sink::Sink;

/// The file name of the history in the work directory: one [`Progress`] per line.
pub const HISTORY_FILE: &str = "metrics.jsonl";

/// Appends the metrics of every step and evaluation to [`HISTORY_FILE`].
///
/// Errors are ignored: a full disk must not end a run that can still be published.
pub struct History {
    path: PathBuf,
}

impl History {
    /// Creates the history of a work directory, whose file is written with the first metrics.
    pub fn new(work_dir: &Path) -> Self {
        Self { path: work_dir.join(HISTORY_FILE) }
    }
}

impl Sink for History {
    /// Does nothing: the history has only metrics.
    fn record_stage(&mut self, _progress: &Progress) {}

    fn record_metrics(&mut self, progress: &Progress) {
        let file = OpenOptions::new().create(true).append(true).open(&self.path);
        let _ = file.and_then(|mut file| writeln!(file, "{}", render(progress)));
    }

    /// Truncates the history to `step`.
    fn resume(&mut self, step: u64) {
        let kept: String = std::fs::read_to_string(&self.path)
            .unwrap_or_default()
            .lines()
            .filter(|line| parse::<Progress>(line).is_ok_and(|progress| progress.step <= step))
            .flat_map(|line| [line, "\n"])
            .collect();
        let _ = std::fs::write(&self.path, if step == 0 { String::new() } else { kept });
    }
}
