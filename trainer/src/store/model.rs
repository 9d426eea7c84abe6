//! Bringing a base model to this machine once.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

use super::{Entry, Error, Store};
use crate::hex;

/// Written into a directory when every file is there.
const COMPLETE: &str = ".complete";

/// Returns a local Hugging Face directory of a model: in place when it is already on this machine,
/// else fetched into `cache`, once for all runs that use the same files.
///
/// An interrupted fetch goes on where it stopped; two processes that want the same model wait for
/// each other.
///
/// # Errors
/// [`Error`].
pub fn fetch_model(store: &Store, cache: &Path) -> Result<PathBuf, Error> {
    if let Some(directory) = store.local_path("") {
        return Ok(directory);
    }
    let files: Vec<Entry> =
        store.list()?.into_iter().filter(|entry| is_model_file(&entry.path)).collect();
    if files.is_empty() {
        return Err(Error::NotFound { uri: format!("a model at {}", store.uri()) });
    }
    let directory = cache.join(key(store, &files));
    let local = |error: std::io::Error| Error::local(&directory, &error);
    std::fs::create_dir_all(&directory).map_err(local)?;
    let lock = File::create(directory.join(".lock")).map_err(local)?;
    lock.lock().map_err(local)?;
    if directory.join(COMPLETE).exists() {
        return Ok(directory);
    }
    for entry in &files {
        let to = directory.join(&entry.path);
        let has_size = std::fs::metadata(&to).is_ok_and(|metadata| metadata.len() == entry.size);
        if !has_size {
            store.fetch(&entry.path, &to)?;
        }
    }
    File::create(directory.join(COMPLETE)).map_err(local)?;
    Ok(directory)
}

/// Names the directory of exactly these files: a hub commit, or names and sizes in a bucket.
fn key(store: &Store, files: &[Entry]) -> String {
    let mut hash = Sha256::new();
    hash.update(store.uri().to_string());
    hash.update(store.resolved_revision().unwrap_or_default());
    for entry in files {
        hash.update(format!("\n{} {}", entry.path, entry.size));
    }
    let name: String = store
        .uri()
        .file_name()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .collect();
    format!("{name}-{}", &hex(&hash.finalize())[..16])
}

/// Tells whether training or its result needs a file of a model repository.
///
/// Not pickles, not other frameworks' weights, not a second copy under another name.
fn is_model_file(path: &str) -> bool {
    let is_weights = path.starts_with("model")
        && (path.ends_with(".safetensors") || path.ends_with(".safetensors.index.json"));
    let is_text = matches!(
        path,
        "config.json"
            | "generation_config.json"
            | "tokenizer.json"
            | "tokenizer_config.json"
            | "special_tokens_map.json"
            | "added_tokens.json"
            | "vocab.json"
            | "merges.txt"
            | "chat_template.jinja"
            | "chat_template.json"
    );
    is_weights || is_text
}

#[cfg(test)]
mod tests {
    use super::is_model_file;

    #[test]
    fn takes_what_is_needed_and_nothing_unsafe() {
        for path in [
            "config.json",
            "model.safetensors",
            "model-00001-of-00002.safetensors",
            "model.safetensors.index.json",
            "chat_template.jinja",
        ] {
            assert!(is_model_file(path), "{path}");
        }
        for path in [
            "pytorch_model.bin",
            "consolidated.safetensors",
            "original/model.safetensors",
            "onnx/model.onnx",
            "README.md",
        ] {
            assert!(!is_model_file(path), "{path}");
        }
    }
}
