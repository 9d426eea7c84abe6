//! Writing while training goes on: one thread, one thing at a time.

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

/// What is being written, if anything is, and what comes of it.
#[derive(Debug)]
pub(super) struct Writer<T>(Option<JoinHandle<Result<T, Failure>>>);

impl<T> Default for Writer<T> {
    fn default() -> Self {
        Self(None)
    }
}

impl<T: Send + 'static> Writer<T> {
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
        write: impl FnOnce() -> Result<T, Failure> + Send + 'static,
    ) -> Result<(), Failure> {
        debug_assert!(self.0.is_none(), "two checkpoints would be written at once");
        let thread = Builder::new().name("checkpoint".to_owned()).spawn(write);
        let cannot = |error| Failure::from_io(&error, "cannot start to write a checkpoint");
        self.0 = Some(thread.map_err(cannot)?);
        Ok(())
    }

    /// Lets go of what is being written: it ends by itself, or with the process.
    pub(super) fn abandon(&mut self) {
        self.0 = None;
    }

    /// Waits until nothing is being written; returns what was, unless that was asked before.
    ///
    /// # Errors
    /// The [`Failure`] of the write.
    ///
    /// # Panics
    /// If the write did: a defect is reported where training ends.
    pub(super) fn wait(&mut self) -> Result<Option<T>, Failure> {
        let Some(thread) = self.0.take() else { return Ok(None) };
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)).map(Some)
    }
}

impl<T> Drop for Writer<T> {
    /// A run that ends early leaves the checkpoint whole that it had begun.
    fn drop(&mut self) {
        if let Some(Ok(Err(failure))) = self.0.take().map(JoinHandle::join) {
            warn!(%failure, "the last checkpoint could not be written");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    };

    use finetune_contract::FailureReason;

    use super::{Saved, Writer};
    use crate::failure::Failure;

    #[test]
    fn is_busy_until_the_write_ends_and_tells_it_once() {
        let (go, told) = mpsc::channel();
        let mut writer = Writer::default();
        let saved = Saved { step: 3, stall_seconds: 0.1, write_seconds: 2.0 };
        writer
            .start(move || {
                told.recv().unwrap();
                Ok(saved)
            })
            .unwrap();
        assert!(writer.is_busy());
        go.send(()).unwrap();
        assert_eq!(writer.wait().unwrap(), Some(saved));
        assert_eq!(writer.wait().unwrap(), None);
        assert!(!writer.is_busy());
    }

    #[test]
    fn a_write_that_fails_says_so_to_who_waits() {
        let mut writer = Writer::<Saved>::default();
        let failure = Failure::new(FailureReason::StoreUnavailable, "the bucket is away");
        let failed = failure.clone();
        writer.start(move || Err(failed)).unwrap();
        assert_eq!(writer.wait(), Err(failure));
    }

    #[test]
    fn a_run_that_ends_early_leaves_no_half_written_checkpoint() {
        let is_written = Arc::new(AtomicBool::new(false));
        let mut writer = Writer::<Saved>::default();
        let is_it = Arc::clone(&is_written);
        writer
            .start(move || {
                std::thread::sleep(std::time::Duration::from_millis(50));
                is_it.store(true, Ordering::Relaxed);
                Err(Failure::new(FailureReason::StoreUnavailable, "nobody waits for this"))
            })
            .unwrap();
        drop(writer);
        assert!(is_written.load(Ordering::Relaxed));
    }
}
