//! Where a step's time goes, by operator.
//!
//! Operators on the CPU return when they are done, so a clock around each is enough. Nothing is
//! measured, and no clock is read, unless it was asked for.

use std::{cell::RefCell, collections::BTreeMap, time::Duration};

use crate::runtime::clock;

thread_local! {
    static TIMES: RefCell<Option<Times>> = const { RefCell::new(None) };
}

/// Time and calls by operator.
pub type Times = BTreeMap<&'static str, (Duration, u64)>;

/// Starts measuring what this thread calls, from nothing.
pub fn start() {
    TIMES.set(Some(Times::new()));
}

/// Stops measuring and returns what was measured.
pub fn stop() -> Times {
    TIMES.take().unwrap_or_default()
}

/// Runs an operator, and measures it under a name if that was asked for.
pub fn time<T>(name: &'static str, operator: impl FnOnce() -> T) -> T {
    if TIMES.with_borrow(Option::is_none) {
        return operator();
    }
    let started = clock::now();
    let result = operator();
    let elapsed = started.elapsed();
    TIMES.with_borrow_mut(|times| {
        if let Some(times) = times {
            let (total, calls) = times.entry(name).or_default();
            *total += elapsed;
            *calls += 1;
        }
    });
    result
}

#[cfg(test)]
mod tests {
    use super::{start, stop, time};

    #[test]
    fn counts_only_between_start_and_stop() {
        time("before", || ());
        start();
        assert_eq!(time("twice", || 1) + time("twice", || 2), 3);
        let times = stop();
        time("after", || ());
        assert_eq!(times.keys().collect::<Vec<_>>(), [&"twice"]);
        assert_eq!(times["twice"].1, 2);
        assert!(stop().is_empty());
    }
}
