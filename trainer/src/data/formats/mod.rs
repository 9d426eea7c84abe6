//! Parses a row, in any of the common formats, to an [`Example`].
//!
//! [`keys`] is the table of all known keys; `check_keys` refuses the others. One module parses each format:
//! `messages` (also ShareGPT), `gemini`, `pairs`, `alpaca`. All functions are pure.

mod alpaca;
mod check_keys;
mod content;
mod error;
mod fields;
mod gemini;
pub mod keys;
mod messages;
mod pairs;
mod parse;
#[cfg(test)]
mod properties;
mod redundant;
#[cfg(test)]
mod reference;
mod targets;
#[cfg(test)]
mod tests;
mod tools;

use finetune_contract::{DatasetFormat, DatasetSource, TrainOn};
use serde_json::{Map, Value};

pub use error::RowError;

use crate::data::{
    conversation::{Conversation, Example},
    formats::fields::{non_empty_text, non_null, required, resolve_alias},
};

/// How rows are parsed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadOptions {
    /// The format; `Auto` detects it from each row.
    pub format: DatasetFormat,
    /// Which turns of a conversation are trained on.
    pub train_on: TrainOn,
    /// Keys that are removed from rows.
    pub ignored_keys: Vec<String>,
}

impl ReadOptions {
    /// Returns the options of a dataset for rows of one format.
    pub fn of(dataset: &DatasetSource, format: DatasetFormat) -> Self {
        Self { format, train_on: dataset.train_on, ignored_keys: dataset.ignored_keys.clone() }
    }

    /// Creates default options for a format.
    pub fn for_format(format: DatasetFormat) -> Self {
        Self { format, train_on: TrainOn::AllTurns, ignored_keys: Vec::new() }
    }
}

/// Detects the format of a row by its keys.
///
/// # Errors
/// An error that lists the keys of the row and those that identify a format.
pub fn detect(row: &Map<String, Value>) -> Result<DatasetFormat, RowError> {
    let has = |key: &str| non_null(row, key).is_some();
    if has("messages") || gemini::is_gemini(row) {
        return Ok(DatasetFormat::Messages);
    }
    if has("conversations") || has("conversation") {
        return Ok(DatasetFormat::Sharegpt);
    }
    if has("instruction") && !(has("prompt") && has("completion")) {
        return Ok(DatasetFormat::Alpaca);
    }
    if pairs::is_pair(row) {
        return Ok(DatasetFormat::PromptCompletion);
    }
    if has("text") {
        return Ok(DatasetFormat::Text);
    }
    Err(undetected(row))
}

/// The keys that identify a format, for messages.
const SIGNATURE_KEYS: [&str; 5] = ["messages", "conversations", "prompt", "instruction", "text"];

fn undetected(row: &Map<String, Value>) -> RowError {
    if row.values().all(Value::is_null) {
        return RowError::new("the row is empty");
    }
    let near = row.keys().find_map(|key| nearest(key, &SIGNATURE_KEYS).map(|known| (key, known)));
    let hint = near.map_or(String::new(), |(key, known)| {
        format!(" (did you mean {known:?} instead of {key:?}?)")
    });
    let rows = row
        .iter()
        .find(|(_, value)| value.as_array().is_some_and(|list| list.iter().any(Value::is_object)));
    let nested = rows.map_or(String::new(), |(key, _)| {
        format!("; if the rows are the list under {key:?}, write that list alone")
    });
    RowError::new(format!(
        "the row has the keys {}, none of which is {}{hint}{nested}",
        quoted(row.keys().map(String::as_str)),
        quoted(SIGNATURE_KEYS.into_iter()),
    ))
}

/// Parses a row.
///
/// # Errors
/// All errors of its keys, or the first error of its values.
pub fn read(text: &str, options: &ReadOptions) -> Result<(DatasetFormat, Example), Vec<RowError>> {
    let mut row = parse::object(text).map_err(|error| vec![error])?;
    if !options.ignored_keys.is_empty() {
        ignore(&mut row, &options.ignored_keys);
    }
    let found = read_object(&row, options).map_err(|error| explain(&row, options, error))?;
    let errors = check_keys::check_row(&row, found.0, &contents(&found.1));
    if errors.is_empty() { Ok(found) } else { Err(errors) }
}

/// Adds errors of keys to the error of a row: a refused key is the actual cause, and an unknown key may
/// be a misspelling of a missing one.
fn explain(row: &Map<String, Value>, options: &ReadOptions, error: RowError) -> Vec<RowError> {
    let refused = check_keys::refused_keys(row);
    if !refused.is_empty() {
        return refused;
    }
    let format = match options.format {
        DatasetFormat::Auto => detect(row).ok(),
        format => Some(format),
    };
    let unknown =
        format.map_or_else(Vec::new, |_| check_keys::unknown_keys(row, error.suspected_typo()));
    std::iter::once(error).chain(unknown).collect()
}

/// Removes keys from a row and from its turns, content parts and tool calls.
fn ignore(object: &mut Map<String, Value>, keys: &[String]) {
    object.retain(|key, _| !keys.contains(key));
    for (key, value) in object.iter_mut() {
        // The keys inside tools and arguments are defined by the user.
        if ["tools", "functions", "arguments", "parameters", "chat_template_kwargs"]
            .contains(&key.as_str())
        {
            continue;
        }
        match value {
            Value::Object(inner) => ignore(inner, keys),
            Value::Array(list) => {
                list.iter_mut()
                    .filter_map(Value::as_object_mut)
                    .for_each(|inner| ignore(inner, keys));
            }
            _ => {}
        }
    }
}

fn read_object(
    row: &Map<String, Value>,
    options: &ReadOptions,
) -> Result<(DatasetFormat, Example), RowError> {
    let format = match options.format {
        DatasetFormat::Auto => detect(row)?,
        format => format,
    };
    let mut example = match format {
        DatasetFormat::Messages if gemini::is_gemini(row) => {
            check_mask(row)?;
            gemini::read(row)?
        }
        DatasetFormat::Messages => conversation(row, "messages")?,
        DatasetFormat::Sharegpt | DatasetFormat::Auto => {
            conversation(row, resolve_alias(row, &["conversations", "conversation"])?)?
        }
        DatasetFormat::Prerendered if !pairs::is_pair(row) => {
            Example::Prerendered { prompt: String::new(), completion: non_empty_text(row, "text")? }
        }
        DatasetFormat::Prerendered if non_null(row, "text").is_some() => {
            return Err(RowError::new(
                "\"text\" and a prompt both say what is trained on: keep one",
            ));
        }
        DatasetFormat::PromptCompletion | DatasetFormat::Prerendered => pairs::read(row, format)?,
        DatasetFormat::Text => Example::Text(non_empty_text(row, "text")?),
        DatasetFormat::Alpaca => alpaca::read(row)?,
    };
    if let Example::Chat(conversation) = &mut example {
        targets::apply_train_on(&mut conversation.messages, options.train_on)?;
    }
    check_label(row)?;
    Ok((format, example))
}

fn conversation(row: &Map<String, Value>, key: &str) -> Result<Example, RowError> {
    check_mask(row)?;
    let messages = messages::read(required(row, key)?, key)?;
    messages::build_conversation(row, messages).map(Example::Chat)
}

/// Refuses a mask of NeMo that leaves out other turns than the user's.
fn check_mask(row: &Map<String, Value>) -> Result<(), RowError> {
    if let Some(mask) = non_null(row, "mask")
        && !mask
            .as_str()
            .is_some_and(|mask| ["user", "human"].contains(&mask.to_lowercase().as_str()))
    {
        return Err(RowError::of_kind(
            "mask",
            format!(
                "\"mask\" is {}, but only the user's turns can be left out that way: mark turns with \"weight\": 0 instead",
                fields::shortened(mask)
            ),
        ));
    }
    Ok(())
}

/// Refuses `label: false`, which marks a bad answer in KTO datasets: it must not be trained on.
fn check_label(row: &Map<String, Value>) -> Result<(), RowError> {
    match non_null(row, "label") {
        None | Some(Value::Bool(true)) => Ok(()),
        Some(Value::Bool(false)) => Err(RowError::new(
            "\"label\" is false: it marks a bad answer, which must not be trained on; remove the row",
        )),
        Some(label) => Err(RowError::of_kind(
            "label",
            format!(
                "\"label\" is {}: only true (a good answer) is supported; remove the key, or list it in dataset.ignoredKeys",
                fields::shortened(label)
            ),
        )),
    }
}

/// Returns all texts of an example.
fn contents(example: &Example) -> Vec<&str> {
    match example {
        Example::Chat(Conversation { messages, .. }) => messages
            .iter()
            .flat_map(crate::data::conversation::Message::texts)
            .filter(|text| !text.is_empty())
            .collect(),
        Example::PromptCompletion { prompt, completion }
        | Example::Prerendered { prompt, completion } => vec![prompt, completion],
        Example::Text(text) => vec![text],
    }
}

/// Returns the known word that is most similar to a misspelled one.
pub fn nearest<'a>(format_name: &str, known: &[&'a str]) -> Option<&'a str> {
    known
        .iter()
        .map(|known| (strsim::damerau_levenshtein(format_name, known), *known))
        .filter(|&(distance, known)| distance > 0 && distance <= 1 + known.len() / 5)
        .min()
        .map(|(_, known)| known)
}

/// Returns the name of a format in the manifest.
fn format_name(format: DatasetFormat) -> String {
    serde_json::to_value(format)
        .ok()
        .and_then(|format_name| format_name.as_str().map(str::to_owned))
        .unwrap_or_default()
}

fn quoted<'a>(words: impl Iterator<Item = &'a str>) -> String {
    words.take(12).map(|format_name| format!("{format_name:?}")).collect::<Vec<_>>().join(", ")
}
