//! Lines of JSONL files, plain or compressed, one file or all below a prefix, with bounded memory.

use std::{
    cell::Cell,
    io::{self, BufRead, BufReader, Read},
};

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
    if all.is_empty() {
        // As when a store says so itself: the URI is wrong, not the data.
        let message = format!("nothing is at {}", store.uri());
        return Err(Failure::new(FailureReason::InvalidConfiguration, message));
    }
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

/// Visits every line that is not blank, in file order, until a visit fails.
///
/// # Errors
/// A [`Failure`] if a file cannot be read or unpacked to its end, or that of a visit; lines that
/// are no text are visited as such.
pub fn for_each_line(
    store: &Store,
    file: &Entry,
    mut visit: impl FnMut(Line, &[u8]) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let name = if file.path.is_empty() { store.uri().file_name() } else { &file.path };
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
            visit(Line { location, text: Err(reason) }, &[])?;
            continue;
        }
        let line = trim(&bytes, number == 1);
        if !line.is_empty() {
            visit(Line { location, text: text_of(line) }, line)?;
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

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use finetune_contract::ObjectUri;
    use io::Write;

    use super::*;
    use crate::store::{Environment, Role};

    fn open(path: &Path) -> Store {
        let uri = ObjectUri::parse(&format!("file://{}", path.display())).unwrap();
        Store::open(&uri, None, Role::Dataset, &Environment::default()).unwrap()
    }

    fn lines(path: &Path) -> Result<Vec<String>, Failure> {
        let store = open(path);
        let mut lines = Vec::new();
        for file in files(&store)? {
            for_each_line(&store, &file, |line, _| {
                let text = line.text.unwrap_or_else(|reason| format!("error: {reason}"));
                lines.push(format!("{} {text}", line.location));
                Ok(())
            })?;
        }
        Ok(lines)
    }

    /// Reads one file of the given bytes.
    fn check(name: &str, bytes: &[u8]) -> String {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(name);
        fs::write(&path, bytes).unwrap();
        match lines(&path) {
            Ok(lines) => lines.join(" | "),
            Err(failure) => {
                failure.to_string().replace(&directory.path().display().to_string(), "")
            }
        }
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn takes_line_ends_and_marks_as_editors_leave_them() {
        insta::assert_snapshot!(check("a.jsonl", b"\xEF\xBB\xBF{}\r\n\r\n  \n{1}\n{2}"), @"a.jsonl:1 {} | a.jsonl:4 {1} | a.jsonl:5 {2}");
    }

    #[test]
    fn names_lines_that_are_no_text() {
        insta::assert_snapshot!(check("a.jsonl", b"{}\n\xFF\xFE\n{\0}\n{}"), @"a.jsonl:1 {} | a.jsonl:2 error: the line is not UTF-8 (byte 1) | a.jsonl:3 error: the line has a NUL byte: this is no JSONL, or it is UTF-16 | a.jsonl:4 {}");
        insta::assert_snapshot!(check("a.jsonl", &[b"{}\n".as_slice(), &vec![b'a'; MAX_LINE_BYTES + 9], b"\n{}"].concat()), @"a.jsonl:1 {} | a.jsonl:2 error: the line is longer than 64 MiB | a.jsonl:3 {}");
    }

    #[test]
    fn unpacks_gzip_and_zstd() {
        let rows = b"{}\n{1}\n";
        // Two members one after the other are one file, as `cat a.gz b.gz` makes.
        insta::assert_snapshot!(check("a.jsonl.gz", &[gzip(rows), gzip(b"{2}\n")].concat()), @"a.jsonl.gz:1 {} | a.jsonl.gz:2 {1} | a.jsonl.gz:3 {2}");
        insta::assert_snapshot!(check("a.jsonl.zst", &zstd::encode_all(rows.as_slice(), 3).unwrap()), @"a.jsonl.zst:1 {} | a.jsonl.zst:2 {1}");
    }

    #[test]
    fn refuses_damaged_archives() {
        // Noise, so that the archive is longer than its first block.
        let rows: Vec<u8> = (0..20_000_u32)
            .flat_map(|row| format!("{{{}}}\n", row.wrapping_mul(2_654_435_761)).into_bytes())
            .collect();
        let (gzip, zstd) = (gzip(&rows), zstd::encode_all(rows.as_slice(), 3).unwrap());
        let without_line =
            |text: String| text.split_once(": ").map(|(_, reason)| reason.to_owned());
        insta::assert_snapshot!(without_line(check("a.jsonl.gz", &gzip[..gzip.len() / 2])).unwrap(), @"the file cannot be unpacked (incomplete deflate stream): it is cut short or damaged, or its name has the wrong ending");
        insta::assert_snapshot!(without_line(check("a.jsonl.zst", &zstd[..zstd.len() / 2])).unwrap(), @"the file cannot be unpacked (incomplete frame): it is cut short or damaged, or its name has the wrong ending");
        insta::assert_snapshot!(check("a.jsonl.gz", b"{}\n"), @"a.jsonl.gz:1: the file cannot be unpacked (unexpected end of file): it is cut short or damaged, or its name has the wrong ending");
        insta::assert_snapshot!(check("a.jsonl.zst", b"{}\n{}\n"), @"a.jsonl.zst:1: the file cannot be unpacked (Unknown frame descriptor): it is cut short or damaged, or its name has the wrong ending");
    }

    #[test]
    fn stops_archives_that_unpack_without_end() {
        let endless = zstd::encode_all(io::repeat(b'a').take(80 << 20), 1).unwrap();
        insta::assert_snapshot!(check("a.jsonl.zst", &endless).split_once(": ").unwrap().1, @"the file cannot be unpacked (it unpacks to more than 200 times its size, which text never does): it is cut short or damaged, or its name has the wrong ending");
    }

    #[test]
    fn reads_no_further_once_a_visit_fails() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.jsonl");
        fs::write(&path, "{1}\n{2}\n{3}\n").unwrap();
        let store = open(&path);
        let mut seen = 0;
        let result = for_each_line(&store, &files(&store).unwrap()[0], |_, _| {
            seen += 1;
            if seen < 2 {
                return Ok(());
            }
            Err(Failure::new(FailureReason::DiskFull, "the disk is full"))
        });
        assert_eq!((seen, result.unwrap_err().reason), (2, FailureReason::DiskFull));
    }

    #[test]
    fn reads_every_data_file_below_a_prefix_in_order() {
        let directory = tempfile::tempdir().unwrap();
        for (name, text) in [("b.jsonl", "2"), ("a.jsonl", "1"), ("README.md", "no")] {
            fs::write(directory.path().join(name), text).unwrap();
        }
        fs::create_dir(directory.path().join("c")).unwrap();
        fs::write(directory.path().join("c/d.jsonl.gz"), gzip(b"3")).unwrap();
        insta::assert_snapshot!(lines(directory.path()).unwrap().join(" | "), @"a.jsonl:1 1 | b.jsonl:1 2 | c/d.jsonl.gz:1 3");
    }

    #[test]
    fn says_what_a_data_file_is_called() {
        insta::assert_snapshot!(check("train.parquet", b"PAR1"), @"file:///train.parquet is no data file: its name must end in .jsonl, .json, .jsonl.gz or .jsonl.zst");
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("README.md"), "").unwrap();
        let path = directory.path().display().to_string();
        insta::assert_snapshot!(lines(directory.path()).unwrap_err().to_string().replace(&path, "/data"), @"file:///data has no data: it must name a file, or a prefix with files that end in .jsonl, .jsonl.gz or .jsonl.zst");
    }
}
