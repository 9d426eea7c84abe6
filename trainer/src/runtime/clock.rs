//! The only source of time. It serves measurements, the cadence of checkpoints and
//! `maxTimeSeconds`; nothing else of a run depends on it.

use std::time::Instant;

use jiff::{Timestamp, civil::Date, tz::TimeZone};

/// Returns the current time.
pub fn now() -> Instant {
    Instant::now()
}

/// Returns the current date in UTC, for chat templates that print it.
pub fn today() -> Date {
    TimeZone::UTC.to_datetime(Timestamp::now()).date()
}
