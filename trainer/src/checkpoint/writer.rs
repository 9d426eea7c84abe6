//! A background writer: one thread, one write at a time.

use std::thread::{Builder, JoinHandle};

use tracing::warn;

use crate::failure::Failure;

/// A complete checkpoint and its cost.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Saved {
    /// The number of completed optimizer steps.
    pub step: u64,
    /// Seconds that training waited for it.
    pub stall_seconds: f64,
    /// Seconds of writing in the background until it was complete.
    pub write_seconds: f64,
}

/// The write in progress, if any, with its result.
#[derive(Debug)]
pub(super) struct Writer<T>(Option<JoinHandle<Result<T, Failure>>>);

impl<T> Default for Writer<T> {
    fn default() -> Self {
        Self(None)
    }
}

impl<T: Send + 'static> Writer<T> {
    /// Reports whether a write is in progress.
    pub(super) fn is_busy(&self) -> bool {
        self.0.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Starts a write; the one before must have been waited for.
    ///
    /// # Errors
    /// A [`Failure`] if no thread can be started.
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

    /// Detaches the write in progress: it ends by itself or with the process.
    pub(super) fn abandon(&mut self) {
        self.0 = None;
    }

    /// Waits for the write in progress and returns its result; `None` if there is none.
    ///
    /// # Errors
    /// The [`Failure`] of the write.
    ///
    /// # Panics
    /// If the write panicked.
    pub(super) fn wait(&mut self) -> Result<Option<T>, Failure> {
        let Some(thread) = self.0.take() else { return Ok(None) };
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)).map(Some)
    }
}

impl<T> Drop for Writer<T> {
    /// A run that ends early still completes the write in progress.
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
    fn is_busy_until_the_write_ends_and_returns_its_result_once() {
        let (sender, receiver) = mpsc::channel();
        let mut writer = Writer::default();
        let saved = Saved { step: 3, stall_seconds: 0.1, write_seconds: 2.0 };
        writer
            .start(move || {
                receiver.recv().unwrap();
                Ok(saved)
            })
            .unwrap();
        assert!(writer.is_busy());
        sender.send(()).unwrap();
        assert_eq!(writer.wait().unwrap(), Some(saved));
        assert_eq!(writer.wait().unwrap(), None);
        assert!(!writer.is_busy());
    }

    #[test]
    fn waiting_returns_the_failure_of_a_write() {
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
