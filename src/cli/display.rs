//! What the user sees: results on standard output, everything else on standard error.
#![expect(clippy::print_stderr, reason = "this is the one place that prints")]

use std::{
    io::{IsTerminal, Write},
    time::{Duration, Instant},
};

use finetune_contract::{Progress, Stage};
use finetune_plan::units;
use indicatif::{ProgressBar, ProgressStyle};

/// The least time between two plain lines of one stage.
const LINE_INTERVAL: Duration = Duration::from_secs(2);

/// Prints what was asked for.
pub(super) fn result(text: &str) {
    // A closed pipe (`finetune plan | head`) is no failure.
    let _ = std::io::stdout().write_all(text.as_bytes());
}

/// Prints a notice.
pub(super) fn note(text: &str) {
    eprintln!("{text}");
}

/// Prints why the command failed.
pub(super) fn error(text: &str) {
    eprintln!("error: {text}");
}

/// Shows a run's progress: a bar on a terminal, else lines.
pub(super) struct ProgressDisplay {
    bar: Option<ProgressBar>,
    stage: Option<Stage>,
    last_line: Option<Instant>,
}

impl ProgressDisplay {
    pub(super) fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{bar:30} {pos}/{len}  {msg}")
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::new(0).with_style(style)
        });
        Self { bar, stage: None, last_line: None }
    }

    pub(super) fn show(&mut self, progress: &Progress) {
        let stage_changed = self.stage != Some(progress.stage);
        self.stage = Some(progress.stage);
        if let Some(bar) = &self.bar {
            bar.set_length(progress.total_steps);
            bar.set_position(progress.step);
            bar.set_message(summary(progress));
            return;
        }
        let is_due = self.last_line.is_none_or(|last| last.elapsed() >= LINE_INTERVAL);
        let is_last = progress.step == progress.total_steps && progress.stage == Stage::Training;
        if stage_changed || is_due || is_last {
            self.last_line = Some(Instant::now());
            let Progress { step, total_steps, .. } = progress;
            eprintln!("step {step}/{total_steps}  {}", summary(progress));
        }
    }

    /// Prints a line of the trainer's without tearing the bar.
    pub(super) fn line(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{line}")),
            None => eprintln!("{line}"),
        }
    }

    pub(super) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn summary(progress: &Progress) -> String {
    let stage = match progress.stage {
        Stage::Fetching => "fetching",
        Stage::Loading => "loading",
        Stage::Training => "training",
        Stage::Evaluating => "evaluating",
        Stage::Exporting => "exporting",
        Stage::Publishing => "publishing",
        Stage::Verifying => "verifying",
    };
    let mut parts = vec![stage.to_owned()];
    if let Some(loss) = progress.loss {
        parts.push(format!("loss {loss:.3}"));
    }
    if let Some(loss) = progress.eval_loss {
        parts.push(format!("eval {loss:.3}"));
    }
    if let Some(speed) = progress.tokens_per_second {
        parts.push(format!("{speed:.0} tok/s"));
    }
    if let Some(seconds) = progress.eta_seconds {
        parts.push(format!("{} left", units::duration(seconds as f64)));
    }
    parts.join("  ")
}
