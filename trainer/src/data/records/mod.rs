//! The rows of a file as JSON texts, one after the other, with bounded memory.
//!
//! [`files`](crate::data::files) says which files there are. One module reads each kind: `lines` JSONL,
//! `values` JSON arrays and objects over several lines, `csv`, `parquet`.

mod csv;
mod lines;
mod parquet;
#[cfg(test)]
mod tests;
mod values;

use std::{
    cell::Cell,
    io::{self, BufRead, BufReader, Read},
};

use finetune_contract::FailureReason;
use flate2::read::MultiGzDecoder;

use crate::{
    data::files::{Kind, kind},
    failure::{Failure, chain},
    store::{Entry, Store},
};

/// The longest row that is read.
pub const MAX_ROW_BYTES: usize = 64 << 20;
/// A file may unpack to this many times its size (after the first 64 MiB): text never does.
const MAX_EXPANSION: u64 = 200;
/// What some editors put before UTF-8.
const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";

/// One row, or why it is none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// `file.jsonl:17`: the line it begins on; of Parquet files the row, from 1.
    pub location: String,
    /// The row's JSON, or what is wrong with it.
    pub text: Result<String, String>,
}

/// Takes a record and the bytes that stand for it in digests.
type Visit<'a> = dyn FnMut(Record, &[u8]) -> Result<(), Failure> + 'a;

/// Visits every row of a file, in order, until a visit fails.
///
/// # Errors
/// A [`Failure`] if the file cannot be read or unpacked to its end, or that of a visit; rows that
/// are no text are visited as such.
pub fn for_each_record(store: &Store, file: &Entry, visit: &mut Visit<'_>) -> Result<(), Failure> {
    let name = if file.path.is_empty() { store.uri().file_name() } else { &file.path };
    if kind(name) == Some(Kind::Parquet) {
        return parquet::for_each(store, file, name, visit);
    }
    // Whether it is the store that failed; else what it gave cannot be unpacked.
    let store_failed = Cell::new(false);
    let broken = |number: u64, error: &io::Error| {
        let text = chain(error);
        let (reason, message) = if store_failed.get() {
            (FailureReason::StoreUnavailable, format!("the file cannot be read on: {text}"))
        } else {
            let message = format!(
                "the file cannot be unpacked ({text}): it is cut short or damaged, or its name has the wrong ending"
            );
            (FailureReason::InvalidDataset, message)
        };
        Failure::new(reason, format!("{name}:{number}: {message}"))
    };
    let raw = Watched { inner: store.open_read(&file.path)?, failed: &store_failed };
    let reader: Box<dyn Read + '_> = if name.ends_with(".gz") {
        Box::new(Limited::new(MultiGzDecoder::new(BufReader::new(raw)), file.size))
    } else if name.ends_with(".zst") {
        let decoder = zstd::Decoder::new(raw).map_err(|error| broken(1, &error))?;
        Box::new(Limited::new(decoder, file.size))
    } else {
        Box::new(raw)
    };
    let mut reader = BufReader::with_capacity(1 << 20, reader);
    if reader.fill_buf().map_err(|error| broken(1, &error))?.starts_with(BYTE_ORDER_MARK) {
        reader.consume(BYTE_ORDER_MARK.len());
    }
    match kind(name) {
        Some(Kind::Csv) => csv::for_each(reader, name, &broken, visit),
        _ if values::is_next(&mut reader).map_err(|error| broken(1, &error))? => {
            values::for_each(reader, name, &broken, visit)
        }
        _ => lines::for_each(reader, name, &broken, visit),
    }
}

/// Makes the failure of reading on from a line.
type Broken<'a> = dyn Fn(u64, &io::Error) -> Failure + 'a;

fn text_of(row: &[u8]) -> Result<String, String> {
    match std::str::from_utf8(row) {
        Ok(text) if text.contains('\0') => {
            Err("the row has a NUL byte: this is no JSON, or it is UTF-16".to_owned())
        }
        Ok(text) => Ok(text.to_owned()),
        Err(error) => Err(format!("the row is not UTF-8 (byte {})", error.valid_up_to() + 1)),
    }
}

fn too_long() -> String {
    format!("the row is longer than {} MiB", MAX_ROW_BYTES >> 20)
}

/// Remembers that the reader below a decoder failed.
struct Watched<'a, R> {
    inner: R,
    failed: &'a Cell<bool>,
}

impl<R: Read> Read for Watched<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.inner.read(buffer).inspect_err(|error| {
            self.failed.set(error.kind() != io::ErrorKind::Interrupted);
        })
    }
}

/// Stops a reader that unpacks to far more than any text does.
struct Limited<R> {
    inner: R,
    left: u64,
}

impl<R> Limited<R> {
    fn new(inner: R, packed_size: u64) -> Self {
        Self { inner, left: packed_size.saturating_mul(MAX_EXPANSION).saturating_add(64 << 20) }
    }
}

impl<R: Read> Read for Limited<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.left = self.left.checked_sub(read as u64).ok_or_else(|| {
            let text = format!(
                "it unpacks to more than {MAX_EXPANSION} times its size, which text never does"
            );
            io::Error::new(io::ErrorKind::InvalidData, text)
        })?;
        Ok(read)
    }
}
