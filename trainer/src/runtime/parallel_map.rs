//! A parallel map that returns results in the order of its items.

use std::{
    collections::BTreeMap,
    panic::{self, AssertUnwindSafe},
    sync::{
        Mutex, PoisonError,
        mpsc::{self, Receiver, Sender},
    },
    thread,
};

/// Items in flight per thread, so that no thread is idle.
const IN_FLIGHT: usize = 3;

/// The queue of a parallel map: items are pushed and results popped.
pub(crate) struct ParallelMap<T, R> {
    items: Sender<(usize, T)>,
    results: Receiver<(usize, thread::Result<R>)>,
    early: BTreeMap<usize, R>,
    pushed: usize,
    popped: usize,
    limit: usize,
}

/// Runs `body` with one thread per CPU that maps the items it pushes. A panic in `map` is
/// propagated.
pub(crate) fn parallel_map<T: Send, R: Send, A>(
    map: impl Fn(T) -> R + Sync,
    body: impl FnOnce(&mut ParallelMap<T, R>) -> A,
) -> A {
    let workers = thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let (items, receiver) = mpsc::channel::<(usize, T)>();
    let (sender, results) = mpsc::channel();
    let receiver = Mutex::new(receiver);
    thread::scope(|scope| {
        for _ in 0..workers {
            let (sender, receiver, map) = (sender.clone(), &receiver, &map);
            scope.spawn(move || {
                loop {
                    let next = receiver.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok((number, item)) = next else { return };
                    let result = panic::catch_unwind(AssertUnwindSafe(|| map(item)));
                    if sender.send((number, result)).is_err() {
                        return;
                    }
                }
            });
        }
        let limit = workers * IN_FLIGHT;
        body(&mut ParallelMap {
            items,
            results,
            early: BTreeMap::new(),
            pushed: 0,
            popped: 0,
            limit,
        })
    })
}

impl<T, R> ParallelMap<T, R> {
    /// Pushes an item; returns the oldest result once enough are in flight.
    pub(crate) fn push(&mut self, item: T) -> Option<R> {
        // This fails only if all threads have exited, and they outlive the queue.
        let _ = self.items.send((self.pushed, item));
        self.pushed += 1;
        if self.pushed - self.popped > self.limit { self.pop() } else { None }
    }

    /// Waits for the oldest result; `None` if all were popped.
    pub(crate) fn pop(&mut self) -> Option<R> {
        if self.popped == self.pushed {
            return None;
        }
        loop {
            if let Some(result) = self.early.remove(&self.popped) {
                self.popped += 1;
                return Some(result);
            }
            let (number, result) = self.results.recv().ok()?;
            match result {
                Ok(result) => self.early.insert(number, result),
                Err(panic) => panic::resume_unwind(panic),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn results_come_in_the_order_of_the_items() {
        let square = |item: u64| {
            thread::sleep(Duration::from_micros(item * 7919 % 300));
            item * item
        };
        let results = parallel_map(square, |queue| {
            let mut results: Vec<u64> = (0..200).filter_map(|item| queue.push(item)).collect();
            results.extend(std::iter::from_fn(|| queue.pop()));
            results
        });
        assert_eq!(results, (0..200).map(|item| item * item).collect::<Vec<_>>());
    }

    #[test]
    fn a_panic_of_a_thread_is_propagated() {
        let outcome = panic::catch_unwind(|| {
            parallel_map(
                |item: u32| assert_ne!(item, 3, "three"),
                |queue| while queue.push(3).is_none() {},
            );
        });
        assert!(outcome.is_err());
    }
}
