//! Reads Parquet, including nested columns, one row group at a time.

use std::{
    io::{self, Read},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::Bytes;
use finetune_contract::FailureReason;
use parquet::{
    errors::ParquetError,
    file::{
        reader::{ChunkReader, FileReader, Length},
        serialized_reader::SerializedFileReader,
    },
    record::{Field, Row},
};
use serde_json::{Map, Number, Value};

use crate::{
    data::records::{OnRecord, Record},
    failure::{Failure, chain},
    store::{Entry, Store},
};

/// The number of bytes that are requested from the store at once.
const READ_BYTES: u64 = 4 << 20;

/// Calls `on_row` for every row as a JSON object.
pub(super) fn for_each(
    store: &Store,
    file: &Entry,
    name: &str,
    on_record: &mut OnRecord<'_>,
) -> Result<(), Failure> {
    let store_failed = Arc::new(AtomicBool::new(false));
    let failure = |row: u64, error: &ParquetError| {
        let (reason, message) = if store_failed.load(Ordering::Relaxed) {
            (FailureReason::StoreUnavailable, "reading the file failed")
        } else {
            (FailureReason::InvalidDataset, "the file is not Parquet, or damaged")
        };
        Failure::new(reason, format!("{name}:{row}: {message}: {}", chain(error)))
    };
    let input = StoreFile {
        store: store.clone(),
        path: file.path.clone(),
        size: file.size,
        failed: Arc::clone(&store_failed),
    };
    let reader =
        catch_panic(|| SerializedFileReader::new(input)).map_err(|error| failure(1, &error))?;
    let mut rows = catch_panic(|| reader.get_row_iter(None)).map_err(|error| failure(1, &error))?;
    for number in 1_u64.. {
        let row = match catch_panic(|| rows.next().transpose()) {
            Ok(Some(row)) => row,
            Ok(None) => break,
            Err(error) => return Err(failure(number, &error)),
        };
        let text = object(&row).map(|object| object.to_string());
        let bytes = text.clone().unwrap_or_default();
        on_record(Record { location: format!("{name}:{number}"), text }, bytes.as_bytes())?;
    }
    Ok(())
}

/// Converts panics to errors: the library panics on some damaged files.
fn catch_panic<T>(read: impl FnOnce() -> Result<T, ParquetError>) -> Result<T, ParquetError> {
    catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|_| {
        Err(ParquetError::General("its pages contradict each other".to_owned()))
    })
}

fn object(row: &Row) -> Result<Value, String> {
    let mut object = Map::new();
    for (key, field) in row.get_column_iter() {
        let value = value(field).map_err(|reason| format!("{key:?} {reason}"))?;
        object.insert(key.clone(), value);
    }
    Ok(Value::Object(object))
}

fn value(field: &Field) -> Result<Value, String> {
    let float = |number: f64| Number::from_f64(number).map_or(Value::Null, Value::Number);
    Ok(match field {
        Field::Null => Value::Null,
        Field::Bool(value) => Value::from(*value),
        Field::Byte(value) => Value::from(*value),
        Field::Short(value) => Value::from(*value),
        Field::Int(value) => Value::from(*value),
        Field::Long(value) => Value::from(*value),
        Field::UByte(value) => Value::from(*value),
        Field::UShort(value) => Value::from(*value),
        Field::UInt(value) => Value::from(*value),
        Field::ULong(value) => Value::from(*value),
        Field::Float(value) => float(f64::from(*value)),
        Field::Double(value) => float(*value),
        Field::Str(text) => Value::from(text.as_str()),
        // Some writers do not annotate text as such.
        Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
            Ok(text) => Value::from(text),
            Err(_) => return Err("is binary, and only text can be trained on".to_owned()),
        },
        Field::Group(row) => object(row)?,
        Field::ListInternal(list) => {
            Value::Array(list.elements().iter().map(value).collect::<Result<_, _>>()?)
        }
        Field::MapInternal(map) => {
            let mut object = Map::new();
            for (key, field) in map.entries() {
                let Field::Str(key) = key else {
                    return Err("is a map whose keys are not strings".to_owned());
                };
                object.insert(key.clone(), value(field)?);
            }
            Value::Object(object)
        }
        // Times and decimals, as text.
        other => Value::from(other.to_string()),
    })
}

/// A file in a store, readable by the library.
#[derive(Clone)]
struct StoreFile {
    store: Store,
    path: String,
    size: u64,
    /// Set if the store fails, as opposed to the decoding of its bytes.
    failed: Arc<AtomicBool>,
}

impl StoreFile {
    fn read_range(&self, range: std::ops::Range<u64>) -> io::Result<Bytes> {
        self.store.read_range(&self.path, range).map_err(|error| {
            self.failed.store(true, Ordering::Relaxed);
            io::Error::other(error)
        })
    }
}

impl Length for StoreFile {
    fn len(&self) -> u64 {
        self.size
    }
}

impl ChunkReader for StoreFile {
    type T = BufferedRange;

    fn get_read(&self, start: u64) -> Result<BufferedRange, ParquetError> {
        Ok(BufferedRange { input: self.clone(), next: start, read: Bytes::new() })
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes, ParquetError> {
        let end = start.saturating_add(length as u64);
        let bytes = self.read_range(start..end)?;
        if bytes.len() == length {
            return Ok(bytes);
        }
        Err(ParquetError::EOF(format!("the file ends before byte {end}")))
    }
}

/// Reads a file sequentially from a position, in large ranges.
struct BufferedRange {
    input: StoreFile,
    next: u64,
    read: Bytes,
}

impl Read for BufferedRange {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.read.is_empty() {
            let end = self.next.saturating_add(READ_BYTES).min(self.input.size);
            if self.next >= end {
                return Ok(0);
            }
            self.read = self.input.read_range(self.next..end)?;
            self.next = end;
        }
        let length = buffer.len().min(self.read.len());
        buffer[..length].copy_from_slice(&self.read.split_to(length));
        Ok(length)
    }
}
