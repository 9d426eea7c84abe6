//! The error of a row that cannot be used.

use std::fmt;

/// One error of a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowError {
    /// Equal for all rows with the same error, whatever their values; errors are grouped by it.
    pub kind: String,
    /// The location in the row, such as `messages[1]: `; empty for the row itself.
    location: String,
    /// What is wrong, the value found, and what to do.
    message: String,
    /// A key of the row that the message already mentions as a likely misspelling.
    suspected_typo: Option<String>,
}

impl RowError {
    /// Creates an error whose message is the same for all rows.
    pub fn new(message: impl Into<String>) -> Self {
        let message = message.into();
        Self { kind: message.clone(), location: String::new(), message, suspected_typo: None }
    }

    /// Creates an error whose message contains a value of the row.
    pub fn of_kind(kind: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            kind: kind.into(),
            location: String::new(),
            message: message.into(),
            suspected_typo: None,
        }
    }

    /// Adds the key that the message mentions as a likely misspelling.
    #[must_use]
    pub(super) fn with_suspected_typo(self, key: Option<&str>) -> Self {
        Self { suspected_typo: key.map(str::to_owned), ..self }
    }

    /// Returns the key that the message mentions as a likely misspelling.
    pub(super) fn suspected_typo(&self) -> Option<&str> {
        self.suspected_typo.as_deref()
    }

    /// Adds the location in the row, an element of a list.
    #[must_use]
    pub fn at(self, list: &str, index: usize) -> Self {
        self.within(&format!("{list}[{index}]"))
    }

    /// Adds the location in the row, the value of a key.
    #[must_use]
    pub fn within(self, key: &str) -> Self {
        let location = format!("{key}: {}", self.location);
        Self { location, ..self }
    }
}

/// Converts an error found after parsing, such as that of a template. Messages that differ only in
/// numbers are of the same kind.
impl From<String> for RowError {
    fn from(message: String) -> Self {
        let kind = message.chars().filter(|character| !character.is_ascii_digit()).collect();
        Self { kind, location: String::new(), message, suspected_typo: None }
    }
}

impl fmt::Display for RowError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { location, message, .. } = self;
        write!(formatter, "{location}{message}")
    }
}
