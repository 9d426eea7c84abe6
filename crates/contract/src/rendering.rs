//! How rows become text, beside what the model itself says.

use serde::{Deserialize, Serialize};

/// What a user may decide about rendering rows; the default is what the model says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RenderingSettings {
    /// A template that takes the place of the model's: a built-in name, its text or its URI.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chat_template: Option<String>,
    /// What becomes of the assistant's thoughts.
    #[serde(default, skip_serializing_if = "Reasoning::is_default")]
    pub reasoning: Reasoning,
    /// The day it is for templates that ask, as `2026-01-31`; the day of the preflight if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template_date: Option<String>,
}

impl RenderingSettings {
    /// Returns the template's URI, if it is named by one.
    pub fn template_uri(&self) -> Option<&str> {
        self.chat_template.as_deref().and_then(template_uri)
    }

    /// Returns whether nothing is set, which needs no word in a document.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// Returns the URI of a template that is named by it; none of a built-in name or a text.
pub fn template_uri(chat_template: &str) -> Option<&str> {
    (!is_template_text(chat_template) && chat_template.contains("://")).then_some(chat_template)
}

/// Returns whether a template is given by its text.
pub fn is_template_text(chat_template: &str) -> bool {
    chat_template.contains("{{") || chat_template.contains("{%")
}

/// What becomes of the assistant's thoughts before rows are rendered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(transform = crate::schema::words))]
pub enum Reasoning {
    /// All are given to the template.
    #[default]
    Keep,
    /// None are.
    Drop,
    /// Only that of the last assistant turn is.
    LastTurn,
}

impl Reasoning {
    /// Returns whether it is the default, which needs no word in a document.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}
