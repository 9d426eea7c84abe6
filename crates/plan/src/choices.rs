//! The values of a plan, each with its reason.

use serde::Serialize;

/// One value and its reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Choice {
    /// The manifest's word, such as `contextLength`.
    pub field: &'static str,
    /// The value, for people.
    pub value: String,
    /// Why.
    pub reason: String,
}

/// The values chosen so far.
#[derive(Debug, Default)]
pub(super) struct Choices(pub(super) Vec<Choice>);

impl Choices {
    pub(super) fn add(
        &mut self,
        field: &'static str,
        value: impl std::fmt::Display,
        reason: impl Into<String>,
    ) {
        self.0.push(Choice { field, value: value.to_string(), reason: reason.into() });
    }

    /// Takes the user's value or the default, and records which.
    pub(super) fn pick<T: ToString>(
        &mut self,
        field: &'static str,
        set: Option<T>,
        default: T,
        why: &str,
    ) -> T {
        let reason = if set.is_some() { "set in the manifest" } else { why };
        let value = set.unwrap_or(default);
        self.add(field, value.to_string(), reason);
        value
    }
}
