//! A local directory of a base model: in place where possible, else a cached copy.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use crate::store::{Entry, Error, Store, transfer::sha256_hex};

/// Where transformers saves the chat templates that are not the default.
pub const TEMPLATE_FOLDER: &str = "additional_chat_templates";

/// Returns a local directory in Hugging Face layout for the model at the store's URI.
///
/// `file://` and `pvc://` are used in place. Others are fetched below `cache`, under a key of the
/// URI and the commit, or for object stores the sizes and tags of the listed files; so a changed
/// model gets a new directory. Only configuration, tokenizer, template and safetensors files are
/// fetched. Safe when several processes do it at once; an interrupted fetch goes on.
///
/// # Errors
/// [`Error`] if nothing is there, or the files cannot be fetched.
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
            detail: "no config.json, tokenizer or *.safetensors file is there; name a directory in Hugging Face layout".to_owned(),
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

/// Tells whether training or publishing reads the file; weights in other formats are not wanted.
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
