//! Refuses the keys of a row that would be lost, by the table of [`super::keys`].

use finetune_contract::DatasetFormat;
use serde_json::{Map, Value};

use crate::data::formats::{
    error::RowError,
    fields::is_empty,
    keys::{KEY_RULES, KeyRule, KeyScope, KeyUse},
    nearest,
    redundant::is_redundant,
};

fn find(scope: KeyScope, name: &str) -> impl Iterator<Item = &'static KeyRule> {
    KEY_RULES.iter().filter(move |known| known.scope == scope && known.names.contains(&name))
}

/// Returns why a key below the row is refused; `None` if it is allowed. Its value is not empty.
pub(super) fn refusal_of_key(scope: KeyScope, name: &str) -> Option<RowError> {
    match find(scope, name).next() {
        Some(KeyRule { key_use: KeyUse::Used(_) | KeyUse::Ignored, .. }) => None,
        Some(known) => Some(refusal(name, known)),
        None => Some(unknown(scope, name)),
    }
}

fn refusal(name: &str, known: &KeyRule) -> RowError {
    RowError::new(format!("{name:?} cannot be used: {}", known.note))
}

fn unknown(scope: KeyScope, name: &str) -> RowError {
    let known: Vec<&str> = KEY_RULES
        .iter()
        .filter(|known| known.scope == scope && matches!(known.key_use, KeyUse::Used(_)))
        .flat_map(|known| known.names.iter().copied())
        .collect();
    let hint =
        nearest(name, &known).map_or(String::new(), |known| format!(" (did you mean {known:?}?)"));
    RowError::new(format!(
        "the key {name:?} is unknown{hint}, so its content would be lost: remove it, or list it in dataset.ignoredKeys if it need not be trained on"
    ))
}

/// Returns an error for each refused key of a row. `contents` are the texts of the parsed row: a key of
/// another format is allowed if it only repeats them.
pub(super) fn check_row(
    row: &Map<String, Value>,
    format: DatasetFormat,
    contents: &[&str],
) -> Vec<RowError> {
    non_empty_entries(row)
        .filter_map(|(name, value)| refusal_of_row_key(name, value, format, contents))
        .collect()
}

/// Returns an error for each key that is refused in every format.
pub(super) fn refused_keys(row: &Map<String, Value>) -> Vec<RowError> {
    let refusals = non_empty_entries(row).filter_map(|(name, _)| {
        let known = find(KeyScope::Row, name).find(|known| known.key_use == KeyUse::Refused)?;
        Some(refusal(name, known))
    });
    refusals.collect()
}

/// Returns an error for each key that no format knows, except for one that is already reported.
pub(super) fn unknown_keys(row: &Map<String, Value>, reported: Option<&str>) -> Vec<RowError> {
    non_empty_entries(row)
        .filter(|(name, _)| reported != Some(name.as_str()))
        .filter(|(name, _)| find(KeyScope::Row, name).next().is_none())
        .map(|(name, _)| unknown(KeyScope::Row, name))
        .collect()
}

fn non_empty_entries(row: &Map<String, Value>) -> impl Iterator<Item = (&String, &Value)> {
    row.iter().filter(|(_, value)| !is_empty(value))
}

fn refusal_of_row_key(
    name: &str,
    value: &Value,
    format: DatasetFormat,
    contents: &[&str],
) -> Option<RowError> {
    if find(KeyScope::Row, name).next().is_none() {
        return Some(unknown(KeyScope::Row, name));
    }
    let mut other_format = false;
    for known in find(KeyScope::Row, name) {
        match known.key_use {
            KeyUse::Used(formats) if formats.contains(&format) => return None,
            KeyUse::Used(_) => other_format = true,
            KeyUse::Ignored => return None,
            KeyUse::Refused => return Some(refusal(name, known)),
        }
    }
    if other_format && !is_redundant(value, contents) {
        return Some(RowError::new(format!(
            "{name:?} is not used in rows of the format {}, so its content would be lost: remove it, or list it in dataset.ignoredKeys",
            crate::data::formats::format_name(format),
        )));
    }
    None
}
