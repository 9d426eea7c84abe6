//! Reads CSV and TSV: the first line has the keys, and every value is text.

use std::io::BufRead;

use csv::{ByteRecord, ErrorKind, ReaderBuilder};
use finetune_contract::FailureReason;
use serde_json::{Map, Value};

use crate::{
    data::records::{OnRecord, ReadFailure, Record},
    failure::Failure,
};

/// Calls `on_row` for every row as a JSON object; an empty cell becomes null.
pub(super) fn for_each(
    mut reader: impl BufRead,
    name: &str,
    read_failure: &ReadFailure<'_>,
    on_record: &mut OnRecord<'_>,
) -> Result<(), Failure> {
    let buffer = reader.fill_buf().map_err(|error| read_failure(1, &error))?;
    let delimiter = delimiter(name, buffer);
    let mut rows = ReaderBuilder::new().delimiter(delimiter).from_reader(reader);
    let keys = match rows.byte_headers() {
        Ok(keys) => keys.clone(),
        Err(error) => return Err(failure(error, name, read_failure)),
    };
    let keys = keys_of(&keys).map_err(|message| {
        Failure::new(FailureReason::InvalidDataset, format!("{name}:1: {message}"))
    })?;
    let mut row = ByteRecord::new();
    loop {
        match rows.read_byte_record(&mut row) {
            Ok(false) => return Ok(()),
            Ok(true) => {}
            Err(error) => {
                let ErrorKind::UnequalLengths { pos, expected_len, len } = error.kind() else {
                    return Err(failure(error, name, read_failure));
                };
                let line = pos.as_ref().map_or(0, csv::Position::line);
                let text = Err(format!(
                    "the row has {len} cells, but the first line has {expected_len} keys: quote cells that contain the separator or a line break"
                ));
                on_record(Record { location: format!("{name}:{line}"), text }, &[])?;
                continue;
            }
        }
        let line = row.position().map_or(0, csv::Position::line);
        let text = object(&keys, &row);
        let bytes = text.clone().unwrap_or_default();
        on_record(Record { location: format!("{name}:{line}"), text }, bytes.as_bytes())?;
    }
}

/// Returns the delimiter: tab for TSV, otherwise comma, or semicolon (as spreadsheets in many locales
/// write it) if the first line has only those.
fn delimiter(name: &str, buffer: &[u8]) -> u8 {
    if crate::data::files::strip_compression(name).ends_with(".tsv") {
        return b'\t';
    }
    let first = buffer.split(|&byte| byte == b'\n').next().unwrap_or_default();
    if first.contains(&b';') && !first.contains(&b',') { b';' } else { b',' }
}

fn keys_of(headers: &ByteRecord) -> Result<Vec<String>, String> {
    let mut keys: Vec<String> = Vec::with_capacity(headers.len());
    for header in headers {
        let key =
            std::str::from_utf8(header).map_err(|_| "the first line is not UTF-8".to_owned())?;
        let key = key.trim();
        if keys.iter().any(|other| other == key) {
            return Err(format!("the first line has {key:?} twice: keep one"));
        }
        keys.push(key.to_owned());
    }
    Ok(keys)
}

fn object(keys: &[String], row: &ByteRecord) -> Result<String, String> {
    let mut object = Map::new();
    for (key, cell) in keys.iter().zip(row) {
        let text = std::str::from_utf8(cell)
            .map_err(|error| format!("{key:?} is not UTF-8 (byte {})", error.valid_up_to() + 1))?;
        let value = if text.is_empty() { Value::Null } else { Value::from(text) };
        object.insert(key.clone(), value);
    }
    Ok(Value::Object(object).to_string())
}

fn failure(error: csv::Error, name: &str, read_failure: &ReadFailure<'_>) -> Failure {
    let line = error.position().map_or(1, csv::Position::line);
    match error.into_kind() {
        ErrorKind::Io(error) => read_failure(line, &error),
        other => {
            let message = format!("{name}:{line}: the file is not CSV: {other:?}");
            Failure::new(FailureReason::InvalidDataset, message)
        }
    }
}
