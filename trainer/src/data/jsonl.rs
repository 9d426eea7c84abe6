//! Lines of JSONL files, plain or compressed, one file or all below a prefix, with bounded memory.

use std::io::{self, BufRead, BufReader, Read};

use finetune_contract::FailureReason;
use flate2::read::MultiGzDecoder;

use crate::{
    failure::{Failure, chain},
    store::{Entry, Store},
};

/// The longest line that is read.
pub const MAX_LINE_BYTES: usize = 64 << 20;
/// A file may unpack to this many times its size (after the first 64 MiB): text never does.
const MAX_EXPANSION: u64 = 200;

/// One line, or why it is none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// `file.jsonl:17`.
    pub location: String,
    /// The text without its end, or what is wrong with it.
    pub text: Result<String, String>,
}

/// Lists the data files at a URI, sorted.
///
/// # Errors
/// A [`Failure`] if the store fails or there is none.
pub fn files(store: &Store) -> Result<Vec<Entry>, Failure> {
    let all = store.list()?;
    let is_single = all.len() == 1 && all[0].path.is_empty();
    let files: Vec<Entry> =
        all.into_iter().filter(|entry| is_single || is_data(&entry.path)).collect();
    if files.is_empty() {
        let message = format!(
            "{} has no data: it must name a file, or a prefix with files that end in .jsonl, .jsonl.gz or .jsonl.zst",
            store.uri()
        );
        return Err(Failure::new(FailureReason::InvalidDataset, message));
    }
    if is_single && !is_data(store.uri().file_name()) {
        let message = format!(
            "{} is no data file: its name must end in .jsonl, .json, .jsonl.gz or .jsonl.zst",
            store.uri()
        );
        return Err(Failure::new(FailureReason::InvalidDataset, message));
    }
    Ok(files)
}

fn is_data(name: &str) -> bool {
    let name = name.strip_suffix(".gz").or_else(|| name.strip_suffix(".zst")).unwrap_or(name);
    [".jsonl", ".json", ".ndjson"].iter().any(|ending| name.ends_with(ending))
}

/// Visits every line that is not blank, in file order.
///
/// # Errors
/// A [`Failure`] if a file cannot be read or unpacked to its end; lines that are no text are
/// visited as such.
pub fn for_each_line(
    store: &Store,
    file: &Entry,
    visit: &mut dyn FnMut(Line, &[u8]),
) -> Result<(), Failure> {
    let name = if file.path.is_empty() { store.uri().file_name() } else { &file.path };
    let broken = |number: u64, error: &io::Error| {
        let reason = match error.kind() {
            io::ErrorKind::UnexpectedEof
            | io::ErrorKind::InvalidData
            | io::ErrorKind::InvalidInput => FailureReason::InvalidDataset,
            _ => FailureReason::StoreUnavailable,
        };
        Failure::new(
            reason,
            format!("{name}:{number}: the file cannot be read on: {}", chain(error)),
        )
    };
    let raw = store.open_read(&file.path)?;
    let reader: Box<dyn Read> = if name.ends_with(".gz") {
        Box::new(Limited::new(MultiGzDecoder::new(BufReader::new(raw)), file.size))
    } else if name.ends_with(".zst") {
        let decoder = zstd::Decoder::new(raw).map_err(|error| broken(1, &error))?;
        Box::new(Limited::new(decoder, file.size))
    } else {
        raw
    };
    let mut reader = BufReader::with_capacity(1 << 20, reader);
    let mut bytes = Vec::new();
    for number in 1_u64.. {
        bytes.clear();
        let limit = MAX_LINE_BYTES as u64 + 1;
        let read = reader
            .by_ref()
            .take(limit)
            .read_until(b'\n', &mut bytes)
            .map_err(|error| broken(number, &error))?;
        if read == 0 {
            break;
        }
        let location = format!("{name}:{number}");
        if bytes.len() > MAX_LINE_BYTES {
            skip_line(&mut reader).map_err(|error| broken(number, &error))?;
            let reason = format!("the line is longer than {} MiB", MAX_LINE_BYTES >> 20);
            visit(Line { location, text: Err(reason) }, &[]);
            continue;
        }
        let line = trim(&bytes, number == 1);
        if !line.is_empty() {
            visit(Line { location, text: text_of(line) }, line);
        }
    }
    Ok(())
}

/// Takes off the line's end, and the byte order mark some editors put before the first.
fn trim(bytes: &[u8], is_first: bool) -> &[u8] {
    let bytes = if is_first { bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(bytes) } else { bytes };
    bytes.trim_ascii()
}

fn text_of(line: &[u8]) -> Result<String, String> {
    match std::str::from_utf8(line) {
        Ok(text) if text.contains('\0') => {
            Err("the line has a NUL byte: this is no JSONL, or it is UTF-16".to_owned())
        }
        Ok(text) => Ok(text.to_owned()),
        Err(error) => Err(format!("the line is not UTF-8 (byte {})", error.valid_up_to() + 1)),
    }
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
