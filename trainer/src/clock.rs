//! The one door for time, used for measuring, for when to save and for when a run with `maxTimeSeconds`
//! ends: nothing else of a run depends on it.

use std::time::Instant;

/// Returns the time now.
pub fn now() -> Instant {
    Instant::now()
}
