//! A map on all processors whose results come in the order of what was given.

use std::{
    collections::BTreeMap,
    panic::{self, AssertUnwindSafe},
    sync::{
        Mutex, PoisonError,
        mpsc::{self, Receiver, Sender},
    },
    thread,
};

/// Items given and not yet taken, for each processor: enough that none waits for the giver.
const WAITING: usize = 3;

/// Where items go in and results come out.
pub(super) struct InOrder<T, R> {
    items: Sender<(usize, T)>,
    results: Receiver<(usize, thread::Result<R>)>,
    early: BTreeMap<usize, R>,
    given: usize,
    taken: usize,
    limit: usize,
}

/// Starts a thread for each processor, runs `body`, and ends them; a panic of `map` is passed on.
pub(super) fn map_in_order<T: Send, R: Send, A>(
    map: impl Fn(T) -> R + Sync,
    body: impl FnOnce(&mut InOrder<T, R>) -> A,
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
        let limit = workers * WAITING;
        body(&mut InOrder { items, results, early: BTreeMap::new(), given: 0, taken: 0, limit })
    })
}

impl<T, R> InOrder<T, R> {
    /// Gives an item; returns the oldest result once enough items wait.
    pub(super) fn give(&mut self, item: T) -> Option<R> {
        // It fails only if all threads are gone, and they go after this.
        let _ = self.items.send((self.given, item));
        self.given += 1;
        if self.given - self.taken > self.limit { self.take() } else { None }
    }

    /// Waits for the oldest result; `None` if all were taken.
    pub(super) fn take(&mut self) -> Option<R> {
        if self.taken == self.given {
            return None;
        }
        loop {
            if let Some(result) = self.early.remove(&self.taken) {
                self.taken += 1;
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
        let results = map_in_order(square, |queue| {
            let mut results: Vec<u64> = (0..200).filter_map(|item| queue.give(item)).collect();
            results.extend(std::iter::from_fn(|| queue.take()));
            results
        });
        assert_eq!(results, (0..200).map(|item| item * item).collect::<Vec<_>>());
    }

    #[test]
    fn a_panic_of_a_thread_is_passed_on() {
        let outcome = panic::catch_unwind(|| {
            map_in_order(
                |item: u32| assert_ne!(item, 3, "three"),
                |queue| while queue.give(3).is_none() {},
            );
        });
        assert!(outcome.is_err());
    }
}
