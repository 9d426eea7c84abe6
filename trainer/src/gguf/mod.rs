//! Converting a GGUF file to a Hugging Face directory: config, bf16 weights, tokenizer, template.

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

/// What to convert.
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
/// A [`Failure`] that says what of the file cannot be used, or that `--to` is taken.
pub fn run(arguments: &Arguments) -> Result<(), Failure> {
    let to = &arguments.to;
    let is_empty = || to.read_dir().is_ok_and(|mut entries| entries.next().is_none());
    if to.exists() && !is_empty() {
        return Err(Failure::new(
            FailureReason::InvalidConfiguration,
            format!("{to:?} exists already: name another directory with --to, or remove it"),
        ));
    }
    convert(&arguments.from, to)
}

/// Returns a local Hugging Face directory of a model, whatever it is stored as.
///
/// # Errors
/// A [`Failure`] if it cannot be fetched, or a GGUF file cannot be converted.
pub fn local_directory(store: &Store, cache: &Path) -> Result<PathBuf, Failure> {
    if !store.uri().path.ends_with(".gguf") {
        return Ok(fetch_model(store, cache)?);
    }
    if store.size("")?.is_none() {
        return Err(Failure::new(
            FailureReason::InvalidModel,
            format!("nothing is at {}", store.uri()),
        ));
    }
    // Two files quantized alike have one size, so a size would not tell a newer file from this one.
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
        // It is not needed again, and as large as the model.
        std::fs::remove_file(&path)
            .map_err(|error| Failure::from_io(&error, &format!("cannot make {directory:?}")))
    })?;
    Ok(directory)
}

/// Writes the directory of a file: it is there complete or not at all.
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
