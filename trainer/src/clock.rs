//! The one door for time, used for measuring only: no decision of a run depends on it, but when one with
//! `maxTimeSeconds` ends.

use std::time::Instant;

/// Returns the time now.
pub fn now() -> Instant {
    Instant::now()
}
