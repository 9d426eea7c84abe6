//! Checks the weights of the base model by their headers.

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
    preflight::findings::{Findings, MODEL_URI},
    store::{self, Entry, Store},
};

/// The number of bytes of two tensors that are compared at once.
const COMPARED_BYTES: u64 = 8 << 20;

/// A summary of the weight files.
pub(super) struct Weights {
    /// Their total size in bytes.
    pub(super) bytes: u64,
    /// The widest element type.
    pub(super) dtype: String,
}

/// A tensor and its file.
struct Stored {
    file: String,
    entry: TensorEntry,
}

/// Reads the headers of all weight files and compares them with the config; unties the config if the
/// weights have a head that differs from the embedding.
pub(super) fn check(
    store: &Store,
    entries: &[Entry],
    model: &mut ModelConfig,
    findings: &mut Findings,
) -> Option<Weights> {
    let files = match weight_files(store, entries) {
        Ok(files) => files,
        Err((reason, message)) => {
            findings.add_problem(reason, MODEL_URI, message);
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
                            "{name} is in both {} and {file}: remove one of them",
                            other.file
                        );
                        findings.add_problem(ProblemReason::InvalidModel, MODEL_URI, message);
                        return None;
                    }
                    tensors.insert(name, Stored { file: file.clone(), entry });
                }
            }
            Err((reason, message)) => {
                findings.add_problem(reason, &file, message);
                return None;
            }
        }
    }
    if tying::needs_comparison(model, |name| tensors.contains_key(name)) {
        match are_equal(store, &tensors[EMBEDDING_WEIGHT], &tensors[HEAD_WEIGHT]) {
            Ok(true) => {}
            Ok(false) => {
                *model = tying::untied(model.clone());
                findings.add_warning(
                    ProblemReason::InvalidModel,
                    MODEL_URI,
                    tying::UNTIED_HEAD_WARNING.to_owned(),
                );
            }
            Err(error) => {
                findings.add_store_error(MODEL_URI, &error);
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

/// Returns whether two tensors have the same bytes; stops reading at the first difference.
fn are_equal(store: &Store, one: &Stored, other: &Stored) -> Result<bool, store::Error> {
    if !one.entry.has_same_layout(&other.entry) {
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

/// Warns about weight files that are ignored because others take precedence.
pub(super) fn warn_about_unread_files(entries: &[Entry], findings: &mut Findings) {
    let has = |name: &str| entries.iter().any(|entry| entry.path == name);
    if has(SINGLE_FILE) && has(INDEX_FILE) {
        let message = format!(
            "both {SINGLE_FILE} and {INDEX_FILE} exist: {SINGLE_FILE} is used, as in transformers (vLLM uses the index); remove the stale one"
        );
        findings.add_warning(ProblemReason::InvalidModel, MODEL_URI, message);
    }
}

fn weight_files(
    store: &Store,
    entries: &[Entry],
) -> Result<Vec<(String, u64)>, (ProblemReason, String)> {
    let size = |name: &str| entries.iter().find(|entry| entry.path == name).map(|entry| entry.size);
    // transformers prefers the single file to an index.
    if let Some(size) = size(SINGLE_FILE) {
        return Ok(vec![(SINGLE_FILE.to_owned(), size)]);
    }
    if let Some(index_size) = size(INDEX_FILE) {
        let text = store.read_range(INDEX_FILE, 0..index_size).map_err(from_store)?;
        let shards = shards_of_index(&String::from_utf8_lossy(&text)).map_err(|reason| {
            (ProblemReason::InvalidModel, format!("{INDEX_FILE} is damaged: {reason}"))
        })?;
        return shards
            .into_keys()
            .map(|shard| match size(&shard) {
                Some(size) => Ok((shard, size)),
                None => Err((
                    ProblemReason::InvalidModel,
                    format!("{INDEX_FILE} lists {shard:?}, which does not exist"),
                )),
            })
            .collect();
    }
    let pickles = [".bin", ".pt", ".pth", ".ckpt"];
    let unsafe_file =
        entries.iter().find(|entry| pickles.iter().any(|ending| entry.path.ends_with(ending)));
    let message = match unsafe_file {
        Some(entry) => format!(
            "the weights are a pickle ({}), which can execute any code when loaded: convert them with transformers' save_pretrained, which writes safetensors",
            entry.path
        ),
        None => format!("{} has neither {SINGLE_FILE} nor {INDEX_FILE}", store.uri()),
    };
    Err((ProblemReason::InvalidModel, message))
}

/// Reads and parses the header of a safetensors file.
pub(super) fn read_header(
    store: &Store,
    file: &str,
    size: u64,
) -> Result<BTreeMap<String, TensorEntry>, (ProblemReason, String)> {
    let damaged =
        |error: safetensors_header::Error| (ProblemReason::InvalidModel, error.to_string());
    let first = store.read_range(file, 0..size.min(8)).map_err(from_store)?;
    let length = safetensors_header::header_length(&first, size).map_err(damaged)?;
    let json = store.read_range(file, 8..8 + length).map_err(from_store)?;
    safetensors_header::parse(&json, size).map_err(damaged)
}

/// Keeps the reason of the store: an unreachable file is not a damaged one.
fn from_store(error: store::Error) -> (ProblemReason, String) {
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
    let first_three = |list: &[String]| {
        let more =
            if list.len() > 3 { format!(" and {} more", list.len() - 3) } else { String::new() };
        format!("{}{more}", list[..list.len().min(3)].join(", "))
    };
    let unexpected = unused(tensors.keys().map(String::as_str), model);
    if !unexpected.is_empty() {
        let message = format!(
            "the weights have {}, which a model with this config.json does not use: its output would be wrong",
            first_three(&unexpected)
        );
        findings.add_problem(ProblemReason::InvalidModel, MODEL_URI, message);
    }
    if !missing.is_empty() {
        let message = format!(
            "the weights lack {}: they do not belong to this config.json",
            first_three(&missing)
        );
        findings.add_problem(ProblemReason::InvalidModel, MODEL_URI, message);
    }
    if !misshapen.is_empty() {
        findings.add_problem(
            ProblemReason::InvalidModel,
            MODEL_URI,
            format!("the weights do not fit config.json: {}", first_three(&misshapen)),
        );
    }
}

#[cfg(test)]
mod tests {
    use finetune_contract::testing::file_uri;

    use super::*;
    use crate::store::{Environment, Role};

    #[test]
    fn unreachable_weights_are_not_reported_as_damaged() {
        let directory = tempfile::tempdir().unwrap();
        let uri = file_uri(directory.path());
        let store = Store::open(&uri, None, Role::Model, &Environment::default()).unwrap();
        let (reason, _) = read_header(&store, "gone.safetensors", 100).unwrap_err();
        assert_eq!(reason, ProblemReason::NotFound);
        std::fs::write(directory.path().join("short.safetensors"), [0; 4]).unwrap();
        let (reason, _) = read_header(&store, "short.safetensors", 4).unwrap_err();
        assert_eq!(reason, ProblemReason::InvalidModel);
    }
}
