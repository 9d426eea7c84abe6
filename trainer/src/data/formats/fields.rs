//! The values of an object, read by key: null is absent, wherever it stands.

use serde_json::{Map, Value};

use crate::data::formats::{error::RowError, nearest};

/// Returns the value of a key that is given: neither absent nor null.
pub(super) fn given<'a>(object: &'a Map<String, Value>, key: &str) -> Option<&'a Value> {
    object.get(key).filter(|value| !value.is_null())
}

/// Tells whether a value says nothing: null, `""`, `[]` or `{}`.
pub(super) fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(object) => object.values().all(Value::is_null),
        Value::Bool(_) | Value::Number(_) => false,
    }
}

/// Returns the value of a key that must be given.
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
    Err(error.with_slip(near.map(String::as_str)))
}

/// Returns which of the keys that mean the same is given; the first if none is.
///
/// # Errors
/// If two of them are, with different values.
pub(super) fn one_given<'a>(
    object: &Map<String, Value>,
    keys: &[&'a str],
) -> Result<&'a str, RowError> {
    let mut found = keys.iter().filter(|key| given(object, key).is_some());
    let Some(first) = found.next() else {
        return Ok(keys.iter().find(|key| object.contains_key(**key)).unwrap_or(&keys[0]));
    };
    match found.find(|other| object.get(**other) != object.get(*first)) {
        Some(other) => Err(RowError::new(format!(
            "{first:?} and {other:?} mean the same and differ: keep one"
        ))),
        None => Ok(first),
    }
}

/// Returns a text that must be given.
pub(super) fn text(object: &Map<String, Value>, key: &str) -> Result<String, RowError> {
    as_text(required(object, key)?, key)
}

/// Returns a text that must be given and not be empty.
pub(super) fn filled_text(object: &Map<String, Value>, key: &str) -> Result<String, RowError> {
    let text = text(object, key)?;
    if text.is_empty() { Err(RowError::new(format!("{key:?} is empty"))) } else { Ok(text) }
}

/// Returns a text if it is given; an empty one is not.
pub(super) fn optional_text(
    object: &Map<String, Value>,
    key: &str,
) -> Result<Option<String>, RowError> {
    let Some(value) = given(object, key) else { return Ok(None) };
    Ok(Some(as_text(value, key)?).filter(|text| !text.is_empty()))
}

/// Returns a value that must be a text.
pub(super) fn as_text(value: &Value, key: &str) -> Result<String, RowError> {
    let seen = match value {
        Value::String(text) => return Ok(text.clone()),
        Value::Null => "null".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "an object".to_owned(),
        Value::Bool(_) | Value::Number(_) => value.to_string(),
    };
    let message = format!("{key:?} is {seen}, it must be a string");
    Err(RowError::of_kind(format!("{key} is no string"), message))
}

/// Returns a list; one that is written as JSON text, as datasets without nested columns have it, is
/// parsed.
pub(super) fn list(value: &Value, key: &str) -> Result<Vec<Value>, RowError> {
    let wrong = || {
        RowError::of_kind(
            format!("{key} is no list"),
            format!("{key:?} is {}, it must be a list", shortened(value)),
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

/// Returns a value as short JSON, for messages.
pub(super) fn shortened(value: &Value) -> String {
    let text = value.to_string();
    if text.len() <= 60 {
        return text;
    }
    format!("{}…", &text[..text.floor_char_boundary(60)])
}
