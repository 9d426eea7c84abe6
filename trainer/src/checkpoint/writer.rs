//! Writing a checkpoint while training goes on: one thread, one checkpoint at a time.

use std::thread::{Builder, JoinHandle};

use tracing::warn;

use crate::failure::Failure;

/// A checkpoint that is complete, and what it cost.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Saved {
    /// Optimizer steps done by then.
    pub step: u64,
    /// Seconds training stood still for it.
    pub stall_seconds: f64,
    /// Seconds from then until it was complete, beside training.
    pub write_seconds: f64,
}

type Outcome = Result<Saved, Failure>;

/// What is being written, if anything is.
#[derive(Debug, Default)]
pub(super) struct Writer(Option<JoinHandle<Outcome>>);

impl Writer {
    /// Tells whether something is still being written.
    pub(super) fn is_busy(&self) -> bool {
        self.0.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Starts to write; what was written before must have been waited for.
    ///
    /// # Errors
    /// A [`Failure`] if no thread can be had.
    pub(super) fn start(
        &mut self,
        write: impl FnOnce() -> Outcome + Send + 'static,
    ) -> Result<(), Failure> {
        debug_assert!(self.0.is_none(), "two checkpoints would be written at once");
        let thread = Builder::new().name("checkpoint".to_owned()).spawn(write);
        let cannot = |error| Failure::from_io(&error, "cannot start to write a checkpoint");
        self.0 = Some(thread.map_err(cannot)?);
        Ok(())
    }

    /// Waits until nothing is being written; returns what was, unless that was asked before.
    ///
    /// # Errors
    /// The [`Failure`] of the write.
    ///
    /// # Panics
    /// If the write did: a defect is reported where training ends.
    pub(super) fn wait(&mut self) -> Result<Option<Saved>, Failure> {
        let Some(thread) = self.0.take() else { return Ok(None) };
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)).map(Some)
    }
}

impl Drop for Writer {
    /// A run that ends early leaves the checkpoint whole that it had begun.
    fn drop(&mut self) {
        if let Some(Ok(Err(failure))) = self.0.take().map(JoinHandle::join) {
            warn!(%failure, "the last checkpoint could not be written");
        }
    }
}
