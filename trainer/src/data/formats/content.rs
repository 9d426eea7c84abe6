//! What a turn says: a text, or a list of parts of which all are text.

use serde_json::{Map, Value};

use crate::data::formats::{
    error::RowError,
    fields::{as_text, given, is_empty},
    keys::{self, Place},
};

/// The content of a turn.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Content {
    /// The text.
    pub(super) text: String,
    /// A thought given as a part of its own.
    pub(super) reasoning: Option<String>,
}

/// Reads a content; parts are joined with a line break, as vLLM joins them for templates of text.
pub(super) fn read(value: &Value, key: &str) -> Result<Content, RowError> {
    let parts = match value {
        Value::Null => return Ok(Content::default()),
        Value::String(text) => return Ok(Content { text: text.clone(), reasoning: None }),
        Value::Array(parts) => parts,
        _ => return as_text(value, key).map(|text| Content { text, reasoning: None }),
    };
    let (mut texts, mut thoughts) = (Vec::new(), Vec::new());
    for (index, part) in parts.iter().enumerate() {
        match part {
            Value::String(text) => texts.push(text.clone()),
            Value::Object(part) => {
                let (is_thought, text) = read_part(part).map_err(|error| error.at(key, index))?;
                if is_thought { thoughts.push(text) } else { texts.push(text) }
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
    let reasoning = Some(thoughts.join("\n")).filter(|text| !text.is_empty());
    Ok(Content { text: texts.join("\n"), reasoning })
}

fn unknown(key: &str) -> RowError {
    RowError::new(format!("{key:?} must be a string or a list of text parts"))
}

fn read_part(part: &Map<String, Value>) -> Result<(bool, String), RowError> {
    let kind = given(part, "type").and_then(Value::as_str).unwrap_or("text");
    let (is_thought, key) = match kind {
        "text" | "input_text" | "output_text" => (false, "text"),
        // Anthropic's and Mistral's way to keep a thought apart.
        "thinking" => (true, "thinking"),
        "reasoning" => (true, if part.contains_key("reasoning") { "reasoning" } else { "text" }),
        other => {
            return Err(RowError::new(format!(
                "a content part has the type {other:?}, and only text can be trained on: leave the row out, or write what it means as text"
            )));
        }
    };
    let mut others =
        part.iter().filter(|(other, value)| *other != "type" && *other != key && !is_empty(value));
    if let Some(error) = others.find_map(|(other, _)| keys::refuse_unknown(Place::Part, other)) {
        return Err(error);
    }
    Ok((is_thought, crate::data::formats::fields::text(part, key)?))
}
