//! Turning a GGUF file into a Hugging Face directory: config, bf16 weights, tokenizer, template.

mod config;
mod dequantize;
pub mod gguf;
mod tokenizer;
mod weights;

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use clap::Args;
use finetune_contract::FailureReason;
use sha2::{Digest, Sha256};

use self::gguf::Gguf;
use crate::{
    failure::Failure,
    hex,
    store::{Store, fetch_model},
};

/// What to import.
#[derive(Debug, Args)]
pub struct Arguments {
    /// The GGUF file.
    #[arg(long)]
    from: PathBuf,
    /// The directory to write.
    #[arg(long)]
    to: PathBuf,
}

/// Imports a local file.
///
/// # Errors
/// A [`Failure`] that says what of the file cannot be used.
pub fn run(arguments: &Arguments) -> Result<(), Failure> {
    import(&arguments.from, &arguments.to)
}

/// Returns a local Hugging Face directory of a model, whatever it is stored as.
///
/// # Errors
/// A [`Failure`] if it cannot be fetched, or a GGUF file cannot be imported.
pub fn local_directory(store: &Store, cache: &Path) -> Result<PathBuf, Failure> {
    if !store.uri().path.ends_with(".gguf") {
        return Ok(fetch_model(store, cache)?);
    }
    let Some(size) = store.size("")? else {
        return Err(Failure::new(
            FailureReason::InvalidModel,
            format!("nothing is at {}", store.uri()),
        ));
    };
    let key = format!("{} {} {size}", store.uri(), store.resolved_revision().unwrap_or_default());
    let directory = cache.join(format!("gguf-{}", &hex(&Sha256::digest(key))[..16]));
    let disk =
        |error: std::io::Error| Failure::from_io(&error, &format!("cannot make {directory:?}"));
    std::fs::create_dir_all(cache).map_err(disk)?;
    // Two runs that want the same file wait for each other.
    let lock = File::create(directory.with_extension("lock")).map_err(disk)?;
    lock.lock().map_err(disk)?;
    if !directory.exists() {
        let file = if let Some(path) = store.local_path("") {
            path
        } else {
            let path = directory.with_extension("gguf");
            store.fetch("", &path)?;
            path
        };
        import(&file, &directory)?;
    }
    Ok(directory)
}

/// Writes the directory under another name and renames it: it is there complete or not at all.
fn import(from: &Path, to: &Path) -> Result<(), Failure> {
    let gguf = Gguf::open(from)
        .map_err(|error| Failure::new(FailureReason::InvalidModel, format!("{from:?}: {error}")))?;
    let invalid =
        |reason: String| Failure::new(FailureReason::InvalidModel, format!("{from:?}: {reason}"));
    let partial = to.with_extension("partial");
    let disk =
        |error: std::io::Error| Failure::from_io(&error, &format!("cannot write {partial:?}"));
    if partial.exists() {
        std::fs::remove_dir_all(&partial).map_err(disk)?;
    }
    std::fs::create_dir_all(&partial).map_err(disk)?;
    let write = |name: &str, value: &serde_json::Value| {
        let text = format!("{value:#}\n");
        std::fs::write(partial.join(name), text).map_err(disk)
    };
    let config = config::config(&gguf).map_err(invalid)?;
    write("config.json", &config)?;
    write("generation_config.json", &config::generation_config(&gguf))?;
    let tokenizer = tokenizer::build(&gguf).map_err(invalid)?;
    write("tokenizer.json", &tokenizer.tokenizer)?;
    write("tokenizer_config.json", &tokenizer.settings)?;
    if let Some(template) = gguf.text("tokenizer.chat_template") {
        std::fs::write(partial.join("chat_template.jinja"), template).map_err(disk)?;
    }
    weights::write(&gguf, &config, &partial)?;
    std::fs::rename(&partial, to).map_err(disk)
}
