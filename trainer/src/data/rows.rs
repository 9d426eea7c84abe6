//! Every row of a split as tokens, in order, on all processors, with bounded memory.

use finetune_contract::DatasetFormat;
use sha2::{Digest, Sha256};

use super::{
    conversation::Example,
    format,
    jsonl::{self, Line},
    tokenizer::{TokenRow, Tokenizer},
};
use crate::{failure::Failure, hex, store::Store};

/// Rows handed to the processors at once.
const BATCH: usize = 512;
/// Fewer are, once their lines add up to this: it bounds memory when lines are long.
const BATCH_BYTES: usize = 16 << 20;
/// Bad rows that are remembered; all are counted.
const SHOWN: usize = 20;

/// A usable row.
pub struct SplitRow {
    /// Its tokens.
    pub row: TokenRow,
    /// The first half of the SHA-256 of its line: equal rows have equal digests.
    pub digest: u128,
}

/// A row that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadRow {
    /// `file.jsonl:17`.
    pub location: String,
    /// What is wrong.
    pub reason: String,
}

/// What was read beside the usable rows.
#[derive(Debug)]
pub struct Read {
    /// The shape of the rows.
    pub format: DatasetFormat,
    /// Files read.
    pub files: u64,
    /// SHA-256 over all lines, each ended by a newline.
    pub sha256: String,
    /// The first bad rows.
    pub bad: Vec<BadRow>,
    /// How many there are.
    pub bad_rows: u64,
}

/// Visits every usable row of a split in file order, until a visit fails.
///
/// # Errors
/// A [`Failure`] if the files cannot be read, or that of a visit; bad rows are in the result.
pub fn for_each_row(
    store: &Store,
    format: DatasetFormat,
    tokenizer: &Tokenizer,
    visit: &mut dyn FnMut(SplitRow) -> Result<(), Failure>,
) -> Result<Read, Failure> {
    let files = jsonl::files(store)?;
    let mut read = Read {
        format,
        files: files.len() as u64,
        sha256: String::new(),
        bad: Vec::new(),
        bad_rows: 0,
    };
    let mut hash = Sha256::new();
    let mut waiting: Vec<(Line, u128)> = Vec::new();
    let mut waiting_bytes = 0;
    for file in &files {
        jsonl::for_each_line(store, file, |line, bytes| {
            hash.update(bytes);
            hash.update(b"\n");
            let digest = Sha256::digest(bytes);
            let half = digest.first_chunk::<16>().expect("SHA-256 has 32 bytes");
            waiting.push((line, u128::from_le_bytes(*half)));
            waiting_bytes += bytes.len();
            if waiting.len() == BATCH || waiting_bytes >= BATCH_BYTES {
                waiting_bytes = 0;
                flush(&mut waiting, &mut read, tokenizer, visit)?;
            }
            Ok(())
        })?;
    }
    flush(&mut waiting, &mut read, tokenizer, visit)?;
    read.sha256 = hex(&hash.finalize());
    Ok(read)
}

fn flush(
    waiting: &mut Vec<(Line, u128)>,
    read: &mut Read,
    tokenizer: &Tokenizer,
    visit: &mut dyn FnMut(SplitRow) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let lines = std::mem::take(waiting);
    if read.format == DatasetFormat::Auto {
        // The first row that can be understood decides for all.
        let mut texts = lines.iter().filter_map(|(line, _)| line.text.as_ref().ok());
        if let Some(found) = texts.find_map(|text| format::read(text, DatasetFormat::Auto).ok()) {
            read.format = found.0;
        }
    }
    for ((line, digest), result) in lines.iter().zip(tokenize(&lines, read.format, tokenizer)) {
        match result {
            Ok(row) => visit(SplitRow { row, digest: *digest })?,
            Err(reason) => {
                read.bad_rows += 1;
                if read.bad.len() < SHOWN {
                    read.bad.push(BadRow { location: line.location.clone(), reason });
                }
            }
        }
    }
    Ok(())
}

/// Tokenises lines on all processors, in order.
fn tokenize(
    lines: &[(Line, u128)],
    format: DatasetFormat,
    tokenizer: &Tokenizer,
) -> Vec<Result<TokenRow, String>> {
    let one = |(line, _): &(Line, u128)| {
        let (_, example): (_, Example) =
            format::read(line.text.as_ref().map_err(Clone::clone)?, format)?;
        tokenizer.tokenize(&example)
    };
    let workers = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let share = lines.len().div_ceil(workers).max(1);
    std::thread::scope(|scope| {
        let handles: Vec<_> = lines
            .chunks(share)
            .map(|chunk| scope.spawn(move || chunk.iter().map(one).collect::<Vec<_>>()))
            .collect();
        handles
            .into_iter()
            .flat_map(|handle| {
                handle.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
            .collect()
    })
}
