//! Reads multi-line JSON: one array of rows, or consecutive objects.
//!
//! A scanner finds the end of each value without parsing it, so files of any size need only the memory of
//! one row.

use std::io::{self, BufRead};

use finetune_contract::FailureReason;

use crate::{
    data::records::{MAX_ROW_BYTES, OnRecord, ReadFailure, Record, text_of, too_long},
    failure::Failure,
};

/// Returns whether a file is multi-line JSON, judging by its start: `[`, or an object that continues after
/// its first line.
pub(super) fn is_multiline_json(reader: &mut impl BufRead) -> io::Result<bool> {
    let text = reader.fill_buf()?.trim_ascii_start();
    if text.first() == Some(&b'[') {
        return Ok(true);
    }
    if text.first() != Some(&b'{') {
        return Ok(false);
    }
    let end = text.iter().position(|&byte| byte == b'\n').unwrap_or(text.len());
    let mut scanner = Scanner::default();
    let is_open = text[..end].iter().all(|&byte| !scanner.ends_with(byte)) && !scanner.in_string;
    // A truncated line is followed by the next row, an open object by a key.
    let next = text[end..].trim_ascii_start().first();
    Ok(is_open && matches!(next, Some(b'"' | b'}' | b'{' | b'[')) && !starts_row(text, end))
}

/// Returns whether a truncated first line is followed by another row.
fn starts_row(text: &[u8], end: usize) -> bool {
    let first = text[..end].trim_ascii_end().last();
    let is_opened_or_continued = matches!(first, Some(b'{' | b'[' | b',' | b':'));
    !is_opened_or_continued && text[end..].trim_ascii_start().first() == Some(&b'{')
}

/// The state of scanning one value.
#[derive(Debug, Default)]
struct Scanner {
    depth: usize,
    in_string: bool,
    is_escaped: bool,
}

impl Scanner {
    /// Scans a byte and returns whether an object, array or string ends with it.
    fn ends_with(&mut self, byte: u8) -> bool {
        if self.in_string {
            match byte {
                _ if self.is_escaped => self.is_escaped = false,
                b'\\' => self.is_escaped = true,
                b'"' => {
                    self.in_string = false;
                    return self.depth == 0;
                }
                _ => {}
            }
            return false;
        }
        match byte {
            b'"' => self.in_string = true,
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' => {
                self.depth = self.depth.saturating_sub(1);
                return self.depth == 0;
            }
            _ => {}
        }
        false
    }
}

/// The state of reading a file.
struct ValueReader<'a, 'b> {
    name: &'a str,
    on_record: &'a mut OnRecord<'b>,
    line: u64,
    is_in_array: bool,
    /// The bytes of the current value so far, and the line on which it starts.
    value: Option<(Vec<u8>, u64)>,
    /// Whether the current value exceeds the size limit.
    is_too_long: bool,
    scanner: Scanner,
}

/// Calls `on_row` for every value.
pub(super) fn for_each(
    mut reader: impl BufRead,
    name: &str,
    read_failure: &ReadFailure<'_>,
    on_record: &mut OnRecord<'_>,
) -> Result<(), Failure> {
    let mut values = ValueReader {
        name,
        on_record,
        line: 1,
        is_in_array: false,
        value: None,
        is_too_long: false,
        scanner: Scanner::default(),
    };
    loop {
        let buffer = reader.fill_buf().map_err(|error| read_failure(values.line, &error))?;
        if buffer.is_empty() {
            return values.finish();
        }
        for &byte in buffer {
            values.take(byte)?;
        }
        let length = buffer.len();
        reader.consume(length);
    }
}

impl ValueReader<'_, '_> {
    fn take(&mut self, byte: u8) -> Result<(), Failure> {
        if byte == b'\n' {
            self.line += 1;
        }
        if self.value.is_none() {
            match byte {
                b' ' | b'\t' | b'\r' | b'\n' => return Ok(()),
                b',' if self.is_in_array => return Ok(()),
                b']' if self.is_in_array => {
                    self.is_in_array = false;
                    return Ok(());
                }
                b'[' if !self.is_in_array => {
                    self.is_in_array = true;
                    return Ok(());
                }
                _ => {}
            }
            self.value = Some((Vec::new(), self.line));
            self.scanner = Scanner::default();
        }
        let is_bare = self.scanner.depth == 0 && !self.scanner.in_string;
        let is_started = self.value.as_ref().is_some_and(|(value, _)| !value.is_empty());
        // Numbers and literals have no closing character.
        if is_bare && is_started && matches!(byte, b',' | b']' | b'\n' | b'{' | b'[') {
            self.end()?;
            return self.take_after_bare(byte);
        }
        if let Some((value, _)) = &mut self.value {
            if value.len() < MAX_ROW_BYTES { value.push(byte) } else { self.is_too_long = true }
        }
        if self.scanner.ends_with(byte) { self.end() } else { Ok(()) }
    }

    /// Takes the byte after a number or literal; if it is a line break, it is already counted.
    fn take_after_bare(&mut self, byte: u8) -> Result<(), Failure> {
        if byte == b'\n' { Ok(()) } else { self.take(byte) }
    }

    fn end(&mut self) -> Result<(), Failure> {
        let Some((value, line)) = self.value.take() else { return Ok(()) };
        let location = format!("{}:{line}", self.name);
        if std::mem::take(&mut self.is_too_long) {
            return (self.on_record)(Record { location, text: Err(too_long()) }, &[]);
        }
        let value = value.trim_ascii();
        (self.on_record)(Record { location, text: text_of(value) }, value)
    }

    fn finish(mut self) -> Result<(), Failure> {
        let is_bare = self.scanner.depth == 0 && !self.scanner.in_string;
        if is_bare && self.value.is_some() && !self.is_in_array {
            return self.end();
        }
        let what = match (&self.value, self.is_in_array) {
            (Some((_, line)), _) => format!("inside the row that begins on line {line}"),
            (None, true) => "before its array is closed".to_owned(),
            (None, false) => return Ok(()),
        };
        let message = format!(
            "{}:{}: the file ends {what}: it is truncated, or a bracket or quotation mark is missing",
            self.name, self.line
        );
        Err(Failure::new(FailureReason::InvalidDataset, message))
    }
}
