//! Every row of a split as tokens, in order, on all processors, with bounded memory.

use finetune_contract::{DatasetFormat, MAX_INVALID_SHARE, OnInvalidRow};
use sha2::{Digest, Sha256};

use crate::{
    data::{
        files,
        formats::{self, ReadOptions, RowError},
        records::{self, Record},
        row_sources::RowSources,
        tokenizer::{Tokenized, Tokenizer},
    },
    failure::Failure,
    hex,
    runtime::parallel_map::{self, ParallelMap},
};

/// Rows handed to a thread at once.
const BATCH: usize = 128;
/// Fewer are, once their texts add up to this: it bounds memory when rows are long.
const BATCH_BYTES: usize = 4 << 20;
/// Kinds of faults that are remembered; all bad rows are counted.
const KINDS: usize = 20;
/// Places of one kind of fault that are remembered.
const PLACES: usize = 4;
/// Names of files that are remembered.
const NAMES: usize = 8;

/// A row.
pub struct SplitRow {
    /// Where it is, such as `file.jsonl:17`.
    pub location: String,
    /// What it becomes, or why it cannot be used.
    pub outcome: Result<Tokenized, Vec<RowError>>,
    /// The first half of the SHA-256 of its text: equal rows have equal digests.
    pub digest: u128,
    /// How often it occurs in an epoch, at least once.
    pub copies: u64,
}

/// A kind of fault, and the rows that have it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    kind: String,
    /// What is wrong with the first row that has it.
    pub reason: String,
    /// The first places, each `file.jsonl:17`.
    pub places: Vec<String>,
    /// How many rows have it.
    pub rows: u64,
}

impl Fault {
    /// Says what is wrong, with the number of rows and where more of them are.
    pub fn message(&self) -> String {
        let Self { kind: _, reason, places, rows } = self;
        if *rows <= 1 {
            return reason.clone();
        }
        let others: Vec<&str> = places.iter().skip(1).map(String::as_str).collect();
        let more = if *rows > places.len() as u64 { ", …" } else { "" };
        format!("{reason} ({rows} rows; the next are {}{more})", others.join(", "))
    }
}

/// What was read beside the usable rows.
#[derive(Debug)]
pub struct Read {
    /// The shape of the rows of the first source.
    pub format: DatasetFormat,
    /// Files read.
    pub files: u64,
    /// The names of the first ones.
    pub file_names: Vec<String>,
    /// Data files below a prefix that were left out as another split's.
    pub left_out: Vec<String>,
    /// SHA-256 over the texts of all rows, each ended by a newline.
    pub sha256: String,
    /// The kinds of faults of bad rows.
    pub faults: Vec<Fault>,
    /// How many rows are bad.
    pub bad_rows: u64,
    /// How many are usable.
    pub good_rows: u64,
}

impl Read {
    /// Returns why the rows as a whole are refused for those that are bad; `None` if they are not.
    pub fn refusal(&self, on_invalid_row: OnInvalidRow) -> Option<String> {
        let Self { bad_rows, good_rows, .. } = self;
        let all = bad_rows + good_rows;
        let are_few = *bad_rows as f64 <= MAX_INVALID_SHARE * all as f64;
        match on_invalid_row {
            _ if *bad_rows == 0 => None,
            OnInvalidRow::Error if are_few => Some(format!(
                "{bad_rows} of {all} rows cannot be used: mend them, or set dataset.onInvalidRow: drop to leave them out"
            )),
            OnInvalidRow::Error => {
                Some(format!("{bad_rows} of {all} rows cannot be used: mend them"))
            }
            OnInvalidRow::Drop if !are_few => Some(format!(
                "{bad_rows} of {all} rows cannot be used, more than the {} % that dataset.onInvalidRow: drop may leave out: that is no accident of a few rows",
                MAX_INVALID_SHARE * 100.0
            )),
            OnInvalidRow::Drop => None,
        }
    }

    fn visit_all(
        &mut self,
        rows: Option<Vec<SplitRow>>,
        visit: &mut dyn FnMut(SplitRow) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        for row in rows.into_iter().flatten() {
            match &row.outcome {
                Ok(_) => self.good_rows += 1,
                Err(errors) => self.add_faults(&row.location, errors),
            }
            visit(row)?;
        }
        Ok(())
    }

    fn add_faults(&mut self, location: &str, errors: &[RowError]) {
        self.bad_rows += 1;
        for error in errors {
            if let Some(fault) = self.faults.iter_mut().find(|fault| fault.kind == error.kind) {
                fault.rows += 1;
                if fault.places.len() < PLACES {
                    fault.places.push(location.to_owned());
                }
            } else if self.faults.len() < KINDS {
                self.faults.push(Fault {
                    kind: error.kind.clone(),
                    reason: error.to_string(),
                    places: vec![location.to_owned()],
                    rows: 1,
                });
            }
        }
    }
}

/// Rows of a source for a thread.
struct Batch {
    rows: Vec<Waiting>,
    options: ReadOptions,
}

/// A row that waits for its thread.
struct Waiting {
    record: Record,
    digest: u128,
    copies: u64,
}

/// Visits every row of a split in order, until a visit fails; the result counts the bad ones.
///
/// # Errors
/// A [`Failure`] if the files cannot be read, or that of a visit.
pub fn for_each_row(
    rows: &RowSources,
    tokenizer: &Tokenizer,
    visit: &mut dyn FnMut(SplitRow) -> Result<(), Failure>,
) -> Result<Read, Failure> {
    let mut read = Read {
        format: rows.format(),
        files: 0,
        file_names: Vec::new(),
        left_out: Vec::new(),
        sha256: String::new(),
        faults: Vec::new(),
        bad_rows: 0,
        good_rows: 0,
    };
    let hash = parallel_map::parallel_map(
        |batch| tokenize(batch, tokenizer),
        |queue| read_sources(rows, &mut read, queue, visit),
    )?;
    read.sha256 = hex(&hash.finalize());
    Ok(read)
}

/// Reads the sources one after the other; returns the hash of all rows.
fn read_sources(
    rows: &RowSources,
    read: &mut Read,
    queue: &mut ParallelMap<Batch, Vec<SplitRow>>,
    visit: &mut dyn FnMut(SplitRow) -> Result<(), Failure>,
) -> Result<Sha256, Failure> {
    let mut hash = Sha256::new();
    for (index, source) in rows.sources.iter().enumerate() {
        let found = files::list(&source.store, rows.split)?;
        read.files += found.taken.len() as u64;
        read.left_out.extend(found.left_out);
        let mut options = source.options.clone();
        let (mut waiting, mut waiting_bytes, mut number) = (Vec::new(), 0, 0);
        for file in &found.taken {
            if read.file_names.len() < NAMES {
                let uri = source.store.uri();
                let name = if file.path.is_empty() { uri.file_name() } else { &file.path };
                read.file_names.push(name.to_owned());
            }
            records::for_each_record(&source.store, file, &mut |record, bytes| {
                let digest = Sha256::digest(bytes);
                let half = digest.first_chunk::<16>().expect("SHA-256 has 32 bytes");
                let digest = u128::from_le_bytes(*half);
                number += 1;
                if !rows.has(digest) {
                    return Ok(());
                }
                hash.update(bytes);
                hash.update(b"\n");
                let copies = rows.copies(index, number - 1);
                if copies == 0 {
                    return Ok(());
                }
                waiting.push(Waiting { record, digest, copies });
                waiting_bytes += bytes.len();
                if waiting.len() == BATCH || waiting_bytes >= BATCH_BYTES {
                    waiting_bytes = 0;
                    let batch = Batch::new(std::mem::take(&mut waiting), &mut options);
                    read.visit_all(queue.push(batch), visit)?;
                }
                Ok(())
            })?;
        }
        let batch = Batch::new(waiting, &mut options);
        read.visit_all(queue.push(batch), visit)?;
        if index == 0 {
            read.format = options.format;
        }
    }
    while let Some(rows) = queue.pop() {
        read.visit_all(Some(rows), visit)?;
    }
    Ok(hash)
}

impl Batch {
    /// Makes a batch; the first row that can be understood decides the format of all after it.
    fn new(rows: Vec<Waiting>, options: &mut ReadOptions) -> Self {
        if options.format == DatasetFormat::Auto {
            let mut texts = rows.iter().filter_map(|row| row.record.text.as_ref().ok());
            if let Some(found) = texts.find_map(|text| formats::read(text, options).ok()) {
                options.format = found.0;
            }
        }
        Self { rows, options: options.clone() }
    }
}

fn tokenize(batch: Batch, tokenizer: &Tokenizer) -> Vec<SplitRow> {
    let Batch { rows, options } = batch;
    let one = |Waiting { record, digest, copies }| {
        let Record { location, text } = record;
        let outcome = text.map_err(|reason| vec![reason.into()]).and_then(|text| {
            let (_, example) = formats::read(&text, &options)?;
            tokenizer.tokenize(&example).map_err(|reason| vec![reason.into()])
        });
        SplitRow { location, outcome, digest, copies }
    };
    rows.into_iter().map(one).collect()
}
