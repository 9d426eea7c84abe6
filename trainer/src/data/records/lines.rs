//! Reads JSONL: one row per line.

use std::io::{self, BufRead, Read};

use crate::{
    data::records::{MAX_ROW_BYTES, OnRecord, ReadFailure, Record, text_of, too_long},
    failure::Failure,
};

/// Calls `on_row` for every line that is not blank.
pub(super) fn for_each(
    mut reader: impl BufRead,
    name: &str,
    read_failure: &ReadFailure<'_>,
    on_record: &mut OnRecord<'_>,
) -> Result<(), Failure> {
    let mut bytes = Vec::new();
    for number in 1_u64.. {
        bytes.clear();
        let read = reader
            .by_ref()
            .take(MAX_ROW_BYTES as u64 + 1)
            .read_until(b'\n', &mut bytes)
            .map_err(|error| read_failure(number, &error))?;
        if read == 0 {
            break;
        }
        let location = format!("{name}:{number}");
        if bytes.len() > MAX_ROW_BYTES {
            skip_line(&mut reader).map_err(|error| read_failure(number, &error))?;
            on_record(Record { location, text: Err(too_long()) }, &[])?;
            continue;
        }
        let line = bytes.trim_ascii();
        if !line.is_empty() {
            on_record(Record { location, text: text_of(line) }, line)?;
        }
    }
    Ok(())
}

fn skip_line(reader: &mut impl BufRead) -> io::Result<()> {
    loop {
        let buffer = reader.fill_buf()?;
        if buffer.is_empty() {
            return Ok(());
        }
        if let Some(end) = buffer.iter().position(|&byte| byte == b'\n') {
            reader.consume(end + 1);
            return Ok(());
        }
        let length = buffer.len();
        reader.consume(length);
    }
}
