//! Writes small files and copies those of the base model.

use std::path::Path;

use serde_json::Value;

use crate::{data::chat::template_source, export::Error};

/// The files of a tokenizer and its chat template.
const TOKENIZER_FILES: [&str; 8] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
];

/// Writes a JSON file, indented by two spaces.
pub(super) fn write_json(path: &Path, value: &Value) -> Result<(), Error> {
    write_text(path, &format!("{value:#}\n"))
}

/// Writes a text file.
pub(super) fn write_text(path: &Path, text: &str) -> Result<(), Error> {
    std::fs::write(path, text).map_err(|source| Error::Write { path: path.to_owned(), source })
}

/// Copies the tokenizer, so that the result is self-contained; `chat_template` replaces that of the
/// base model.
pub(super) fn copy_tokenizer(
    base: &Path,
    chat_template: Option<&str>,
    directory: &Path,
) -> Result<(), Error> {
    copy(base, directory, &TOKENIZER_FILES)?;
    if let Some(template) = chat_template {
        return write_text(&directory.join("chat_template.jinja"), template);
    }
    let Ok(entries) = std::fs::read_dir(base.join(template_source::FOLDER)) else { return Ok(()) };
    let names: Vec<String> = entries
        .flatten()
        .filter_map(|entry| {
            Some(format!("{}/{}", template_source::FOLDER, entry.file_name().to_str()?))
        })
        .collect();
    let folder = directory.join(template_source::FOLDER);
    std::fs::create_dir_all(&folder).map_err(|source| Error::Write { path: folder, source })?;
    names.iter().try_for_each(|name| copy(base, directory, &[name]))
}

/// Copies the named files that exist.
pub(super) fn copy(base: &Path, directory: &Path, names: &[&str]) -> Result<(), Error> {
    for name in names.iter().filter(|name| base.join(name).exists()) {
        let path = directory.join(name);
        std::fs::copy(base.join(name), &path).map_err(|source| Error::Write { path, source })?;
    }
    Ok(())
}
