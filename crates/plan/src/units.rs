//! Numbers and words, for people.

use serde::Serialize;

/// Returns bytes in decimal units.
pub fn bytes(bytes: u64) -> String {
    match bytes as f64 {
        size if size >= 1e9 => format!("{:.2} GB", size / 1e9),
        size => format!("{:.0} MB", size / 1e6),
    }
}

/// Returns a duration in the largest unit that matters.
pub fn duration(seconds: f64) -> String {
    match seconds {
        seconds if seconds < 90.0 => format!("{seconds:.0} s"),
        seconds if seconds < 5400.0 => format!("{:.0} min", seconds / 60.0),
        seconds => format!("{:.1} h", seconds / 3600.0),
    }
}

/// Returns a word of the contract as it is written in a manifest.
pub(super) fn word(value: &impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        _ => String::new(),
    }
}
