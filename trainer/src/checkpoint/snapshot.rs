//! The state of one step, out of training's way: what is written from while training goes on.

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
    params::flat::Flat,
    store::{self, PART_BYTES, file_parts},
};

/// What the header of a snapshot's file takes at most.
const HEADER_BYTES: usize = 1024;

/// A safetensors file of flat fp32 tensors, where it can be read in peace.
#[derive(Debug)]
pub(super) enum Snapshot {
    /// In memory.
    Memory(Bytes),
    /// On local disk; it goes with the snapshot.
    File(PathBuf),
}

/// Elements of a flat tensor that are asked for at once.
const AT_ONCE: usize = 1 << 20;

/// Room in memory for a snapshot, used again for the next.
#[derive(Debug, Default, Clone)]
pub(super) struct Room(Arc<Vec<u8>>);

impl AsRef<[u8]> for Room {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Room {
    /// Copies tensors.
    ///
    /// # Errors
    /// None that is known: memory does not refuse.
    pub(super) fn copy(&mut self, tensors: &[(&str, Flat<'_>)]) -> Result<Snapshot, Failure> {
        if Arc::get_mut(&mut self.0).is_none() {
            // A connection holds on to what it has sent.
            self.0 = Arc::default();
        }
        let room = Arc::get_mut(&mut self.0).expect("nobody else has what was just made");
        room.clear();
        let bytes: usize = tensors.iter().map(|(_, tensor)| 4 * tensor.length() as usize).sum();
        room.reserve_exact(bytes + HEADER_BYTES);
        write_flat(room, tensors).map_err(|error| failure(&error, "memory"))?;
        Ok(Snapshot::Memory(Bytes::from_owner(self.clone())))
    }
}

impl Snapshot {
    /// Writes tensors to a local file.
    ///
    /// # Errors
    /// A [`Failure`] if the disk refuses.
    pub(super) fn to_file(path: &Path, tensors: &[(&str, Flat<'_>)]) -> Result<Self, Failure> {
        let write = || {
            let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
            write_flat(&mut file, tensors)?;
            file.flush()
        };
        // Made before it is full, so that a file which could not be written is removed too.
        let snapshot = Self::File(path.to_owned());
        write().map_err(|error| failure(&error, &format!("{path:?}")))?;
        Ok(snapshot)
    }

    /// Returns its size, and its bytes part by part.
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

/// Bytes that come part by part.
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

/// Writes flat fp32 tensors.
fn write_flat(out: &mut impl Write, tensors: &[(&str, Flat<'_>)]) -> std::io::Result<()> {
    let declare = |(name, tensor): &(&str, Flat<'_>)| Declared {
        name: (*name).to_owned(),
        kind: Kind::Float,
        shape: vec![tensor.length()],
    };
    let declared: Vec<Declared> = tensors.iter().map(declare).collect();
    let mut next = tensors.iter();
    safetensors_writer::write_pieces(out, &declared, |_, put| {
        let (_, tensor) = next.next().expect("each declared tensor is asked for once, in order");
        (0..tensor.length()).step_by(AT_ONCE).try_for_each(|start| {
            put(&tensor.part(start, (AT_ONCE as i64).min(tensor.length() - start)))
        })
    })
}
