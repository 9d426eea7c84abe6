//! Parallel tasks that write to disjoint ranges of a slice.

use std::{marker::PhantomData, ops::Range};

/// Runs indexed tasks, in parallel if it can.
pub trait Pool: Sync {
    /// Calls `task` once for each index below `count` and returns when all calls have.
    fn run(&self, count: usize, task: &(dyn Fn(usize) + Sync));
}

/// Runs tasks one after another.
#[derive(Debug)]
pub struct Serial;

impl Pool for Serial {
    fn run(&self, count: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..count).for_each(task);
    }
}

/// A mutable slice that several tasks write to, each to its own elements.
#[derive(Debug)]
pub struct Shared<'a, T> {
    start: *mut T,
    length: usize,
    slice: PhantomData<&'a mut [T]>,
}

#[expect(unsafe_code, reason = "several threads write to one slice")]
// SAFETY: elements are accessed only through `range`, whose callers use disjoint ranges.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    /// Shares a slice.
    pub fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), length: slice.len(), slice: PhantomData }
    }

    /// Returns a range of elements.
    ///
    /// # Safety
    /// No other task that runs at the same time may access the range.
    ///
    /// # Panics
    /// If the range is out of bounds.
    #[expect(unsafe_code, reason = "see above")]
    #[expect(clippy::mut_from_ref, reason = "tasks write to disjoint ranges")]
    pub unsafe fn range(&self, range: Range<usize>) -> &mut [T] {
        assert!(
            range.start <= range.end && range.end <= self.length,
            "{range:?} of {}",
            self.length
        );
        // SAFETY: inside the slice, and no other task accesses it.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}
