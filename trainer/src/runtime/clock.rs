//! The one door for time, used for measuring, for when to save and for when a run with `maxTimeSeconds`
//! ends: nothing else of a run depends on it.

use std::time::Instant;

use jiff::{Timestamp, civil::Date, tz::TimeZone};

/// Returns the time now.
pub fn now() -> Instant {
    Instant::now()
}

/// Returns the day it is in UTC, for chat templates that print it.
pub fn today() -> Date {
    TimeZone::UTC.to_datetime(Timestamp::now()).date()
}
