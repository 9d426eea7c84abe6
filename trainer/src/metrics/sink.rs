//! What receives the progress of a run.

use finetune_contract::Progress;

/// Receives the progress of a run.
///
/// Methods return no errors: a run that can still be published must not end because its progress
/// cannot be recorded.
pub trait Sink {
    /// Takes the progress when another stage begins; its metrics are those of the last update.
    fn record_stage(&mut self, progress: &Progress);

    /// Takes the progress with the metrics of a finished step or of an evaluation.
    fn record_metrics(&mut self, progress: &Progress);

    /// Discards what was recorded after `step`, from which the run resumes.
    fn resume(&mut self, step: u64);
}
