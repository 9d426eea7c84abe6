//! JSONL: a row on each line.

use std::io::{self, BufRead, Read};

use crate::{
    data::records::{Broken, MAX_ROW_BYTES, Record, Visit, text_of, too_long},
    failure::Failure,
};

/// Visits every line that is not blank.
pub(super) fn for_each(
    mut reader: impl BufRead,
    name: &str,
    broken: &Broken<'_>,
    visit: &mut Visit<'_>,
) -> Result<(), Failure> {
    let mut bytes = Vec::new();
    for number in 1_u64.. {
        bytes.clear();
        let read = reader
            .by_ref()
            .take(MAX_ROW_BYTES as u64 + 1)
            .read_until(b'\n', &mut bytes)
            .map_err(|error| broken(number, &error))?;
        if read == 0 {
            break;
        }
        let location = format!("{name}:{number}");
        if bytes.len() > MAX_ROW_BYTES {
            skip_line(&mut reader).map_err(|error| broken(number, &error))?;
            visit(Record { location, text: Err(too_long()) }, &[])?;
            continue;
        }
        let line = bytes.trim_ascii();
        if !line.is_empty() {
            visit(Record { location, text: text_of(line) }, line)?;
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
