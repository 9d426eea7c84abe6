//! Stores the tokens of a split on the local disk, mapped into memory.

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::Path,
};

use finetune_contract::{FailureReason, OnOverflow};
use memmap2::Mmap;

use crate::{
    data::{
        chat::rendering_stats::RenderingStats,
        row_sources::RowSources,
        rows::for_each_row,
        tokenizer::{Tokenizer, targets::TokenRow},
    },
    failure::Failure,
};

/// The bit that marks a stored token as a target; no vocabulary is that large.
const TARGET_BIT: u32 = 1 << 31;

/// The rows of a split. Every row fits the context and has a target.
#[derive(Debug)]
pub struct Dataset {
    tokens: Option<Mmap>,
    /// The first token and the length of each row.
    rows: Vec<(u64, u32)>,
    sha256: String,
    /// The number of invalid rows.
    skipped_rows: u64,
    rendering_stats: RenderingStats,
}

/// One row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// The tokens.
    pub tokens: Vec<u32>,
    /// Whether each token is a target.
    pub targets: Vec<bool>,
}

impl Dataset {
    /// Reads and tokenizes a split into a file in `scratch`.
    ///
    /// # Errors
    /// A [`Failure`] if invalid or too long rows are errors and there are any, or if no row is left.
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
        let mut rendering_stats = RenderingStats::default();
        let summary = for_each_row(sources, tokenizer, &mut |row_outcome| {
            let Ok(tokenized) = row_outcome.result else { return Ok(()) };
            rendering_stats.add(&tokenized);
            for row in tokenized.rows {
                too_long += u64::from(row.tokens.len() > context_length as usize);
                let Some(length) = row.trained_length(context_length, on_overflow) else {
                    continue;
                };
                let TokenRow { tokens, targets } = row;
                for (token, is_target) in tokens[..length].iter().zip(&targets) {
                    let stored = if *is_target { token | TARGET_BIT } else { *token };
                    file.write_all(&stored.to_le_bytes()).map_err(disk)?;
                }
                rows.extend((0..row_outcome.copies).map(|_| (start, length as u32)));
                start += length as u64;
            }
            Ok(())
        })?;
        let invalid = |message: String| Err(Failure::new(FailureReason::InvalidDataset, message));
        if let Some(refusal) = summary.refusal(sources.on_invalid_row) {
            let first = summary.error_groups.first().map_or(String::new(), |group| {
                format!("; the first is {}: {}", group.locations[0], group.reason)
            });
            return invalid(format!("{}: {refusal}{first}", sources.uris()));
        }
        if too_long > 0 && on_overflow == OnOverflow::Error {
            return invalid(format!(
                "{}: {too_long} rows have more than {context_length} tokens",
                sources.uris()
            ));
        }
        if rows.is_empty() {
            return invalid(format!("{} has no row that can be trained on", sources.uris()));
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
            sha256: summary.sha256,
            skipped_rows: summary.invalid_rows,
            rendering_stats,
        })
    }

    /// Creates a dataset from rows, for tests.
    ///
    /// # Errors
    /// An error of writing the file.
    pub fn of_rows(rows: &[TokenRow], directory: &Path) -> std::io::Result<Self> {
        let mut bytes = Vec::new();
        let mut spans = Vec::new();
        for row in rows {
            spans.push((bytes.len() as u64 / 4, row.tokens.len() as u32));
            for (token, is_target) in row.tokens.iter().zip(&row.targets) {
                bytes.extend((if *is_target { token | TARGET_BIT } else { *token }).to_le_bytes());
            }
        }
        let path = directory.join("tokens.bin");
        std::fs::write(&path, bytes)?;
        #[expect(unsafe_code, reason = "mapping a file is unsafe because others may change it")]
        // SAFETY: as above.
        let tokens = unsafe { Mmap::map(&File::open(path)?) }?;
        Ok(Self {
            tokens: Some(tokens),
            rows: spans,
            sha256: String::new(),
            skipped_rows: 0,
            rendering_stats: RenderingStats::default(),
        })
    }

    /// Returns the number of rows.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Returns whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Returns the number of tokens of each row.
    pub fn lengths(&self) -> Vec<u32> {
        self.rows.iter().map(|(_, length)| *length).collect()
    }

    /// Returns the digest of the raw rows, which the census contains as well.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// Returns how many rows were skipped because they are invalid.
    pub fn skipped_rows(&self) -> u64 {
        self.skipped_rows
    }

    /// Returns counts over the rendered conversations.
    pub fn rendering_stats(&self) -> &RenderingStats {
        &self.rendering_stats
    }

    /// Reads one row.
    pub fn row(&self, index: usize) -> Row {
        let (start, length) = self.rows[index];
        let bytes = self.tokens.as_deref().unwrap_or_default();
        let bytes = &bytes[start as usize * 4..][..length as usize * 4];
        let stored = bytes
            .chunks_exact(4)
            .map(|four| u32::from_le_bytes([four[0], four[1], four[2], four[3]]));
        let (tokens, targets) =
            stored.map(|token| (token & !TARGET_BIT, token & TARGET_BIT != 0)).unzip();
        Row { tokens, targets }
    }
}
