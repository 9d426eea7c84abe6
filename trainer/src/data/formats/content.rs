//! Parses the content of a turn: a text, or a list of text parts.

use serde_json::{Map, Value};

use crate::data::formats::{
    check_keys,
    error::RowError,
    fields::{as_text, is_empty, non_null},
    keys::KeyScope,
};

/// The content of a turn.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Content {
    /// The text.
    pub(super) text: String,
    /// The reasoning, if it is a separate part.
    pub(super) reasoning: Option<String>,
}

/// Parses a content; parts are joined with a line break, as vLLM does for text-only templates.
pub(super) fn read(value: &Value, key: &str) -> Result<Content, RowError> {
    let parts = match value {
        Value::Null => return Ok(Content::default()),
        Value::String(text) => return Ok(Content { text: text.clone(), reasoning: None }),
        Value::Array(parts) => parts,
        _ => return as_text(value, key).map(|text| Content { text, reasoning: None }),
    };
    let (mut texts, mut reasoning) = (Vec::new(), Vec::new());
    for (index, part) in parts.iter().enumerate() {
        match part {
            Value::String(text) => texts.push(text.clone()),
            Value::Object(part) => {
                let (is_reasoning, text) = read_part(part).map_err(|error| error.at(key, index))?;
                if is_reasoning { reasoning.push(text) } else { texts.push(text) }
            }
            Value::Null => {}
            _ => {
                return Err(as_text(part, key)
                    .err()
                    .unwrap_or_else(|| unknown(key))
                    .at(key, index));
            }
        }
    }
    let reasoning = Some(reasoning.join("\n")).filter(|text| !text.is_empty());
    Ok(Content { text: texts.join("\n"), reasoning })
}

fn unknown(key: &str) -> RowError {
    RowError::new(format!("{key:?} must be a string or a list of text parts"))
}

/// Returns whether a part is reasoning, and its text.
fn read_part(part: &Map<String, Value>) -> Result<(bool, String), RowError> {
    let kind = non_null(part, "type").and_then(Value::as_str).unwrap_or("text");
    let (is_reasoning, key) = match kind {
        "text" | "input_text" | "output_text" => (false, "text"),
        // The format of Anthropic and Mistral for reasoning.
        "thinking" => (true, "thinking"),
        "reasoning" => (true, if part.contains_key("reasoning") { "reasoning" } else { "text" }),
        other => {
            return Err(RowError::new(format!(
                "a content part has the type {other:?}, but only text can be trained on: remove the row, or replace the part by text"
            )));
        }
    };
    let mut others =
        part.iter().filter(|(other, value)| *other != "type" && *other != key && !is_empty(value));
    if let Some(error) =
        others.find_map(|(other, _)| check_keys::refusal_of_key(KeyScope::Part, other))
    {
        return Err(error);
    }
    Ok((is_reasoning, crate::data::formats::fields::text(part, key)?))
}
