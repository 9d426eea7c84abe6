//! Why a row cannot be used.

use std::fmt;

/// One fault of a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowError {
    /// Equal for rows that have the same fault, whatever their values: rows are counted by it.
    pub kind: String,
    /// Where in the row, such as `messages[1]: `; empty for the row itself.
    place: String,
    /// What is wrong, the value seen, and what to do.
    message: String,
    /// A key of the row that the message names already, as a likely slip of another.
    slip: Option<String>,
}

impl RowError {
    /// Makes a fault whose message is the same for all rows that have it.
    pub fn new(message: impl Into<String>) -> Self {
        let message = message.into();
        Self { kind: message.clone(), place: String::new(), message, slip: None }
    }

    /// Makes a fault whose message has a value of the row in it.
    pub fn of_kind(kind: impl Into<String>, message: impl Into<String>) -> Self {
        Self { kind: kind.into(), place: String::new(), message: message.into(), slip: None }
    }

    /// Adds the key that the message names as a likely slip.
    #[must_use]
    pub(super) fn with_slip(self, key: Option<&str>) -> Self {
        Self { slip: key.map(str::to_owned), ..self }
    }

    /// Returns a key of the row that the message names already, as a likely slip of another.
    pub(super) fn slip(&self) -> Option<&str> {
        self.slip.as_deref()
    }

    /// Adds where it is.
    #[must_use]
    pub fn at(self, list: &str, index: usize) -> Self {
        let place = format!("{list}[{index}]: {}", self.place);
        Self { place, ..self }
    }
}

/// A fault found after reading, such as a template's; rows count as alike if their messages differ
/// only in numbers.
impl From<String> for RowError {
    fn from(message: String) -> Self {
        let kind = message.chars().filter(|character| !character.is_ascii_digit()).collect();
        Self { kind, place: String::new(), message, slip: None }
    }
}

impl fmt::Display for RowError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { place, message, .. } = self;
        write!(formatter, "{place}{message}")
    }
}
