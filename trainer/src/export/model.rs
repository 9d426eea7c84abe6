//! Writes a Hugging Face model directory: weights sharded by size, and their index last.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::{
    architecture::{modules::TensorSpec, names},
    export::{
        Error, Export, files,
        merge::{merged, unties},
    },
    hf::{
        safetensors_writer::{self, Declared},
        weights::{INDEX_FILE, SINGLE_FILE, WeightFiles},
    },
    model::{Model, master::Masters},
};

/// The file with the settings of generation, which transformers and servers read.
const GENERATION_CONFIG: &str = "generation_config.json";
/// The maximum size of a shard, as in transformers 5.
const SHARD_BYTES: u64 = 5_000_000_000;

/// Writes the model with all files that a server or trainer needs.
pub(super) fn write(export: &Export<'_>, directory: &Path) -> Result<(), Error> {
    let unties = unties(&export.training.model);
    write_config(export, unties, directory)?;
    files::copy_tokenizer(export.base, export.chat_template, directory)?;
    files::copy(export.base, directory, &[GENERATION_CONFIG])?;
    if let Some(token) = export.end_of_turn {
        let path = directory.join(GENERATION_CONFIG);
        let published = std::fs::read_to_string(&path).unwrap_or_default();
        let config = &export.training.model.config().source;
        files::write_json(&path, &with_stop_token(token, &published, config))?;
    }
    write_weights(export, unties, SHARD_BYTES, directory)
}

/// Adds a token to those at which generation stops.
fn with_stop_token(token: u32, published: &str, config: &Map<String, Value>) -> Value {
    let parsed = serde_json::from_str::<Map<String, Value>>(published);
    let mut generation = parsed.unwrap_or_default();
    let listed = [generation.get("eos_token_id"), config.get("eos_token_id")];
    let mut ids = match listed.into_iter().flatten().find(|value| !value.is_null()) {
        Some(Value::Array(ids)) => ids.clone(),
        Some(id) => vec![id.clone()],
        None => Vec::new(),
    };
    ids.push(json!(token));
    generation.insert("eos_token_id".to_owned(), Value::Array(ids));
    Value::Object(generation)
}

fn write_config(export: &Export<'_>, unties: bool, directory: &Path) -> Result<(), Error> {
    let mut config = export.training.model.config().source.clone();
    if unties {
        config.insert("tie_word_embeddings".to_owned(), Value::Bool(false));
    }
    files::write_json(&directory.join("config.json"), &Value::Object(config))
}

fn write_weights(
    export: &Export<'_>,
    unties: bool,
    shard_bytes: u64,
    directory: &Path,
) -> Result<(), Error> {
    let model = &export.training.model;
    let base = WeightFiles::open(export.base).map_err(Error::Base)?;
    let mut specs = model.config().tensors();
    if unties {
        let config = model.config();
        specs.push(TensorSpec {
            name: format!("{}.weight", names::LM_HEAD),
            shape: vec![config.vocab_size, config.hidden_size],
        });
    }
    let declared = specs.into_iter().map(|spec| {
        // The result has the element types of the base model; a head that was tied has that of the
        // embedding.
        let source = if base.contains(&spec.name) {
            spec.name.clone()
        } else {
            format!("{}.weight", names::EMBED_TOKENS)
        };
        let kind = base.tensor(&source).map_err(Error::Base)?.kind();
        Ok(Declared {
            name: spec.name,
            kind,
            shape: spec.shape.iter().map(|&size| size as i64).collect(),
        })
    });
    let declared = declared.collect::<Result<Vec<_>, Error>>()?;
    let shards = shards(declared, shard_bytes);
    let count = shards.len();
    let mut weight_map = Map::new();
    let (mut total_size, mut total_parameters) = (0, 0);
    let mut masters = Masters::of(model);
    for (index, shard) in shards.iter().enumerate() {
        let file = if count == 1 {
            SINGLE_FILE.to_owned()
        } else {
            format!("model-{:05}-of-{count:05}.safetensors", index + 1)
        };
        let path = directory.join(&file);
        safetensors_writer::write(&path, shard, |declared| {
            merged(&mut masters, &base, &declared.name).map_err(ShardError::Export)
        })
        .map_err(|error| match error {
            ShardError::Write(source) => Error::Write { path: path.clone(), source },
            ShardError::Export(error) => error,
        })?;
        for tensor in shard {
            total_size += tensor.bytes();
            total_parameters += tensor.shape.iter().product::<i64>();
            weight_map.insert(tensor.name.clone(), json!(file));
        }
    }
    if count > 1 {
        let metadata = json!({"total_parameters": total_parameters, "total_size": total_size});
        let index = json!({"metadata": metadata, "weight_map": weight_map});
        files::write_json(&directory.join(INDEX_FILE), &index)?;
    }
    Ok(())
}

/// Contributes the shards of this rank to the weights that rank 0 writes, in the same order.
pub(super) fn contribute(model: &Model) -> Result<(), Error> {
    let mut masters = Masters::of(model);
    for spec in model.config().tensors() {
        masters.get(&spec.name)?;
    }
    Ok(())
}

/// Why a shard could not be written.
enum ShardError {
    Write(std::io::Error),
    Export(Error),
}

impl From<std::io::Error> for ShardError {
    fn from(error: std::io::Error) -> Self {
        Self::Write(error)
    }
}

/// Assigns tensors to shards in order; a tensor larger than a shard gets its own.
fn shards(declared: Vec<Declared>, shard_bytes: u64) -> Vec<Vec<Declared>> {
    let mut shards: Vec<Vec<Declared>> = Vec::new();
    let mut free_bytes = 0;
    for tensor in declared {
        let bytes = tensor.bytes();
        match shards.last_mut() {
            Some(shard) if bytes <= free_bytes => shard.push(tensor),
            _ => {
                free_bytes = shard_bytes.max(bytes);
                shards.push(vec![tensor]);
            }
        }
        free_bytes -= bytes;
    }
    shards
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    #[test]
    fn fills_shards_in_order() {
        let tensor = |elements: i64| Declared {
            name: elements.to_string(),
            kind: Kind::BFloat16,
            shape: vec![elements],
        };
        let sizes = |elements: &[i64]| {
            let shards = shards(elements.iter().copied().map(tensor).collect(), 20);
            shards
                .iter()
                .map(|shard| shard.iter().map(|tensor| tensor.shape[0]).collect::<Vec<_>>())
                .collect::<Vec<_>>()
        };
        assert_eq!(sizes(&[4, 6, 1]), [vec![4, 6], vec![1]]);
        assert_eq!(sizes(&[50, 1, 9]), [vec![50], vec![1, 9]]);
    }
}
