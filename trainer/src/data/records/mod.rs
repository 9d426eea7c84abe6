//! Streams the rows of a file as JSON texts, with bounded memory.
//!
//! [`files`](crate::data::files) selects the files. One module reads each format: `lines` JSONL, `values`
//! JSON arrays and multi-line objects, `csv`, `parquet`.

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
    data::files::{FileFormat, file_format},
    failure::{Failure, chain},
    store::{Entry, Store},
};

/// The most bytes of a row.
pub const MAX_ROW_BYTES: usize = 64 << 20;
/// The most times its own size that a compressed file may unpack to, beyond the first 64 MiB. Text never
/// compresses that well.
const MAX_EXPANSION: u64 = 200;
/// The byte order mark that some editors write at the start of UTF-8 files.
const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";

/// One row, or why it cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The file and the line on which the row starts, such as `file.jsonl:17`; for Parquet files the
    /// number of the row, counted from 1.
    pub location: String,
    /// The JSON of the row, or what is wrong with it.
    pub text: Result<String, String>,
}

/// The callback for each record, with the bytes that represent the record in digests.
type OnRecord<'a> = dyn FnMut(Record, &[u8]) -> Result<(), Failure> + 'a;

/// Calls `on_row` for every row of a file, in order, until it fails. Rows that are not text are passed on
/// as errors.
///
/// # Errors
/// A [`Failure`] if the file cannot be read or unpacked to its end, or that of `on_row`.
pub fn for_each_record(
    store: &Store,
    file: &Entry,
    on_record: &mut OnRecord<'_>,
) -> Result<(), Failure> {
    let name = if file.path.is_empty() { store.uri().file_name() } else { &file.path };
    if file_format(name) == Some(FileFormat::Parquet) {
        return parquet::for_each(store, file, name, on_record);
    }
    // Distinguishes errors of the store from errors of unpacking.
    let store_failed = Cell::new(false);
    let read_failure = |number: u64, error: &io::Error| {
        let text = chain(error);
        let (reason, message) = if store_failed.get() {
            (FailureReason::StoreUnavailable, format!("reading the file failed: {text}"))
        } else {
            let message = format!(
                "the file cannot be unpacked ({text}): it is truncated or damaged, or its name has the wrong extension"
            );
            (FailureReason::InvalidDataset, message)
        };
        Failure::new(reason, format!("{name}:{number}: {message}"))
    };
    let raw = FailureFlag { inner: store.open_read(&file.path)?, failed: &store_failed };
    let reader: Box<dyn Read + '_> = if name.ends_with(".gz") {
        Box::new(ExpansionLimit::new(MultiGzDecoder::new(BufReader::new(raw)), file.size))
    } else if name.ends_with(".zst") {
        let decoder = zstd::Decoder::new(raw).map_err(|error| read_failure(1, &error))?;
        Box::new(ExpansionLimit::new(decoder, file.size))
    } else {
        Box::new(raw)
    };
    let mut reader = BufReader::with_capacity(1 << 20, reader);
    if reader.fill_buf().map_err(|error| read_failure(1, &error))?.starts_with(BYTE_ORDER_MARK) {
        reader.consume(BYTE_ORDER_MARK.len());
    }
    match file_format(name) {
        Some(FileFormat::Csv) => csv::for_each(reader, name, &read_failure, on_record),
        _ if values::is_multiline_json(&mut reader).map_err(|error| read_failure(1, &error))? => {
            values::for_each(reader, name, &read_failure, on_record)
        }
        _ => lines::for_each(reader, name, &read_failure, on_record),
    }
}

/// Creates the failure for an error of reading, given the line number.
type ReadFailure<'a> = dyn Fn(u64, &io::Error) -> Failure + 'a;

fn text_of(row: &[u8]) -> Result<String, String> {
    match std::str::from_utf8(row) {
        Ok(text) if text.contains('\0') => {
            Err("the row has a NUL byte: it is not JSON, or it is UTF-16".to_owned())
        }
        Ok(text) => Ok(text.to_owned()),
        Err(error) => Err(format!("the row is not UTF-8 (byte {})", error.valid_up_to() + 1)),
    }
}

fn too_long() -> String {
    format!("the row is longer than {} MiB", MAX_ROW_BYTES >> 20)
}

/// Sets a flag if the reader below a decoder fails.
struct FailureFlag<'a, R> {
    inner: R,
    failed: &'a Cell<bool>,
}

impl<R: Read> Read for FailureFlag<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.inner.read(buffer).inspect_err(|error| {
            self.failed.set(error.kind() != io::ErrorKind::Interrupted);
        })
    }
}

/// Fails if a file unpacks to far more bytes than text ever does.
struct ExpansionLimit<R> {
    inner: R,
    left: u64,
}

impl<R> ExpansionLimit<R> {
    fn new(inner: R, packed_size: u64) -> Self {
        Self { inner, left: packed_size.saturating_mul(MAX_EXPANSION).saturating_add(64 << 20) }
    }
}

impl<R: Read> Read for ExpansionLimit<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.left = self.left.checked_sub(read as u64).ok_or_else(|| {
            let text = format!(
                "it unpacks to more than {MAX_EXPANSION} times its size, so it cannot be text"
            );
            io::Error::new(io::ErrorKind::InvalidData, text)
        })?;
        Ok(read)
    }
}
