//! Reads the values of an object by key. Null always counts as absent.

use serde_json::{Map, Value};

use crate::data::formats::{error::RowError, nearest};

/// Returns the value of a key; `None` if it is absent or null.
pub(super) fn non_null<'a>(object: &'a Map<String, Value>, key: &str) -> Option<&'a Value> {
    object.get(key).filter(|value| !value.is_null())
}

/// Returns whether a value is null, `""`, `[]` or an object of nulls.
pub(super) fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(object) => object.values().all(Value::is_null),
        Value::Bool(_) | Value::Number(_) => false,
    }
}

/// Returns the value of a required key.
pub(super) fn required<'a>(
    object: &'a Map<String, Value>,
    key: &str,
) -> Result<&'a Value, RowError> {
    if let Some(value) = object.get(key) {
        return Ok(value);
    }
    let near = object.keys().find(|found| nearest(found, &[key]).is_some());
    let hint = near
        .map_or(String::new(), |found| format!(" (did you mean {key:?} instead of {found:?}?)"));
    let error = RowError::of_kind(format!("missing {key}"), format!("{key:?} is missing{hint}"));
    Err(error.with_suspected_typo(near.map(String::as_str)))
}

/// Returns which of several synonymous keys a row uses; the first if it uses none.
///
/// # Errors
/// If it uses two of them with different values.
pub(super) fn resolve_alias<'a>(
    object: &Map<String, Value>,
    keys: &[&'a str],
) -> Result<&'a str, RowError> {
    let mut found = keys.iter().filter(|key| non_null(object, key).is_some());
    let Some(first) = found.next() else {
        return Ok(keys.iter().find(|key| object.contains_key(**key)).unwrap_or(&keys[0]));
    };
    match found.find(|other| object.get(**other) != object.get(*first)) {
        Some(other) => Err(RowError::new(format!(
            "{first:?} and {other:?} have the same meaning but differ: keep one"
        ))),
        None => Ok(first),
    }
}

/// Returns a required text.
pub(super) fn text(object: &Map<String, Value>, key: &str) -> Result<String, RowError> {
    as_text(required(object, key)?, key)
}

/// Returns a required text that must not be empty.
pub(super) fn non_empty_text(object: &Map<String, Value>, key: &str) -> Result<String, RowError> {
    let text = text(object, key)?;
    if text.is_empty() { Err(RowError::new(format!("{key:?} is empty"))) } else { Ok(text) }
}

/// Returns a text; `None` if it is absent or empty.
pub(super) fn optional_text(
    object: &Map<String, Value>,
    key: &str,
) -> Result<Option<String>, RowError> {
    let Some(value) = non_null(object, key) else { return Ok(None) };
    Ok(Some(as_text(value, key)?).filter(|text| !text.is_empty()))
}

/// Returns a value as text.
pub(super) fn as_text(value: &Value, key: &str) -> Result<String, RowError> {
    let found = match value {
        Value::String(text) => return Ok(text.clone()),
        Value::Null => "null".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "an object".to_owned(),
        Value::Bool(_) | Value::Number(_) => value.to_string(),
    };
    let message = format!("{key:?} is {found}, but it must be a string");
    Err(RowError::of_kind(format!("{key} is not a string"), message))
}

/// Returns a list. Datasets without nested columns have lists as JSON text, which is parsed.
pub(super) fn list(value: &Value, key: &str) -> Result<Vec<Value>, RowError> {
    let wrong = || {
        RowError::of_kind(
            format!("{key} is not a list"),
            format!("{key:?} is {}, but it must be a list", shortened(value)),
        )
    };
    match value {
        Value::Array(list) => Ok(list.clone()),
        Value::String(text) => match serde_json::from_str(text) {
            Ok(Value::Array(list)) => Ok(list),
            _ => Err(wrong()),
        },
        _ => Err(wrong()),
    }
}

/// Returns the JSON of a value, shortened for messages.
pub(super) fn shortened(value: &Value) -> String {
    let text = value.to_string();
    if text.len() <= 60 {
        return text;
    }
    format!("{}…", &text[..text.floor_char_boundary(60)])
}
