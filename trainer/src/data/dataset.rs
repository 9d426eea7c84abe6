//! The tokens of a split on local disk, mapped into memory.

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::Path,
};

use finetune_contract::{FailureReason, OnOverflow};
use memmap2::Mmap;

use crate::{
    data::{
        chat::rendered::Rendered,
        row_sources::RowSources,
        rows::for_each_row,
        tokenizer::{TokenRow, Tokenizer},
    },
    failure::Failure,
};

/// Set in a stored token that is predicted; no vocabulary reaches it.
const TARGET: u32 = 1 << 31;

/// The rows of a split, after overflow: every row fits the context and has a target.
#[derive(Debug)]
pub struct Dataset {
    tokens: Option<Mmap>,
    /// First token and length of each row.
    rows: Vec<(u64, u32)>,
    sha256: String,
    /// Rows that could not be used.
    left_out: u64,
    rendered: Rendered,
}

/// One row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// The tokens.
    pub tokens: Vec<u32>,
    /// Whether each is predicted from those before it.
    pub targets: Vec<bool>,
}

impl Dataset {
    /// Reads and tokenises a split into a file in `scratch`.
    ///
    /// # Errors
    /// A [`Failure`] if a row is bad, none is left, or a row is too long and that is an error.
    pub fn prepare(
        sources: &RowSources,
        tokenizer: &Tokenizer,
        context_length: u32,
        on_overflow: OnOverflow,
        scratch: &Path,
    ) -> Result<Self, Failure> {
        let path = scratch.join("tokens.bin");
        let disk =
            |error: std::io::Error| Failure::from_io(&error, &format!("cannot write {path:?}"));
        let mut file = BufWriter::with_capacity(1 << 20, File::create(&path).map_err(disk)?);
        let (mut rows, mut start, mut too_long) = (Vec::new(), 0_u64, 0_u64);
        let mut rendered = Rendered::default();
        let read = for_each_row(sources, tokenizer, &mut |split_row| {
            let Ok(tokenized) = split_row.outcome else { return Ok(()) };
            rendered.add(&tokenized);
            for row in tokenized.rows {
                too_long += u64::from(row.tokens.len() > context_length as usize);
                let Some(length) = row.trained_length(context_length, on_overflow) else {
                    continue;
                };
                let TokenRow { tokens, targets } = row;
                for (token, is_target) in tokens[..length].iter().zip(&targets) {
                    let stored = if *is_target { token | TARGET } else { *token };
                    file.write_all(&stored.to_le_bytes()).map_err(disk)?;
                }
                rows.extend((0..split_row.copies).map(|_| (start, length as u32)));
                start += length as u64;
            }
            Ok(())
        })?;
        let invalid = |message: String| Err(Failure::new(FailureReason::InvalidDataset, message));
        if let Some(refusal) = read.refusal(sources.on_invalid_row) {
            let fault = read.faults.first();
            let first = fault.map_or(String::new(), |fault| {
                format!("; the first is {}: {}", fault.places[0], fault.reason)
            });
            return invalid(format!("{}: {refusal}{first}", sources.names()));
        }
        if too_long > 0 && on_overflow == OnOverflow::Error {
            return invalid(format!(
                "{}: {too_long} rows have more than {context_length} tokens",
                sources.names()
            ));
        }
        if rows.is_empty() {
            return invalid(format!("{} has no row that can be trained on", sources.names()));
        }
        let file = file.into_inner().map_err(|error| disk(error.into_error()))?;
        drop(file);
        let file = File::open(&path).map_err(disk)?;
        #[expect(unsafe_code, reason = "mapping a file is unsafe because others may change it")]
        // SAFETY: the file was just written into this run's own scratch directory, and nobody
        // writes to it again.
        let tokens = unsafe { Mmap::map(&file) }.map_err(disk)?;
        Ok(Self {
            tokens: Some(tokens),
            rows,
            sha256: read.sha256,
            left_out: read.bad_rows,
            rendered,
        })
    }

    /// Makes a dataset of given rows, for tests.
    ///
    /// # Errors
    /// Those of writing a file.
    pub fn of_rows(rows: &[TokenRow], directory: &Path) -> std::io::Result<Self> {
        let mut bytes = Vec::new();
        let mut places = Vec::new();
        for row in rows {
            places.push((bytes.len() as u64 / 4, row.tokens.len() as u32));
            for (token, is_target) in row.tokens.iter().zip(&row.targets) {
                bytes.extend((if *is_target { token | TARGET } else { *token }).to_le_bytes());
            }
        }
        let path = directory.join("tokens.bin");
        std::fs::write(&path, bytes)?;
        #[expect(unsafe_code, reason = "mapping a file is unsafe because others may change it")]
        // SAFETY: as above.
        let tokens = unsafe { Mmap::map(&File::open(path)?) }?;
        Ok(Self {
            tokens: Some(tokens),
            rows: places,
            sha256: String::new(),
            left_out: 0,
            rendered: Rendered::default(),
        })
    }

    /// Returns the number of rows.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Tells whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Returns the tokens of each row.
    pub fn lengths(&self) -> Vec<u32> {
        self.rows.iter().map(|(_, length)| *length).collect()
    }

    /// Returns the digest of the raw lines, as the census has it.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// Returns how many rows could not be used and are not here.
    pub fn left_out(&self) -> u64 {
        self.left_out
    }

    /// Returns what rendering made of the conversations.
    pub fn rendered(&self) -> &Rendered {
        &self.rendered
    }

    /// Reads one row.
    pub fn row(&self, index: usize) -> Row {
        let (start, length) = self.rows[index];
        let bytes = self.tokens.as_deref().unwrap_or_default();
        let bytes = &bytes[start as usize * 4..][..length as usize * 4];
        let stored = bytes
            .chunks_exact(4)
            .map(|four| u32::from_le_bytes([four[0], four[1], four[2], four[3]]));
        let (tokens, targets) = stored.map(|token| (token & !TARGET, token & TARGET != 0)).unzip();
        Row { tokens, targets }
    }
}
