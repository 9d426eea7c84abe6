//! Converts a GGUF file to a Hugging Face directory: config, bf16 weights, tokenizer and chat template.

mod config;
mod dequantize;
pub mod reader;
#[cfg(test)]
mod tests;
mod tokenizer;
mod weights;

use std::path::{Path, PathBuf};

use clap::Args;
use finetune_contract::FailureReason;
use sha2::{Digest, Sha256};

use crate::{
    failure::Failure,
    gguf::reader::Gguf,
    hex,
    store::{Store, directory, fetch_model},
};

/// The file to convert and the directory to write.
#[derive(Debug, Args)]
pub struct Arguments {
    /// The GGUF file.
    #[arg(long)]
    from: PathBuf,
    /// The directory to write.
    #[arg(long)]
    to: PathBuf,
}

/// Converts a local file.
///
/// # Errors
/// A [`Failure`] if the file cannot be converted, or if the directory exists and is not empty.
pub fn run(arguments: &Arguments) -> Result<(), Failure> {
    let to = &arguments.to;
    let is_empty = || to.read_dir().is_ok_and(|mut entries| entries.next().is_none());
    if to.exists() && !is_empty() {
        return Err(Failure::new(
            FailureReason::InvalidConfiguration,
            format!("{to:?} already exists: choose another directory with --to, or remove it"),
        ));
    }
    convert(&arguments.from, to)
}

/// Returns a local Hugging Face directory of a model, which may be stored as such or as a GGUF file.
///
/// # Errors
/// A [`Failure`] if the model cannot be fetched or a GGUF file cannot be converted.
pub fn local_model_directory(store: &Store, cache: &Path) -> Result<PathBuf, Failure> {
    if !store.uri().path.ends_with(".gguf") {
        return Ok(fetch_model(store, cache)?);
    }
    if store.size("")?.is_none() {
        return Err(Failure::new(
            FailureReason::InvalidModel,
            format!("nothing is at {}", store.uri()),
        ));
    }
    // The size cannot be the key: a newer file with the same quantization has the same size.
    let key = match store.resolved_revision() {
        Some(commit) => format!("{} {commit}", store.uri()),
        None => format!("{} {:?}", store.uri(), store.list_tagged()?),
    };
    let directory = cache.join(format!("gguf-{}", &hex(&Sha256::digest(key))[..16]));
    directory::once(&directory, || {
        if let Some(path) = store.local_path("") {
            return convert(&path, &directory);
        }
        let path = directory.with_extension("gguf");
        store.fetch("", &path)?;
        convert(&path, &directory)?;
        // The file is as large as the model and no longer needed.
        std::fs::remove_file(&path)
            .map_err(|error| Failure::from_io(&error, &format!("cannot remove {path:?}")))
    })?;
    Ok(directory)
}

/// Converts a file. The directory appears complete or not at all.
pub(crate) fn convert(from: &Path, to: &Path) -> Result<(), Failure> {
    let gguf = Gguf::open(from)
        .map_err(|error| Failure::new(FailureReason::InvalidModel, format!("{from:?}: {error}")))?;
    directory::create(to, |partial| write(&gguf, from, partial))
}

fn write(gguf: &Gguf, from: &Path, to: &Path) -> Result<(), Failure> {
    let invalid =
        |reason: String| Failure::new(FailureReason::InvalidModel, format!("{from:?}: {reason}"));
    let disk = |error: std::io::Error| Failure::from_io(&error, &format!("cannot write {to:?}"));
    let write = |name: &str, value: &serde_json::Value| {
        let text = format!("{value:#}\n");
        std::fs::write(to.join(name), text).map_err(disk)
    };
    let config = config::config(gguf).map_err(invalid)?;
    write("config.json", &config)?;
    write("generation_config.json", &config::generation_config(gguf))?;
    let tokenizer = tokenizer::build(gguf).map_err(invalid)?;
    write("tokenizer.json", &tokenizer.tokenizer)?;
    write("tokenizer_config.json", &tokenizer.settings)?;
    if let Some(template) = gguf.text("tokenizer.chat_template") {
        std::fs::write(to.join("chat_template.jinja"), template).map_err(disk)?;
    }
    weights::write(gguf, &config, to)
        .map_err(|failure| Failure::new(failure.reason, format!("{from:?}: {failure}")))
}
