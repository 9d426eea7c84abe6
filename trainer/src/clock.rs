//! The one door for time, used for measuring and for when to save: no result of a run depends on it.

use std::time::Instant;

/// Returns the time now.
pub fn now() -> Instant {
    Instant::now()
}
