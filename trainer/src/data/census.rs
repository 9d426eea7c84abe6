//! Computes the statistics of a split, and the effect of each context length on it.

use std::collections::{BTreeMap, HashSet};

use finetune_contract::{DatasetCensus, LengthPoint, OnOverflow, Split};

use crate::{
    data::{
        chat::rendering_stats::RenderingStats,
        packing::packed_count,
        row_sources::RowSources,
        rows::{ReadSummary, for_each_row},
        tokenizer::Tokenizer,
    },
    failure::Failure,
};

/// The context lengths that are always evaluated, in addition to those that depend on the data.
const CONTEXT_LENGTHS: [u32; 17] = [
    64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 32768,
];
/// Context lengths that depend on the data are rounded up to a multiple of this.
const CONTEXT_STEP: u32 = 64;
/// The most digests that are kept for finding duplicates, 16 bytes each. Duplicates of later rows are
/// not found.
const MAX_DIGESTS: usize = 4_000_000;

/// The statistics of a split.
pub struct CountedSplit {
    /// The dataset statistics, as reported.
    pub census: DatasetCensus,
    /// The split.
    pub split: Split,
    /// The files and the invalid rows.
    pub summary: ReadSummary,
    /// The digests of the rows.
    pub digests: HashSet<u128>,
    /// The largest token id; 0 if there are no valid rows.
    pub largest_token: u32,
    /// Counts over the rendered conversations.
    pub rendering_stats: RenderingStats,
}

/// Reads a split and computes its statistics.
///
/// # Errors
/// A [`Failure`] if its files cannot be read.
pub fn count(
    rows: &RowSources,
    tokenizer: &Tokenizer,
    on_overflow: OnOverflow,
    context_length: Option<u32>,
    max_context: u32,
) -> Result<CountedSplit, Failure> {
    let mut lengths = Lengths::default();
    let mut digests = HashSet::new();
    let mut rendering_stats = RenderingStats::default();
    let (mut duplicate_rows, mut largest_token) = (0, 0);
    let summary = for_each_row(rows, tokenizer, &mut |outcome| {
        let Ok(tokenized) = &outcome.result else { return Ok(()) };
        for row in &tokenized.rows {
            for _ in 0..outcome.copies {
                lengths.add(&row.tokens, &row.targets);
            }
            largest_token = row.tokens.iter().copied().fold(largest_token, u32::max);
        }
        rendering_stats.add(tokenized);
        if digests.contains(&outcome.digest) {
            duplicate_rows += 1;
        } else if digests.len() < MAX_DIGESTS {
            digests.insert(outcome.digest);
        }
        Ok(())
    })?;
    let census = DatasetCensus {
        format: summary.format,
        files: summary.files,
        file_names: summary.file_names.clone(),
        rows: lengths.rows,
        bad_rows: summary.invalid_rows,
        tokens: lengths.tokens,
        target_tokens: lengths.target_tokens,
        duplicate_rows,
        max_tokens: lengths.max(),
        p50_tokens: lengths.quantile(50),
        p95_tokens: lengths.quantile(95),
        sha256: summary.sha256.clone(),
        lengths: lengths.points(on_overflow, context_length, max_context),
    };
    Ok(CountedSplit { census, split: rows.split, summary, digests, largest_token, rendering_stats })
}

/// The number of rows by length and by the position of their first target, which is all that truncation
/// and packing depend on.
#[derive(Debug, Default)]
struct Lengths {
    rows: u64,
    tokens: u64,
    target_tokens: u64,
    by_length: BTreeMap<u32, u64>,
    /// By position of the first target: the number of rows, and the most targets in one of them.
    by_first_target: BTreeMap<u32, (u64, u32)>,
    /// The largest fraction of targets among the tokens of a row.
    largest_target_share: f64,
}

impl Lengths {
    fn add(&mut self, tokens: &[u32], targets: &[bool]) {
        self.rows += 1;
        self.tokens += tokens.len() as u64;
        let count = targets.iter().filter(|is_target| **is_target).count();
        self.target_tokens += count as u64;
        *self.by_length.entry(tokens.len() as u32).or_default() += 1;
        let first = targets.iter().position(|is_target| *is_target).unwrap_or(tokens.len());
        let (rows, most) = self.by_first_target.entry(first as u32).or_default();
        *rows += 1;
        *most = (*most).max(count as u32);
        let share = count as f64 / tokens.len().max(1) as f64;
        self.largest_target_share = self.largest_target_share.max(share);
    }

    fn max(&self) -> u32 {
        self.by_length.keys().next_back().copied().unwrap_or(0)
    }

    /// Returns the smallest length that at least `percent` % of the rows do not exceed.
    fn quantile(&self, percent: u64) -> u32 {
        let needed = (self.rows * percent).div_ceil(100);
        let mut seen = 0;
        for (&length, &rows) in &self.by_length {
            seen += rows;
            if seen >= needed {
                return length;
            }
        }
        0
    }

    fn points(
        &self,
        on_overflow: OnOverflow,
        requested: Option<u32>,
        max_context: u32,
    ) -> Vec<LengthPoint> {
        let longest = self.max().next_multiple_of(CONTEXT_STEP);
        let mut contexts: Vec<u32> =
            CONTEXT_LENGTHS.into_iter().filter(|&context| context < longest).collect();
        contexts.extend([longest, self.quantile(95).next_multiple_of(CONTEXT_STEP)]);
        contexts.extend(requested);
        contexts.extend((longest > max_context).then_some(max_context));
        contexts.retain(|&context| context > 0 && context <= max_context);
        contexts.sort_unstable();
        contexts.dedup();
        contexts.into_iter().map(|context| self.point(context, on_overflow)).collect()
    }

    fn point(&self, context: u32, on_overflow: OnOverflow) -> LengthPoint {
        let longer = || self.by_length.range(context + 1..);
        let over: u64 = longer().map(|(_, rows)| rows).sum();
        let cut = longer().map(|(length, rows)| u64::from(length - context) * rows).sum();
        // A row whose first target is at or beyond the context is longer than it and loses all targets.
        let empty: u64 = self.by_first_target.range(context..).map(|(_, (rows, _))| rows).sum();
        let mut rows_by_length: BTreeMap<u32, u64> =
            self.by_length.range(..=context).map(|(&length, &rows)| (length, rows)).collect();
        if on_overflow == OnOverflow::Truncate && over > empty {
            *rows_by_length.entry(context).or_default() += over - empty;
        }
        // The targets that remain after truncation lie between the first one and the context.
        let left = self.by_first_target.range(..context);
        let most_targets = left.map(|(first, &(_, most))| most.min(context - first)).max();
        // The fraction of a packed sequence is at most that of one of its rows, but truncation may
        // increase the fraction of a row.
        let by_share = (self.largest_target_share * f64::from(context)).ceil() as u32;
        let most_packed_targets = most_targets.map(|most| most.max(by_share));
        let packed = packed_count(&rows_by_length, context);
        LengthPoint { context, over, cut, empty, packed, most_targets, most_packed_targets }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lengths(rows: &[(usize, usize)]) -> Lengths {
        let mut lengths = Lengths::default();
        for &(length, first_target) in rows {
            let targets: Vec<bool> = (0..length).map(|index| index >= first_target).collect();
            lengths.add(&vec![0; length], &targets);
        }
        lengths
    }

    #[test]
    fn counts_the_tokens_that_a_context_cuts_off() {
        let lengths = lengths(&[(10, 1), (100, 90), (70, 3), (64, 1)]);
        let point = lengths.point(64, OnOverflow::Truncate);
        assert_eq!((point.over, point.cut, point.empty), (2, 36 + 6, 1));
        // These remain: 10, 64 (truncated from 70) and 64.
        assert_eq!(point.packed, 3);
        assert_eq!(lengths.point(64, OnOverflow::Drop).packed, 2);
        // All tokens of the row of 64 but the first; at least as many of that of 70; ten of that of 100.
        assert_eq!(point.most_targets, Some(63));
        assert_eq!(lengths.point(95, OnOverflow::Drop).most_targets, Some(67));
        assert_eq!(lengths.point(1, OnOverflow::Drop).most_targets, None);
    }

    #[test]
    fn packed_rows_have_no_more_targets_than_the_densest() {
        // Half of the tokens of each row are targets, so 32 of 64 packed tokens are.
        let sparse = lengths(&[(10, 5), (20, 10), (40, 20)]);
        let point = sparse.point(64, OnOverflow::Truncate);
        assert_eq!((point.most_targets, point.most_packed_targets), (Some(20), Some(32)));
        // Truncation leaves mostly targets.
        let cut = lengths(&[(100, 2), (10, 9)]);
        let point = cut.point(20, OnOverflow::Truncate);
        assert_eq!((point.most_targets, point.most_packed_targets), (Some(18), Some(20)));
    }

    #[test]
    fn quantiles_are_lengths_that_occur() {
        let rows: Vec<_> = (1..=100).map(|length| (length + 1, 1)).collect();
        let lengths = lengths(&rows);
        assert_eq!((lengths.quantile(50), lengths.quantile(95), lengths.max()), (51, 96, 101));
    }

    #[test]
    fn evaluates_fixed_data_dependent_and_requested_context_lengths() {
        let contexts = |requested, max| {
            let lengths = lengths(&[(10, 1), (200, 1), (300, 1)]);
            lengths
                .points(OnOverflow::Truncate, requested, max)
                .iter()
                .map(|point| point.context)
                .collect::<Vec<_>>()
        };
        assert_eq!(contexts(Some(100), 8192), [64, 100, 128, 192, 256, 320]);
        assert_eq!(contexts(None, 256), [64, 128, 192, 256]);
    }
}
