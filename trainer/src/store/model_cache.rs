//! Provides a local directory of a base model: in place if possible, otherwise a cached copy.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use crate::store::{Entry, Error, Store, transfer::sha256_hex};

/// The folder in which transformers saves additional chat templates.
pub const TEMPLATE_FOLDER: &str = "additional_chat_templates";

/// Returns a local directory in Hugging Face layout for the model at the URI of the store.
///
/// `file://` and `pvc://` are used in place. Other models are fetched into `cache`. The cache key is the
/// URI with the commit or, for object stores, with the sizes and tags of the files, so a changed model
/// gets a new directory. Only configuration, tokenizer, template and safetensors files are fetched.
/// Several processes may fetch the same model at once; an interrupted fetch resumes.
///
/// # Errors
/// [`Error`] if there are no model files, or they cannot be fetched.
pub fn fetch_model(store: &Store, cache: &Path) -> Result<PathBuf, Error> {
    if let Some(path) = store.local_path("") {
        return Ok(path);
    }
    let wanted: Vec<(Entry, Option<String>)> =
        store.list_tagged()?.into_iter().filter(|(entry, _)| is_model_file(&entry.path)).collect();
    if wanted.is_empty() {
        return Err(Error::NotFound {
            action: "fetch the model at",
            uri: store.uri().to_string(),
            detail: "it has no config.json, tokenizer or *.safetensors file; give a directory in Hugging Face layout".to_owned(),
        });
    }
    let identity = match store.resolved_revision() {
        Some(commit) => format!("{}\n{commit}", store.uri()),
        None => format!("{}\n{wanted:?}", store.uri()),
    };
    let directory = cache.join(&sha256_hex(identity.as_bytes())[..32]);
    let create = |error| Error::local("create", &directory, error);
    fs::create_dir_all(&directory).map_err(create)?;
    let complete = directory.join(".complete");
    let lock = File::create(directory.join(".lock")).map_err(create)?;
    lock.lock().map_err(|error| Error::local("lock", &directory, error))?;
    if complete.exists() {
        return Ok(directory);
    }
    for (entry, _) in &wanted {
        let to = directory.join(&entry.path);
        if !to.metadata().is_ok_and(|meta| meta.len() == entry.size) {
            store.fetch(&entry.path, &to)?;
        }
    }
    File::create(&complete).map_err(create)?;
    Ok(directory)
}

/// Returns whether training or publishing reads the file. Weights in other formats are not read.
pub fn is_model_file(path: &str) -> bool {
    const NAMES: [&str; 12] = [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "chat_template.json",
        "tokenizer.model",
        "model.safetensors.index.json",
    ];
    let is_template = path
        .strip_prefix(TEMPLATE_FOLDER)
        .is_some_and(|name| name.starts_with('/') && name.ends_with(".jinja"));
    is_template || !path.contains('/') && (NAMES.contains(&path) || path.ends_with(".safetensors"))
}
