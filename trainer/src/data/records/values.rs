//! JSON over several lines: one array of rows, or one object after the other.
//!
//! A scanner finds where each value ends, and the value is parsed as a line of JSONL would be: files
//! of any size take the memory of one row.

use std::io::{self, BufRead};

use finetune_contract::FailureReason;

use crate::{
    data::records::{Broken, MAX_ROW_BYTES, Record, Visit, text_of, too_long},
    failure::Failure,
};

/// Tells by its beginning whether a file is of this kind: it begins with `[`, or with an object whose
/// first line is not all of it.
pub(super) fn is_next(reader: &mut impl BufRead) -> io::Result<bool> {
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
    // A line that lost its end is followed by the next row; an object goes on with a key.
    let next = text[end..].trim_ascii_start().first();
    Ok(is_open && matches!(next, Some(b'"' | b'}' | b'{' | b'[')) && !starts_row(text, end))
}

/// Tells whether what follows a broken first line is a row of its own.
fn starts_row(text: &[u8], end: usize) -> bool {
    let first = text[..end].trim_ascii_end().last();
    let is_opened_or_continued = matches!(first, Some(b'{' | b'[' | b',' | b':'));
    !is_opened_or_continued && text[end..].trim_ascii_start().first() == Some(&b'{')
}

/// Where a scan stands in one value.
#[derive(Debug, Default)]
struct Scanner {
    depth: usize,
    in_string: bool,
    is_escaped: bool,
}

impl Scanner {
    /// Takes a byte and tells whether an object, array or string ends with it.
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

/// What is being read.
struct Values<'a, 'b> {
    name: &'a str,
    visit: &'a mut Visit<'b>,
    line: u64,
    is_in_array: bool,
    /// The value so far, the line it began on and whether it became too long.
    value: Option<(Vec<u8>, u64)>,
    is_too_long: bool,
    scanner: Scanner,
}

/// Visits every value.
pub(super) fn for_each(
    mut reader: impl BufRead,
    name: &str,
    broken: &Broken<'_>,
    visit: &mut Visit<'_>,
) -> Result<(), Failure> {
    let mut values = Values {
        name,
        visit,
        line: 1,
        is_in_array: false,
        value: None,
        is_too_long: false,
        scanner: Scanner::default(),
    };
    loop {
        let buffer = reader.fill_buf().map_err(|error| broken(values.line, &error))?;
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

impl Values<'_, '_> {
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
        // A number or word has no end of its own.
        if is_bare && is_started && matches!(byte, b',' | b']' | b'\n' | b'{' | b'[') {
            self.end()?;
            return self.take_again(byte);
        }
        if let Some((value, _)) = &mut self.value {
            if value.len() < MAX_ROW_BYTES { value.push(byte) } else { self.is_too_long = true }
        }
        if self.scanner.ends_with(byte) { self.end() } else { Ok(()) }
    }

    /// Takes the byte that ended a bare value, whose line is counted already.
    fn take_again(&mut self, byte: u8) -> Result<(), Failure> {
        if byte == b'\n' { Ok(()) } else { self.take(byte) }
    }

    fn end(&mut self) -> Result<(), Failure> {
        let Some((value, line)) = self.value.take() else { return Ok(()) };
        let location = format!("{}:{line}", self.name);
        if std::mem::take(&mut self.is_too_long) {
            return (self.visit)(Record { location, text: Err(too_long()) }, &[]);
        }
        let value = value.trim_ascii();
        (self.visit)(Record { location, text: text_of(value) }, value)
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
            "{}:{}: the file ends {what}: it is cut short, or a bracket or quotation mark is missing",
            self.name, self.line
        );
        Err(Failure::new(FailureReason::InvalidDataset, message))
    }
}
