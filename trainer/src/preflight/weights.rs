//! The weights of the base model, checked by their headers.

use std::collections::BTreeMap;

use finetune_contract::ProblemReason;

use crate::{
    architecture::{
        config::ModelConfig,
        names::{EMBEDDING_WEIGHT, HEAD_WEIGHT},
    },
    hf::{
        safetensors_header::{self, TensorEntry},
        tying,
        weights::{INDEX_FILE, SINGLE_FILE, shards_of_index, unused},
    },
    preflight::{Findings, MODEL_URI},
    store::{self, Entry, Store},
};

/// Bytes of two tensors that are compared at once.
const COMPARED_BYTES: u64 = 8 << 20;

/// What the weight files hold.
pub(super) struct Weights {
    /// Their bytes.
    pub(super) bytes: u64,
    /// The widest element type.
    pub(super) dtype: String,
}

/// A tensor and the file it is in.
struct Stored {
    file: String,
    entry: TensorEntry,
}

/// Reads the headers of all weight files and compares them with the config; unties the config if the
/// weights have a head that is not the embedding.
pub(super) fn check(
    store: &Store,
    entries: &[Entry],
    model: &mut ModelConfig,
    findings: &mut Findings,
) -> Option<Weights> {
    let files = match weight_files(store, entries) {
        Ok(files) => files,
        Err((reason, message)) => {
            findings.problem(reason, MODEL_URI, message);
            return None;
        }
    };
    let mut tensors: BTreeMap<String, Stored> = BTreeMap::new();
    let mut bytes = 0;
    for (file, size) in files {
        bytes += size;
        match read_header(store, &file, size) {
            Ok(found) => {
                for (name, entry) in found {
                    if let Some(other) = tensors.get(&name) {
                        let message = format!(
                            "{name} is in {} and in {file}: which one is meant cannot be known",
                            other.file
                        );
                        findings.problem(ProblemReason::InvalidModel, MODEL_URI, message);
                        return None;
                    }
                    tensors.insert(name, Stored { file: file.clone(), entry });
                }
            }
            Err((reason, message)) => {
                findings.problem(reason, &file, message);
                return None;
            }
        }
    }
    if tying::is_doubtful(model, |name| tensors.contains_key(name)) {
        match are_equal(store, &tensors[EMBEDDING_WEIGHT], &tensors[HEAD_WEIGHT]) {
            Ok(true) => {}
            Ok(false) => {
                *model = tying::untied(model.clone());
                findings.warning(
                    ProblemReason::InvalidModel,
                    MODEL_URI,
                    tying::OWN_HEAD.to_owned(),
                );
            }
            Err(error) => {
                findings.store_problem(MODEL_URI, &error);
                return None;
            }
        }
    }
    let entries: BTreeMap<String, TensorEntry> =
        tensors.into_iter().map(|(name, stored)| (name, stored.entry)).collect();
    compare(&entries, model, findings);
    let width = |dtype: &str| ["F16", "BF16", "F32"].iter().position(|known| *known == dtype);
    let dtypes = entries.values().map(|tensor| tensor.dtype.as_str());
    let widest = dtypes.max_by_key(|dtype| width(dtype)).unwrap_or_default();
    Some(Weights { bytes, dtype: widest.to_owned() })
}

/// Tells whether two tensors have the same bytes, reading no further than to the first difference.
fn are_equal(store: &Store, one: &Stored, other: &Stored) -> Result<bool, store::Error> {
    if !one.entry.is_like(&other.entry) {
        return Ok(false);
    }
    let length = one.entry.end - one.entry.start;
    for offset in (0..length).step_by(COMPARED_BYTES as usize) {
        let end = (offset + COMPARED_BYTES).min(length);
        let read = |tensor: &Stored| {
            let start = tensor.entry.start;
            store.read_range(&tensor.file, start + offset..start + end)
        };
        if read(one)? != read(other)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Warns of weight files that are not read because others are.
pub(super) fn warn_of_unread_files(entries: &[Entry], findings: &mut Findings) {
    let has = |name: &str| entries.iter().any(|entry| entry.path == name);
    if has(SINGLE_FILE) && has(INDEX_FILE) {
        let message = format!(
            "both {SINGLE_FILE} and {INDEX_FILE} are there: {SINGLE_FILE} is used, as transformers does (vLLM takes the index); remove what is stale"
        );
        findings.warning(ProblemReason::InvalidModel, MODEL_URI, message);
    }
}

fn weight_files(
    store: &Store,
    entries: &[Entry],
) -> Result<Vec<(String, u64)>, (ProblemReason, String)> {
    let size = |name: &str| entries.iter().find(|entry| entry.path == name).map(|entry| entry.size);
    // Where both are, transformers takes the single file.
    if let Some(size) = size(SINGLE_FILE) {
        return Ok(vec![(SINGLE_FILE.to_owned(), size)]);
    }
    if let Some(index_size) = size(INDEX_FILE) {
        let text = store.read_range(INDEX_FILE, 0..index_size).map_err(of_store)?;
        let shards = shards_of_index(&String::from_utf8_lossy(&text)).map_err(|reason| {
            (ProblemReason::InvalidModel, format!("{INDEX_FILE} is damaged: {reason}"))
        })?;
        return shards
            .into_keys()
            .map(|shard| match size(&shard) {
                Some(size) => Ok((shard, size)),
                None => Err((
                    ProblemReason::InvalidModel,
                    format!("{INDEX_FILE} names {shard:?}, which does not exist"),
                )),
            })
            .collect();
    }
    let pickles = [".bin", ".pt", ".pth", ".ckpt"];
    let unsafe_file =
        entries.iter().find(|entry| pickles.iter().any(|ending| entry.path.ends_with(ending)));
    let message = match unsafe_file {
        Some(entry) => format!(
            "the weights are a pickle ({}), which can run any code when opened: convert them with transformers' save_pretrained, which writes safetensors",
            entry.path
        ),
        None => format!("{} has no {SINGLE_FILE} and no {INDEX_FILE}", store.uri()),
    };
    Err((ProblemReason::InvalidModel, message))
}

pub(super) fn read_header(
    store: &Store,
    file: &str,
    size: u64,
) -> Result<BTreeMap<String, TensorEntry>, (ProblemReason, String)> {
    let damaged =
        |error: safetensors_header::Error| (ProblemReason::InvalidModel, error.to_string());
    let first = store.read_range(file, 0..size.min(8)).map_err(of_store)?;
    let length = safetensors_header::header_length(&first, size).map_err(damaged)?;
    let json = store.read_range(file, 8..8 + length).map_err(of_store)?;
    safetensors_header::parse(&json, size).map_err(damaged)
}

/// Keeps the store's own reason: a file that cannot be reached is not a damaged one.
fn of_store(error: store::Error) -> (ProblemReason, String) {
    (error.problem_reason(), error.to_string())
}

fn compare(tensors: &BTreeMap<String, TensorEntry>, model: &ModelConfig, findings: &mut Findings) {
    let (mut missing, mut misshapen) = (Vec::new(), Vec::new());
    for expected in model.tensors() {
        match tensors.get(&expected.name) {
            None => missing.push(expected.name),
            Some(found) if found.shape != expected.shape => {
                misshapen.push(format!(
                    "{} is {:?}, not {:?}",
                    expected.name, found.shape, expected.shape
                ));
            }
            Some(found) if !["F32", "F16", "BF16"].contains(&found.dtype.as_str()) => {
                misshapen.push(format!(
                    "{} has dtype {}, not F32, F16 or BF16",
                    expected.name, found.dtype
                ));
            }
            Some(_) => {}
        }
    }
    let some = |list: &[String]| {
        let more =
            if list.len() > 3 { format!(" and {} more", list.len() - 3) } else { String::new() };
        format!("{}{more}", list[..list.len().min(3)].join(", "))
    };
    let unexpected = unused(tensors.keys().map(String::as_str), model);
    if !unexpected.is_empty() {
        let message = format!(
            "the weights have {}, which a model of this config.json does not use: its answers would be wrong",
            some(&unexpected)
        );
        findings.problem(ProblemReason::InvalidModel, MODEL_URI, message);
    }
    if !missing.is_empty() {
        let message =
            format!("the weights lack {}: they do not belong to this config.json", some(&missing));
        findings.problem(ProblemReason::InvalidModel, MODEL_URI, message);
    }
    if !misshapen.is_empty() {
        findings.problem(
            ProblemReason::InvalidModel,
            MODEL_URI,
            format!("the weights do not fit config.json: {}", some(&misshapen)),
        );
    }
}

#[cfg(test)]
mod tests {
    use finetune_contract::ObjectUri;

    use super::*;
    use crate::store::{Environment, Role};

    #[test]
    fn weights_that_cannot_be_read_are_not_called_damaged() {
        let directory = tempfile::tempdir().unwrap();
        let uri = ObjectUri::parse(&format!("file://{}", directory.path().display())).unwrap();
        let store = Store::open(&uri, None, Role::Model, &Environment::default()).unwrap();
        let (reason, _) = read_header(&store, "gone.safetensors", 100).unwrap_err();
        assert_eq!(reason, ProblemReason::NotFound);
        std::fs::write(directory.path().join("short.safetensors"), [0; 4]).unwrap();
        let (reason, _) = read_header(&store, "short.safetensors", 4).unwrap_err();
        assert_eq!(reason, ProblemReason::InvalidModel);
    }
}
