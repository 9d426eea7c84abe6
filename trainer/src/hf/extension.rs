//! Adds tokens to a base model: creates a second directory with the tokens in its tokenizer and with
//! rows for them in embedding and head.
//!
//! Later steps use that directory like any other. Files that do not change are symbolic links.
//!
//! # Source
//! `add_special_tokens` of `transformers` for the ids: a new token gets the next one.
//! `resize_token_embeddings` with `mean_resizing` for the rows: the mean of the existing rows.
//! Differs: the noise that transformers adds (a covariance scaled by 1e-9) is omitted, so the result
//! depends on nothing but the model.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use finetune_contract::FailureReason;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tch::{Kind, Tensor};

use crate::{
    architecture::names::{EMBEDDING_WEIGHT, HEAD_WEIGHT},
    data::tokenizer::files::{open_with_added_tokens, read_json},
    failure::Failure,
    hex,
    hf::{
        safetensors_writer::{self, Declared},
        weights::{EXTENDED_FILE, Error as WeightsError, WeightFiles},
    },
    store::directory,
};

const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

/// The effect of adding tokens to a tokenizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extension {
    /// The number of tokens that the tokenizer did not have before.
    pub new_tokens: u32,
    /// The number of embedding rows that the ids of the added tokens need.
    pub rows: usize,
}

/// Returns a directory of the model at `base` with tokens added; `base` itself without tokens.
///
/// # Errors
/// A [`Failure`] if the tokenizer or the weights of `base` cannot be used, or the disk fails.
pub fn add_tokens(base: &Path, tokens: &[String], cache: &Path) -> Result<PathBuf, Failure> {
    if tokens.is_empty() {
        return Ok(base.to_owned());
    }
    let directory = cache.join(format!("extended-{}", cache_key(base, tokens)?));
    directory::once(&directory, || {
        directory::create(&directory, |partial| {
            let Extension { rows, .. } = extend_config_and_tokenizer(base, tokens, partial)?;
            extend_weights(base, rows, partial)
        })
    })?;
    Ok(directory)
}

/// Fills an empty directory with the model at `base` and adds tokens to its config and tokenizer, but
/// not to its weights.
///
/// # Errors
/// A [`Failure`] if the files cannot be read or written.
pub fn extend_config_and_tokenizer(
    base: &Path,
    tokens: &[String],
    to: &Path,
) -> Result<Extension, Failure> {
    let disk = |error: std::io::Error| Failure::from_io(&error, &format!("cannot write {to:?}"));
    let write = |name: &str, text: &str| fs::write(to.join(name), text).map_err(disk);
    let (inner, new) = open_with_added_tokens(base, tokens)?;
    write(TOKENIZER, &inner.to_string(true).map_err(|error| invalid(&error.to_string()))?)?;
    let mut settings = read_json(&base.join(TOKENIZER_CONFIG))?;
    // Some configs list the added tokens again; then the list must be complete.
    if let Some(list) = settings.get_mut("added_tokens_decoder").and_then(Value::as_object_mut) {
        for (id, token) in &new {
            let mut token = json!(token);
            token.as_object_mut().map(|token| token.shift_remove("id"));
            list.insert(id.to_string(), token);
        }
        write(TOKENIZER_CONFIG, &format!("{settings:#}\n"))?;
    }
    let last = tokens.iter().filter_map(|token| inner.token_to_id(token)).max();
    let rows = last.map_or(0, |last| last as usize + 1);
    let mut config = read_json(&base.join(CONFIG))?;
    if let Some(vocab_size) = config.get("vocab_size").and_then(Value::as_u64)
        && vocab_size < rows as u64
    {
        config["vocab_size"] = json!(rows);
    }
    write(CONFIG, &format!("{config:#}\n"))?;
    for entry in fs::read_dir(base).map_err(disk)? {
        let entry = entry.map_err(disk)?;
        let to = to.join(entry.file_name());
        if !to.exists() {
            let from = entry.path().canonicalize().map_err(disk)?;
            symlink(from, to).map_err(disk)?;
        }
    }
    Ok(Extension { new_tokens: new.len() as u32, rows })
}

/// Writes the embedding and the head with `rows` rows, if they have fewer.
fn extend_weights(base: &Path, rows: usize, to: &Path) -> Result<(), Failure> {
    let unusable = |error: WeightsError| Failure::from_chain(FailureReason::InvalidModel, &error);
    let weights = WeightFiles::open(base).map_err(unusable)?;
    let (mut declared, mut tensors) = (Vec::new(), Vec::new());
    for name in [EMBEDDING_WEIGHT, HEAD_WEIGHT] {
        if !weights.contains(name) {
            continue;
        }
        let tensor = weights.tensor(name).map_err(unusable)?;
        let size = tensor.size();
        if let [old_rows, width] = size[..]
            && old_rows < rows as i64
        {
            declared.push(Declared {
                name: name.to_owned(),
                kind: tensor.kind(),
                shape: vec![rows as i64, width],
            });
            tensors.push(extended(&tensor, rows as i64));
        }
    }
    if declared.is_empty() {
        return Ok(());
    }
    let path = to.join(EXTENDED_FILE);
    let mut tensors = tensors.into_iter();
    safetensors_writer::write(&path, &declared, |_| {
        tensors.next().ok_or_else(|| std::io::Error::other("fewer tensors than declared"))
    })
    .map_err(|error: std::io::Error| Failure::from_io(&error, &format!("cannot write {path:?}")))?;
    Ok(())
}

/// Returns `[rows, width]` for `[old_rows, width]`; each new row is the mean of the old ones.
fn extended(tensor: &Tensor, rows: i64) -> Tensor {
    let mean = tensor.mean_dim(&[0_i64][..], true, Kind::Double).to_kind(tensor.kind());
    let new = mean.expand([rows - tensor.size()[0], -1], false);
    Tensor::cat(&[tensor, &new], 0)
}

/// Returns the cache key of an extended model: its files with sizes and times, and the tokens.
fn cache_key(base: &Path, tokens: &[String]) -> Result<String, Failure> {
    let disk = |error: std::io::Error| Failure::from_io(&error, &format!("cannot read {base:?}"));
    let mut files = Vec::new();
    for entry in fs::read_dir(base).map_err(disk)? {
        let path = entry.map_err(disk)?.path();
        let meta = path.metadata().map_err(disk)?;
        files.push(format!("{path:?} {} {:?}", meta.len(), meta.modified().map_err(disk)?));
    }
    files.sort_unstable();
    Ok(hex(&Sha256::digest(format!("{tokens:?} {files:?}")))[..16].to_owned())
}

fn invalid(message: &str) -> Failure {
    Failure::new(FailureReason::InvalidModel, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        data::{chat::rendering::Rendering, tokenizer::Tokenizer},
        hf::read_config,
    };

    /// Adds tokens to a tiny random model of `tests/golden/gen.py`.
    fn check(family: &str, tokens: &[&str]) -> (PathBuf, PathBuf) {
        let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/data");
        let base = data.join(family);
        let tokens: Vec<String> = tokens.iter().map(|&token| token.to_owned()).collect();
        let cache = tempfile::tempdir().unwrap().keep();
        let directory = add_tokens(&base, &tokens, &cache).unwrap();
        assert_eq!(add_tokens(&base, &tokens, &cache).unwrap(), directory);
        (base, directory)
    }

    #[test]
    fn a_new_token_has_the_next_id_and_the_mean_of_all_rows() {
        let (base, directory) = check("llama", &["<|call|>", "<|result|>"]);
        let [before, after] = [&base, &directory].map(|path| read_config(path).unwrap().vocab_size);
        let load = |path: &Path| Tokenizer::load(path, &Rendering::of_model()).unwrap();
        let first = load(&base).vocab_size();
        let tokenizer = load(&directory);
        assert_eq!(tokenizer.vocab_size(), first + 2);
        assert_eq!(after, before.max(first as usize + 2));
        let ids = tokenizer.encode("<|call|><|result|>", false).unwrap();
        assert_eq!(ids, [first, first + 1]);
        assert!(ids.iter().all(|&id| tokenizer.is_special(id)));
        let [old, new] = [&base, &directory]
            .map(|path| WeightFiles::open(path).unwrap().tensor(EMBEDDING_WEIGHT).unwrap());
        assert_eq!(new.size()[0], after as i64);
        assert!(new.narrow(0, 0, before as i64).equal(&old));
        let mean = old.mean_dim(&[0_i64][..], false, Kind::Double).to_kind(old.kind());
        for row in before..after {
            assert!(new.get(row as i64).equal(&mean));
        }
        fs::remove_dir_all(directory.parent().unwrap()).unwrap();
    }

    #[test]
    fn without_tokens_the_directory_stays_the_same() {
        let base = Path::new("somewhere");
        assert_eq!(add_tokens(base, &[], Path::new("/no/such")).unwrap(), base);
    }
}
