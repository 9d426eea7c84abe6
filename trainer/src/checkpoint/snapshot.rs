//! A copy of the training state of one step, which is written while training continues.

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use tch::Kind;

use crate::{
    failure::Failure,
    hf::safetensors_writer::{self, Declared},
    params::flat::FlatState,
    store::{self, PART_BYTES, file_parts},
};

/// The largest safetensors header of a snapshot.
const HEADER_BYTES: usize = 1024;

/// A safetensors file of flat fp32 tensors, independent of the tensors that training updates.
#[derive(Debug)]
pub(super) enum Snapshot {
    /// In memory.
    Memory(Bytes),
    /// On local disk; the file is removed when the snapshot is dropped.
    File(PathBuf),
}

/// Elements of a flat tensor that are converted at once.
const CHUNK_ELEMENTS: usize = 1 << 20;

/// A host buffer for a snapshot, reused for the next one.
#[derive(Debug, Default, Clone)]
pub(super) struct HostBuffer(Arc<Vec<u8>>);

impl AsRef<[u8]> for HostBuffer {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl HostBuffer {
    /// Copies tensors into the buffer.
    ///
    /// # Errors
    /// A [`Failure`] if a tensor cannot be serialised; writing to memory does not fail.
    pub(super) fn copy(&mut self, tensors: &[(&str, FlatState<'_>)]) -> Result<Snapshot, Failure> {
        if Arc::get_mut(&mut self.0).is_none() {
            // A connection still holds the bytes it has sent.
            self.0 = Arc::default();
        }
        let buffer = Arc::get_mut(&mut self.0).expect("the buffer has no other owner");
        buffer.clear();
        let bytes: usize = tensors.iter().map(|(_, tensor)| 4 * tensor.length() as usize).sum();
        buffer.reserve_exact(bytes + HEADER_BYTES);
        write_flat(buffer, tensors).map_err(|error| failure(&error, "memory"))?;
        Ok(Snapshot::Memory(Bytes::from_owner(self.clone())))
    }
}

impl Snapshot {
    /// Writes tensors to a local file.
    ///
    /// # Errors
    /// A [`Failure`] if the disk fails.
    pub(super) fn to_file(path: &Path, tensors: &[(&str, FlatState<'_>)]) -> Result<Self, Failure> {
        let write = || {
            let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
            write_flat(&mut file, tensors)?;
            file.flush()
        };
        // Created first, so that a partly written file is removed too.
        let snapshot = Self::File(path.to_owned());
        write().map_err(|error| failure(&error, &format!("{path:?}")))?;
        Ok(snapshot)
    }

    /// Returns the size of the file, and its bytes in parts.
    ///
    /// # Errors
    /// [`store::Error`] if the file cannot be read.
    pub(super) fn parts(&self) -> Result<(u64, Parts<'_>), store::Error> {
        match self {
            Self::Memory(bytes) => {
                let starts = (0..bytes.len()).step_by(PART_BYTES);
                let part = |start| bytes.slice(start..bytes.len().min(start + PART_BYTES));
                Ok((bytes.len() as u64, Box::new(starts.map(move |start| Ok(part(start))))))
            }
            Self::File(path) => {
                let (size, parts) = file_parts(path)?;
                Ok((size, Box::new(parts)))
            }
        }
    }
}

/// The bytes of a file in parts.
type Parts<'a> = Box<dyn Iterator<Item = Result<Bytes, store::Error>> + 'a>;

impl Drop for Snapshot {
    fn drop(&mut self) {
        if let Self::File(path) = self {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn failure(error: &std::io::Error, to: &str) -> Failure {
    Failure::from_io(error, &format!("cannot write a checkpoint to {to}"))
}

/// Writes tensors as a safetensors file.
fn write_flat(out: &mut impl Write, tensors: &[(&str, FlatState<'_>)]) -> std::io::Result<()> {
    let declare = |(name, tensor): &(&str, FlatState<'_>)| Declared {
        name: (*name).to_owned(),
        kind: Kind::Float,
        shape: vec![tensor.length()],
    };
    let declared: Vec<Declared> = tensors.iter().map(declare).collect();
    let mut next = tensors.iter();
    safetensors_writer::write_pieces(out, &declared, |_, put| {
        let (_, tensor) = next.next().expect("each declared tensor is written once, in order");
        (0..tensor.length()).step_by(CHUNK_ELEMENTS).try_for_each(|start| {
            put(&tensor.slice(start, (CHUNK_ELEMENTS as i64).min(tensor.length() - start)))
        })
    })
}
