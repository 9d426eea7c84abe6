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
    dist,
    failure::Failure,
    model::{Model, params::Flat},
    store::{self, PART_BYTES, file_parts},
    tensor_file::{self, Declared},
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
    /// Copies tensors that are whole on this rank.
    ///
    /// # Errors
    /// None that is known: memory does not refuse, and whole tensors need no other rank.
    pub(super) fn copy(
        &mut self,
        model: &Model,
        tensors: &[(&str, Flat<'_>)],
    ) -> Result<Snapshot, Failure> {
        if Arc::get_mut(&mut self.0).is_none() {
            // A connection holds on to what it has sent.
            self.0 = Arc::default();
        }
        let room = Arc::get_mut(&mut self.0).expect("nobody else has what was just made");
        room.clear();
        let bytes: usize = tensors.iter().map(|(_, tensor)| 4 * tensor.length() as usize).sum();
        room.reserve_exact(bytes + HEADER_BYTES);
        write_flat(room, model, tensors).map_err(|failed| failed.into_failure("memory"))?;
        Ok(Snapshot::Memory(Bytes::from_owner(self.clone())))
    }
}

impl Snapshot {
    /// Writes tensors, whole or divided over ranks, to a local file.
    ///
    /// # Errors
    /// A [`Failure`] if the disk refuses or another rank is lost.
    pub(super) fn to_file(
        path: &Path,
        model: &Model,
        tensors: &[(&str, Flat<'_>)],
    ) -> Result<Self, Failure> {
        let write = || -> Result<(), Failed> {
            let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
            write_flat(&mut file, model, tensors)?;
            Ok(file.flush()?)
        };
        // Made before it is full, so that a file which could not be written is removed too.
        let snapshot = Self::File(path.to_owned());
        write().map_err(|failed| failed.into_failure(&format!("{path:?}")))?;
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

/// Takes part in what [`Snapshot::to_file`] does on rank 0.
///
/// # Errors
/// [`dist::Error`] if another rank is lost.
pub(super) fn follow(model: &Model, tensors: &[(&str, Flat<'_>)]) -> Result<(), dist::Error> {
    let Some(sharded) = model.sharded_training() else { return Ok(()) };
    tensors.iter().try_for_each(|(_, tensor)| sharded.for_each_piece(*tensor, |_| Ok(())))
}

/// Why flat tensors could not be written.
enum Failed {
    Write(std::io::Error),
    Ranks(dist::Error),
}

impl Failed {
    fn into_failure(self, to: &str) -> Failure {
        match self {
            Self::Write(error) => {
                Failure::from_io(&error, &format!("cannot write a checkpoint to {to}"))
            }
            Self::Ranks(error) => error.into(),
        }
    }
}

impl From<std::io::Error> for Failed {
    fn from(error: std::io::Error) -> Self {
        Self::Write(error)
    }
}

impl From<dist::Error> for Failed {
    fn from(error: dist::Error) -> Self {
        Self::Ranks(error)
    }
}

/// Writes flat fp32 tensors, undivided; parts are gathered a unit at a time.
fn write_flat(
    out: &mut impl Write,
    model: &Model,
    tensors: &[(&str, Flat<'_>)],
) -> Result<(), Failed> {
    let sharded = model.sharded_training();
    let declare = |(name, tensor): &(&str, Flat<'_>)| Declared {
        name: (*name).to_owned(),
        kind: Kind::Float,
        shape: sharded.map_or_else(
            || vec![tensor.length()],
            |sharded| vec![sharded.layout().undivided_length() as i64],
        ),
    };
    let declared: Vec<Declared> = tensors.iter().map(declare).collect();
    let mut next = tensors.iter();
    tensor_file::write_pieces(out, &declared, |_, put| {
        let (_, tensor) = next.next().expect("each declared tensor is asked for once, in order");
        match sharded {
            Some(sharded) => sharded.for_each_piece(*tensor, |piece| put(piece)),
            None => (0..tensor.length()).step_by(AT_ONCE).try_for_each(|start| {
                put(&tensor.part(start, (AT_ONCE as i64).min(tensor.length() - start)))
            }),
        }
    })
}
