//! Reads and tokenizes every row of a split, in order, on all CPU cores, with bounded memory.

use finetune_contract::{DatasetFormat, MAX_INVALID_SHARE, OnInvalidRow};
use sha2::{Digest, Sha256};

use crate::{
    data::{
        files,
        formats::{self, ReadOptions, RowError},
        records::{self, Record},
        row_sources::RowSources,
        tokenizer::{Tokenizer, tokenize::Tokenized},
    },
    failure::Failure,
    hex,
    runtime::parallel_map::{self, ParallelMap},
};

/// The number of rows that a thread processes at once.
const CHUNK_ROWS: usize = 128;
/// The size in bytes at which a chunk has fewer rows, which bounds memory if rows are long.
const CHUNK_BYTES: usize = 4 << 20;
/// The most kinds of errors that are collected; all invalid rows are counted.
const MAX_ERROR_GROUPS: usize = 20;
/// The most locations that are collected for one kind of error.
const MAX_LOCATIONS: usize = 4;
/// The most file names that are collected.
const MAX_FILE_NAMES: usize = 8;

/// The outcome of reading and tokenizing one row.
pub struct RowOutcome {
    /// The file and line, such as `file.jsonl:17`.
    pub location: String,
    /// The tokens, or why the row is invalid.
    pub result: Result<Tokenized, Vec<RowError>>,
    /// The first half of the SHA-256 of the text: equal rows have equal digests.
    pub digest: u128,
    /// How often the row occurs in an epoch, at least once.
    pub copies: u64,
}

/// One kind of error and the rows that have it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ErrorGroup {
    kind: String,
    /// The error of the first row.
    pub reason: String,
    /// The locations of the first rows, each such as `file.jsonl:17`.
    pub locations: Vec<String>,
    /// The number of rows.
    pub rows: u64,
}

impl ErrorGroup {
    /// Returns the error with the number of rows and the locations of more of them.
    pub fn message(&self) -> String {
        let Self { kind: _, reason, locations, rows } = self;
        if *rows <= 1 {
            return reason.clone();
        }
        let others: Vec<&str> = locations.iter().skip(1).map(String::as_str).collect();
        let more = if *rows > locations.len() as u64 { ", …" } else { "" };
        format!("{reason} ({rows} rows; the next are {}{more})", others.join(", "))
    }
}

/// A summary of reading a split.
#[derive(Debug)]
pub struct ReadSummary {
    /// The format of the rows of the first source.
    pub format: DatasetFormat,
    /// The number of files.
    pub files: u64,
    /// The names of the first files.
    pub file_names: Vec<String>,
    /// Data files that were skipped because they are named after another split.
    pub skipped_files: Vec<String>,
    /// SHA-256 over the texts of all rows, each followed by a newline.
    pub sha256: String,
    /// The errors of invalid rows, by kind.
    pub error_groups: Vec<ErrorGroup>,
    /// The number of invalid rows.
    pub invalid_rows: u64,
    /// The number of valid rows.
    pub valid_rows: u64,
}

impl ReadSummary {
    /// Returns why the split is refused because of its invalid rows; `None` if it is accepted.
    pub fn refusal(&self, on_invalid_row: OnInvalidRow) -> Option<String> {
        let Self { invalid_rows, valid_rows, .. } = self;
        let all = invalid_rows + valid_rows;
        let are_few = *invalid_rows as f64 <= MAX_INVALID_SHARE * all as f64;
        match on_invalid_row {
            _ if *invalid_rows == 0 => None,
            OnInvalidRow::Error if are_few => Some(format!(
                "{invalid_rows} of {all} rows cannot be used: fix them, or set dataset.onInvalidRow: drop to leave them out"
            )),
            OnInvalidRow::Error => {
                Some(format!("{invalid_rows} of {all} rows cannot be used: fix them"))
            }
            OnInvalidRow::Drop if !are_few => Some(format!(
                "{invalid_rows} of {all} rows cannot be used, but dataset.onInvalidRow: drop leaves out at most {} %: fix the rows",
                MAX_INVALID_SHARE * 100.0
            )),
            OnInvalidRow::Drop => None,
        }
    }

    fn deliver(
        &mut self,
        rows: Option<Vec<RowOutcome>>,
        on_row: &mut dyn FnMut(RowOutcome) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        for row in rows.into_iter().flatten() {
            match &row.result {
                Ok(_) => self.valid_rows += 1,
                Err(errors) => self.record_errors(&row.location, errors),
            }
            on_row(row)?;
        }
        Ok(())
    }

    fn record_errors(&mut self, location: &str, errors: &[RowError]) {
        self.invalid_rows += 1;
        for error in errors {
            if let Some(fault) = self.error_groups.iter_mut().find(|fault| fault.kind == error.kind)
            {
                fault.rows += 1;
                if fault.locations.len() < MAX_LOCATIONS {
                    fault.locations.push(location.to_owned());
                }
            } else if self.error_groups.len() < MAX_ERROR_GROUPS {
                self.error_groups.push(ErrorGroup {
                    kind: error.kind.clone(),
                    reason: error.to_string(),
                    locations: vec![location.to_owned()],
                    rows: 1,
                });
            }
        }
    }
}

/// Rows of a source that one thread processes.
struct RowChunk {
    rows: Vec<PendingRow>,
    options: ReadOptions,
}

/// A row that is not tokenized yet.
struct PendingRow {
    record: Record,
    digest: u128,
    copies: u64,
}

/// Calls `on_row` for every row of a split, in order, until it fails.
///
/// # Errors
/// A [`Failure`] if the files cannot be read, or that of `on_row`.
pub fn for_each_row(
    rows: &RowSources,
    tokenizer: &Tokenizer,
    on_row: &mut dyn FnMut(RowOutcome) -> Result<(), Failure>,
) -> Result<ReadSummary, Failure> {
    let mut summary = ReadSummary {
        format: rows.format(),
        files: 0,
        file_names: Vec::new(),
        skipped_files: Vec::new(),
        sha256: String::new(),
        error_groups: Vec::new(),
        invalid_rows: 0,
        valid_rows: 0,
    };
    let hash = parallel_map::parallel_map(
        |chunk| tokenize(chunk, tokenizer),
        |queue| read_sources(rows, &mut summary, queue, on_row),
    )?;
    summary.sha256 = hex(&hash.finalize());
    Ok(summary)
}

/// Reads the sources one after the other and returns the hash of all rows.
fn read_sources(
    rows: &RowSources,
    summary: &mut ReadSummary,
    queue: &mut ParallelMap<RowChunk, Vec<RowOutcome>>,
    on_row: &mut dyn FnMut(RowOutcome) -> Result<(), Failure>,
) -> Result<Sha256, Failure> {
    let mut hash = Sha256::new();
    for (index, source) in rows.sources.iter().enumerate() {
        let split_files = files::list(&source.store, rows.split)?;
        summary.files += split_files.selected.len() as u64;
        summary.skipped_files.extend(split_files.skipped);
        let mut options = source.options.clone();
        let (mut pending, mut pending_bytes, mut number) = (Vec::new(), 0, 0);
        for file in &split_files.selected {
            if summary.file_names.len() < MAX_FILE_NAMES {
                let uri = source.store.uri();
                let name = if file.path.is_empty() { uri.file_name() } else { &file.path };
                summary.file_names.push(name.to_owned());
            }
            records::for_each_record(&source.store, file, &mut |record, bytes| {
                let digest = Sha256::digest(bytes);
                let half = digest.first_chunk::<16>().expect("SHA-256 has 32 bytes");
                let digest = u128::from_le_bytes(*half);
                number += 1;
                if !rows.contains(digest) {
                    return Ok(());
                }
                hash.update(bytes);
                hash.update(b"\n");
                let copies = rows.copies(index, number - 1);
                if copies == 0 {
                    return Ok(());
                }
                pending.push(PendingRow { record, digest, copies });
                pending_bytes += bytes.len();
                if pending.len() == CHUNK_ROWS || pending_bytes >= CHUNK_BYTES {
                    pending_bytes = 0;
                    let chunk = RowChunk::new(std::mem::take(&mut pending), &mut options);
                    summary.deliver(queue.push(chunk), on_row)?;
                }
                Ok(())
            })?;
        }
        let chunk = RowChunk::new(pending, &mut options);
        summary.deliver(queue.push(chunk), on_row)?;
        if index == 0 {
            summary.format = options.format;
        }
    }
    while let Some(rows) = queue.pop() {
        summary.deliver(Some(rows), on_row)?;
    }
    Ok(hash)
}

impl RowChunk {
    /// Creates a chunk; the first row that can be parsed decides the format of all later ones.
    fn new(rows: Vec<PendingRow>, options: &mut ReadOptions) -> Self {
        if options.format == DatasetFormat::Auto {
            let mut texts = rows.iter().filter_map(|row| row.record.text.as_ref().ok());
            if let Some(split_files) = texts.find_map(|text| formats::read(text, options).ok()) {
                options.format = split_files.0;
            }
        }
        Self { rows, options: options.clone() }
    }
}

fn tokenize(chunk: RowChunk, tokenizer: &Tokenizer) -> Vec<RowOutcome> {
    let RowChunk { rows, options } = chunk;
    let one = |PendingRow { record, digest, copies }| {
        let Record { location, text } = record;
        let result = text.map_err(|reason| vec![reason.into()]).and_then(|text| {
            let (_, example) = formats::read(&text, &options)?;
            tokenizer.tokenize(&example).map_err(|reason| vec![reason.into()])
        });
        RowOutcome { location, result, digest, copies }
    };
    rows.into_iter().map(one).collect()
}
