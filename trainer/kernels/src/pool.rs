//! Division of work: units that write to places of their own.

use std::{marker::PhantomData, ops::Range};

/// Runs numbered units, several at once where it can.
pub trait Pool: Sync {
    /// Calls `task` once for each of `0..units` and returns when all are done.
    fn run(&self, units: usize, task: &(dyn Fn(usize) + Sync));
}

/// Runs units one after another.
#[derive(Debug)]
pub struct Serial;

impl Pool for Serial {
    fn run(&self, units: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..units).for_each(task);
    }
}

/// A mutable slice that several units write to, each to elements no other unit touches.
#[derive(Debug)]
pub struct Shared<'a, T> {
    start: *mut T,
    length: usize,
    slice: PhantomData<&'a mut [T]>,
}

#[expect(unsafe_code, reason = "several threads write to one slice")]
// SAFETY: elements are reached through `range` only, whose callers keep them apart.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    /// Shares a slice.
    pub fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), length: slice.len(), slice: PhantomData }
    }

    /// Returns some elements.
    ///
    /// # Safety
    /// No other unit that runs at the same time may touch them.
    ///
    /// # Panics
    /// If the range lies outside.
    #[expect(unsafe_code, reason = "see above")]
    #[expect(clippy::mut_from_ref, reason = "units keep apart what they write")]
    pub unsafe fn range(&self, range: Range<usize>) -> &mut [T] {
        assert!(
            range.start <= range.end && range.end <= self.length,
            "{range:?} of {}",
            self.length
        );
        // SAFETY: inside the slice, and the caller keeps others away.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}
