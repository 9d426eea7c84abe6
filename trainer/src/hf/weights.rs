//! Hugging Face weight files (safetensors), mapped into memory and never copied.
//!
//! Maps live as long as the process: a frozen base model is used until the end anyway, several
//! processes share its pages, and no tensor can outlive its bytes.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    path::{Path, PathBuf},
};

use memmap2::Mmap;
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::{
    architecture::{config::ModelConfig, names::HEAD_WEIGHT},
    hf::safetensors_header::{self, TensorEntry},
};

/// The name of an unsharded weight file.
pub const SINGLE_FILE: &str = "model.safetensors";
/// The name of the index of sharded weights.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// The name of the file with the embedding and head of a base model to which tokens were added; its
/// tensors replace those of the other weight files.
pub const EXTENDED_FILE: &str = "extended-for-added-tokens.safetensors";

/// Why weights cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be opened or mapped.
    #[error("cannot read {path:?}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The error of the system.
        #[source]
        source: std::io::Error,
    },
    /// The header of a file is invalid.
    #[error("{path:?} is damaged")]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: safetensors_header::Error,
    },
    /// The index of sharded weights is invalid.
    #[error("{path:?} is damaged: {reason}")]
    Index {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A tensor is missing.
    #[error("{directory:?} has no tensor {name:?}")]
    Missing {
        /// The directory of the weights.
        directory: PathBuf,
        /// The tensor.
        name: String,
    },
    /// A tensor that the model does not use.
    #[error(
        "{directory:?} has the tensor {name:?}, which a model of its config.json does not use: the loaded model would compute something else"
    )]
    Unused {
        /// The directory of the weights.
        directory: PathBuf,
        /// The tensor.
        name: String,
    },
    /// A tensor has an unsupported element type.
    #[error("tensor {name:?} has dtype {dtype}, but only F32, F16 and BF16 can be used")]
    Dtype {
        /// The tensor.
        name: String,
        /// The element type, as the file names it.
        dtype: String,
    },
    /// A tensor has another shape than the config requires.
    #[error("tensor {name:?} has shape {found:?}, but the config requires {expected:?}")]
    Shape {
        /// The tensor.
        name: String,
        /// The shape in the file.
        found: Vec<usize>,
        /// The shape that the config requires.
        expected: Vec<usize>,
    },
}

/// The opened weight files of a directory, or one of them.
#[derive(Debug)]
pub struct WeightFiles {
    directory: PathBuf,
    tensors: BTreeMap<String, (TensorEntry, &'static [u8])>,
}

impl WeightFiles {
    /// Opens the weights of a Hugging Face directory: `model.safetensors`, or the shards of its index.
    ///
    /// # Errors
    /// [`Error`] if a file is missing or damaged, or the index names a tensor its shard lacks.
    pub fn open(directory: &Path) -> Result<Self, Error> {
        let mut weights = Self::open_published(directory)?;
        let extended = directory.join(EXTENDED_FILE);
        if extended.exists() {
            weights.tensors.extend(Self::open_file(&extended)?.tensors);
        }
        Ok(weights)
    }

    fn open_published(directory: &Path) -> Result<Self, Error> {
        let index_path = directory.join(INDEX_FILE);
        let single = directory.join(SINGLE_FILE);
        // transformers prefers the single file to an index.
        if single.exists() || !index_path.exists() {
            return Self::open_file(&single);
        }
        let text = std::fs::read_to_string(&index_path)
            .map_err(|source| Error::Read { path: index_path.clone(), source })?;
        let shards = shards_of_index(&text)
            .map_err(|reason| Error::Index { path: index_path.clone(), reason })?;
        let mut weights = Self { directory: directory.to_owned(), tensors: BTreeMap::new() };
        for (shard, names) in shards {
            let opened = Self::open_file(&directory.join(&shard))?;
            if let Some(name) = names.iter().find(|name| !opened.tensors.contains_key(*name)) {
                let reason =
                    format!("it says that {shard:?} contains {name:?}, but the file does not");
                return Err(Error::Index { path: index_path, reason });
            }
            let duplicate = opened.tensors.keys().find(|name| weights.contains(name));
            if let Some(name) = duplicate {
                let reason = format!("{name:?} is in more than one shard");
                return Err(Error::Index { path: index_path, reason });
            }
            weights.tensors.extend(opened.tensors);
        }
        Ok(weights)
    }

    /// Checks that a model with this config uses every tensor.
    ///
    /// # Errors
    /// [`Error::Unused`].
    pub fn check_all_used(&self, config: &ModelConfig) -> Result<(), Error> {
        match unused(self.names(), config).into_iter().next() {
            None => Ok(()),
            Some(name) => Err(Error::Unused { directory: self.directory.clone(), name }),
        }
    }

    /// Opens one safetensors file.
    ///
    /// # Errors
    /// [`Error::Read`] or [`Error::Header`].
    pub fn open_file(path: &Path) -> Result<Self, Error> {
        let read = |source| Error::Read { path: path.to_owned(), source };
        let file = File::open(path).map_err(read)?;
        #[expect(unsafe_code, reason = "mapping a file is unsafe because others may change it")]
        // SAFETY: the map is read-only. Base models are not written while a run uses them; a file
        // truncated under us would end the process by SIGBUS, as it does for every mmap reader.
        let map = unsafe { Mmap::map(&file) }.map_err(read)?;
        let bytes: &'static [u8] = &Box::leak(Box::new(map))[..];
        let damaged = |source| Error::Header { path: path.to_owned(), source };
        let size = bytes.len() as u64;
        let length = safetensors_header::header_length(bytes, size).map_err(damaged)? as usize;
        let entries = safetensors_header::parse(&bytes[8..8 + length], size).map_err(damaged)?;
        let tensors = entries
            .into_iter()
            .map(|(name, entry)| {
                let data = &bytes[entry.start as usize..entry.end as usize];
                (name, (entry, data))
            })
            .collect();
        Ok(Self { directory: path.parent().unwrap_or(path).to_owned(), tensors })
    }

    /// Lists the names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Returns the headers of all tensors.
    pub fn entries(&self) -> BTreeMap<String, TensorEntry> {
        self.tensors.iter().map(|(name, (entry, _))| (name.clone(), entry.clone())).collect()
    }

    /// Returns whether two tensors have the same type, shape and bytes; false if one is missing.
    pub fn are_equal(&self, one: &str, other: &str) -> bool {
        let (Some((one, left)), Some((other, right))) =
            (self.tensors.get(one), self.tensors.get(other))
        else {
            return false;
        };
        one.has_same_layout(other) && left == right
    }

    /// Returns whether the files have a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Returns a read-only view of a tensor, in the element type of the file, on the CPU.
    ///
    /// The view must never be written to.
    ///
    /// # Errors
    /// [`Error::Missing`] or [`Error::Dtype`].
    pub fn tensor(&self, name: &str) -> Result<Tensor, Error> {
        let Some((entry, data)) = self.tensors.get(name) else {
            return Err(Error::Missing {
                directory: self.directory.clone(),
                name: name.to_owned(),
            });
        };
        let kind = match entry.dtype.as_str() {
            "F32" => Kind::Float,
            "F16" => Kind::Half,
            "BF16" => Kind::BFloat16,
            dtype => return Err(Error::Dtype { name: name.to_owned(), dtype: dtype.to_owned() }),
        };
        let shape: Vec<i64> = entry.shape.iter().map(|&size| size as i64).collect();
        if data.as_ptr().align_offset(kind.elt_size_in_bytes()) != 0 {
            // The format allows unaligned tensors, though no writer produces them.
            return Ok(Tensor::from_data_size(data, &shape, kind));
        }
        #[expect(unsafe_code, reason = "a tensor over mapped bytes has no safe constructor")]
        // SAFETY: the bytes live for the rest of the process, are aligned for `kind`, and the header
        // was checked, so there are as many as `shape` needs.
        Ok(unsafe {
            Tensor::from_blob(data.as_ptr(), &shape, &contiguous(&shape), kind, Device::Cpu)
        })
    }

    /// Returns a tensor after checking its shape.
    ///
    /// # Errors
    /// [`Error`] if it is missing, of another shape, or of an unusable dtype.
    pub fn tensor_of(&self, name: &str, shape: &[usize]) -> Result<Tensor, Error> {
        if let Some((entry, _)) = self.tensors.get(name)
            && entry.shape != shape
        {
            return Err(Error::Shape {
                name: name.to_owned(),
                found: entry.shape.clone(),
                expected: shape.to_vec(),
            });
        }
        self.tensor(name)
    }
}

/// Lists the tensors that a model with this config does not use.
///
/// Two unused tensors are harmless and not listed: the rotary table of old models, and the head of a
/// tied model, which repeats the embedding.
pub fn unused<'a>(names: impl Iterator<Item = &'a str>, config: &ModelConfig) -> Vec<String> {
    let expected: BTreeSet<String> =
        config.tensors().into_iter().map(|tensor| tensor.name).collect();
    let is_harmless = |name: &str| {
        name.ends_with("rotary_emb.inv_freq") || (name == HEAD_WEIGHT && config.tie_word_embeddings)
    };
    names
        .filter(|name| !expected.contains(*name) && !is_harmless(name))
        .map(str::to_owned)
        .collect()
}

/// Reads an index into shard file → names of its tensors.
///
/// # Errors
/// A message that says what is wrong with the index.
pub fn shards_of_index(text: &str) -> Result<BTreeMap<String, Vec<String>>, String> {
    let value: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let map = value.get("weight_map").and_then(Value::as_object).ok_or("it has no weight_map")?;
    let mut shards: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (name, shard) in map {
        let shard =
            shard.as_str().ok_or_else(|| format!("the shard of {name:?} is not a string"))?;
        if shard.contains(['/', '\\']) || !shard.ends_with(".safetensors") {
            return Err(format!(
                "{shard:?} is not the name of a safetensors file beside the index"
            ));
        }
        shards.entry(shard.to_owned()).or_default().push(name.clone());
    }
    Ok(shards)
}

/// Returns the strides of a contiguous tensor.
fn contiguous(shape: &[i64]) -> Vec<i64> {
    let mut strides = vec![1; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis] * shape[axis];
    }
    strides
}
