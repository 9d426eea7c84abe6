//! Parses a row as a JSON object without duplicate keys.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use crate::data::formats::error::RowError;

/// Parses a row.
///
/// # Errors
/// What is wrong with the text, as a [`RowError`].
pub(super) fn object(text: &str) -> Result<Map<String, Value>, RowError> {
    let mut parser = serde_json::Deserializer::from_str(text);
    let parsed = Strict.deserialize(&mut parser).and_then(|value| parser.end().map(|()| value));
    match parsed {
        Ok(Value::Object(row)) => Ok(row),
        Ok(_) => Err(RowError::new("the row is JSON but not an object `{…}`")),
        Err(error) if error.is_data() => Err(RowError::of_kind(
            "JSON twice",
            // The location is not helpful: it is the end of the key, which the message names.
            error.to_string().split(" at line").next().unwrap_or_default().to_owned(),
        )),
        Err(error) => {
            // Most rows are one line of a file, so "line 1" would be confusing.
            let error = error.to_string().replace("line 1 column", "column");
            Err(RowError::of_kind("no JSON", format!("the row is not JSON: {error}")))
        }
    }
}

/// Deserializes a [`Value`] and refuses duplicate keys: most JSON parsers keep the last one and silently
/// drop the others.
#[derive(Clone, Copy)]
struct Strict;

impl<'de> DeserializeSeed<'de> for Strict {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element_seed(self)? {
            list.push(item);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            if object.contains_key(&key) {
                return Err(A::Error::custom(format!("the key {key:?} occurs twice: keep one")));
            }
            let value = entries.next_value_seed(self)?;
            object.insert(key, value);
        }
        Ok(Value::Object(object))
    }
}
