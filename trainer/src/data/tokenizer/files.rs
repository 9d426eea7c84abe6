//! Opens the tokenizer files of a Hugging Face directory.

use std::{collections::BTreeMap, path::Path};

use finetune_contract::FailureReason;
use serde_json::Value;
use tokenizers::AddedToken;

use crate::{
    data::tokenizer::added_tokens::{self, Declarations},
    failure::Failure,
};

/// Opens a tokenizer and adds special tokens to it, as `add_special_tokens` of transformers does.
/// Returns the tokenizer and the tokens that it did not have before, by id.
///
/// # Errors
/// As [`Tokenizer::load`](crate::data::tokenizer::Tokenizer::load).
pub fn open_with_added_tokens(
    directory: &Path,
    tokens: &[String],
) -> Result<(tokenizers::Tokenizer, BTreeMap<u32, AddedToken>), Failure> {
    let (mut inner, declarations) = open(directory)?;
    add_declared_tokens(&mut inner, &declarations, directory)?;
    let is_new = |token: &&String| inner.token_to_id(token).is_none();
    let new: Vec<&String> = tokens.iter().filter(is_new).collect();
    let added = tokens.iter().map(|token| AddedToken::from(token.as_str(), true));
    let added = inner.add_special_tokens(added.collect::<Vec<_>>());
    added.map_err(|error| Failure::new(FailureReason::InvalidModel, error.to_string()))?;
    let decoder = inner.get_added_tokens_decoder();
    let new = new.into_iter().filter_map(|token| {
        let id = inner.token_to_id(token)?;
        Some((id, decoder.get(&id)?.clone()))
    });
    let new = new.collect();
    Ok((inner, new))
}

/// Opens `tokenizer.json` and reads the files that declare more tokens.
pub(super) fn open(directory: &Path) -> Result<(tokenizers::Tokenizer, Declarations), Failure> {
    let invalid = |message: String| Failure::new(FailureReason::InvalidModel, message);
    let path = directory.join("tokenizer.json");
    if !path.exists() {
        return Err(invalid(format!(
            "{path:?} is missing: a model needs its fast tokenizer (save it with transformers' save_pretrained)"
        )));
    }
    let inner = tokenizers::Tokenizer::from_file(&path)
        .map_err(|error| invalid(format!("{path:?} cannot be used: {error}")))?;
    let json = |name: &str| read_json(&directory.join(name));
    let declarations = Declarations {
        settings: json("tokenizer_config.json")?,
        special_tokens_map: json("special_tokens_map.json")?,
        added_tokens: json("added_tokens.json")?,
    };
    Ok((inner, declarations))
}

/// Adds the declared tokens and returns the named ones, such as (`bos_token`, `<s>`).
pub(super) fn add_declared_tokens(
    inner: &mut tokenizers::Tokenizer,
    declarations: &Declarations,
    directory: &Path,
) -> Result<Vec<(String, String)>, Failure> {
    added_tokens::add(inner, declarations).map_err(|reason| {
        let message = format!("the tokens of {directory:?} cannot be used: {reason}");
        Failure::new(FailureReason::InvalidModel, message)
    })
}

/// Reads a JSON file; returns `null` if it does not exist.
pub(crate) fn read_json(path: &Path) -> Result<Value, Failure> {
    let invalid = |message: String| Failure::new(FailureReason::InvalidModel, message);
    match std::fs::read_to_string(path) {
        Ok(text) => serde_json::from_str(&text)
            .map_err(|error| invalid(format!("{path:?} is not JSON: {error}"))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Value::Null),
        Err(error) => Err(invalid(format!("{path:?} cannot be read: {error}"))),
    }
}

/// Returns all tokens that end generation: that of the tokenizer first, then those of the configs.
pub(super) fn eos_ids(eos: Option<u32>, configs: &[Value]) -> Vec<u32> {
    let mut ids: Vec<u32> = eos.into_iter().collect();
    for id in configs.iter().flat_map(listed_eos_ids) {
        if !ids.contains(&id) {
            ids.push(id);
        }
    }
    ids
}

/// Returns the tokens at which `generate` of transformers stops: those of `generation_config.json`, or
/// else of `config.json`. That of the tokenizer counts only if neither lists any.
pub(super) fn stop_ids(eos: Option<u32>, configs: &[Value]) -> Vec<u32> {
    let listed = configs.iter().map(listed_eos_ids).find(|ids| !ids.is_empty());
    listed.unwrap_or_else(|| eos.into_iter().collect())
}

fn listed_eos_ids(config: &Value) -> Vec<u32> {
    match config.get("eos_token_id") {
        Some(Value::Array(list)) => {
            list.iter().filter_map(Value::as_u64).map(|id| id as u32).collect()
        }
        Some(value) => value.as_u64().map(|id| id as u32).into_iter().collect(),
        None => Vec::new(),
    }
}
