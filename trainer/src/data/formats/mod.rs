//! What a row says, in any of the shapes people have.
//!
//! [`keys`] is the table of every key that is known; a key that is not in it is refused. One module
//! reads each shape: `turns`, `pairs`, `alpaca`. Pure: text in, [`Example`] out.

mod alpaca;
mod content;
mod error;
mod fields;
pub mod keys;
mod pairs;
mod parse;
#[cfg(test)]
mod properties;
#[cfg(test)]
mod reference;
mod repeated;
mod targets;
#[cfg(test)]
mod tests;
mod tools;
mod turns;

use finetune_contract::{DatasetFormat, DatasetSource, TrainOn};
use serde_json::{Map, Value};

pub use error::RowError;

use crate::data::{
    conversation::{Conversation, Example},
    formats::fields::{filled_text, given, one_given, required},
};

/// How rows are read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadOptions {
    /// Their shape; `Auto` is detected row by row.
    pub format: DatasetFormat,
    /// Which turns of a conversation are trained on.
    pub train_on: TrainOn,
    /// Keys of rows that are left out.
    pub ignored_keys: Vec<String>,
}

impl ReadOptions {
    /// Takes the options that a dataset has for rows of one shape.
    pub fn of(dataset: &DatasetSource, format: DatasetFormat) -> Self {
        Self { format, train_on: dataset.train_on, ignored_keys: dataset.ignored_keys.clone() }
    }

    /// Makes options with the defaults.
    pub fn for_format(format: DatasetFormat) -> Self {
        Self { format, train_on: TrainOn::AllTurns, ignored_keys: Vec::new() }
    }
}

/// Finds the shape of a row by its keys.
///
/// # Errors
/// One that lists the keys seen and those known.
pub fn detect(row: &Map<String, Value>) -> Result<DatasetFormat, RowError> {
    let has = |key: &str| given(row, key).is_some();
    if has("messages") {
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

/// The keys that give a shape away, as a user should know them.
const SIGNATURES: [&str; 5] = ["messages", "conversations", "prompt", "instruction", "text"];

fn undetected(row: &Map<String, Value>) -> RowError {
    if row.values().all(Value::is_null) {
        return RowError::new("the row is empty");
    }
    let near = row.keys().find_map(|key| nearest(key, &SIGNATURES).map(|known| (key, known)));
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
        quoted(SIGNATURES.into_iter()),
    ))
}

/// Reads a row of a shape.
///
/// # Errors
/// Everything that is wrong with its keys, or the first thing that is wrong with its values.
pub fn read(text: &str, options: &ReadOptions) -> Result<(DatasetFormat, Example), Vec<RowError>> {
    let mut row = parse::object(text).map_err(|error| vec![error])?;
    if !options.ignored_keys.is_empty() {
        ignore(&mut row, &options.ignored_keys);
    }
    let found = read_object(&row, options).map_err(|error| explain(&row, options, error))?;
    let errors = keys::check_row(&row, found.0, &contents(&found.1));
    if errors.is_empty() { Ok(found) } else { Err(errors) }
}

/// Says what a row is that could not be read: a key that is refused is the cause, and one that is not
/// known may be why another is missing.
fn explain(row: &Map<String, Value>, options: &ReadOptions, error: RowError) -> Vec<RowError> {
    let refused = keys::refused_in(row);
    if !refused.is_empty() {
        return refused;
    }
    let format = match options.format {
        DatasetFormat::Auto => detect(row).ok(),
        format => Some(format),
    };
    let unknown = format.map_or_else(Vec::new, |_| keys::unknown_in(row, error.slip()));
    std::iter::once(error).chain(unknown).collect()
}

/// Takes keys out of a row and out of the turns, parts and calls in it.
fn ignore(object: &mut Map<String, Value>, keys: &[String]) {
    object.retain(|key, _| !keys.contains(key));
    for (key, value) in object.iter_mut() {
        // What tools are like, and what is said to them, is the user's own.
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
        DatasetFormat::Messages => conversation(row, "messages")?,
        DatasetFormat::Sharegpt | DatasetFormat::Auto => {
            conversation(row, one_given(row, &["conversations", "conversation"])?)?
        }
        DatasetFormat::Prerendered if !pairs::is_pair(row) => {
            Example::Prerendered { prompt: String::new(), completion: filled_text(row, "text")? }
        }
        DatasetFormat::Prerendered if given(row, "text").is_some() => {
            return Err(RowError::new(
                "\"text\" and a prompt both say what is trained on: keep one",
            ));
        }
        DatasetFormat::PromptCompletion | DatasetFormat::Prerendered => pairs::read(row, format)?,
        DatasetFormat::Text => Example::Text(filled_text(row, "text")?),
        DatasetFormat::Alpaca => alpaca::read(row)?,
    };
    if let Example::Chat(conversation) = &mut example {
        targets::choose(&mut conversation.messages, options.train_on)?;
    }
    check_label(row)?;
    Ok((format, example))
}

fn conversation(row: &Map<String, Value>, key: &str) -> Result<Example, RowError> {
    if let Some(mask) = given(row, "mask")
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
    let messages = turns::read(required(row, key)?, key)?;
    turns::with_surroundings(row, messages).map(Example::Chat)
}

/// `label` marks good and bad answers (KTO): a bad one must not be learned.
fn check_label(row: &Map<String, Value>) -> Result<(), RowError> {
    match given(row, "label") {
        None | Some(Value::Bool(true)) => Ok(()),
        Some(Value::Bool(false)) => Err(RowError::new(
            "\"label\" is false: the answer is marked as bad, and training would teach it; leave the row out",
        )),
        Some(label) => Err(RowError::of_kind(
            "label",
            format!(
                "\"label\" is {}: only true, a good answer, has a meaning here; remove the key, or list it in dataset.ignoredKeys",
                fields::shortened(label)
            ),
        )),
    }
}

/// Returns every text that was understood.
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

/// Returns the known word a misspelt one most likely means.
pub fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    known
        .iter()
        .map(|known| (strsim::damerau_levenshtein(word, known), *known))
        .filter(|&(distance, known)| distance > 0 && distance <= 1 + known.len() / 5)
        .min()
        .map(|(_, known)| known)
}

/// Returns a format as the manifest names it.
fn word(format: DatasetFormat) -> String {
    serde_json::to_value(format)
        .ok()
        .and_then(|word| word.as_str().map(str::to_owned))
        .unwrap_or_default()
}

fn quoted<'a>(words: impl Iterator<Item = &'a str>) -> String {
    words.take(12).map(|word| format!("{word:?}")).collect::<Vec<_>>().join(", ")
}
