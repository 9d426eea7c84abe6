//! A profile of the time per operator.
//!
//! Operators on the CPU return when they are done, so that wall time per call is enough. No clock
//! is read unless profiling was started.

use std::{cell::RefCell, collections::BTreeMap, time::Duration};

use crate::runtime::clock;

thread_local! {
    static TIMES: RefCell<Option<Times>> = const { RefCell::new(None) };
}

/// Time and number of calls per operator.
pub type Times = BTreeMap<&'static str, (Duration, u64)>;

/// Starts a new profile of this thread.
pub fn start() {
    TIMES.set(Some(Times::new()));
}

/// Stops profiling and returns the profile.
pub fn stop() -> Times {
    TIMES.take().unwrap_or_default()
}

/// Runs an operator, and adds its time to the profile if one was started.
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
