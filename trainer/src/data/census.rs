//! Counting a split: what is in it, and what each context length would do to it.

use std::collections::{BTreeMap, HashSet};

use finetune_contract::{DatasetCensus, LengthPoint, OnOverflow, Split};

use crate::{
    data::{
        chat::rendered::Rendered,
        packing::packed_count,
        row_sources::RowSources,
        rows::{Read, for_each_row},
        tokenizer::Tokenizer,
    },
    failure::Failure,
};

/// Context lengths that are looked at, beside those the data suggests.
const LADDER: [u32; 17] = [
    64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 32768,
];
/// Lengths the data suggests are rounded up to a multiple of this.
const STEP: u32 = 64;
/// Rows whose digests are remembered for finding duplicates, at 16 bytes each; beyond, duplicates
/// of earlier rows are still found, later ones are not.
const REMEMBERED: usize = 4_000_000;

/// A counted split.
pub struct Counted {
    /// The figures.
    pub census: DatasetCensus,
    /// Which split it is.
    pub split: Split,
    /// What was read beside the usable rows.
    pub read: Read,
    /// Digests of the rows.
    pub digests: HashSet<u128>,
    /// The largest token id of all usable rows; 0 if there are none.
    pub largest_token: u32,
    /// What rendering made of the conversations.
    pub rendered: Rendered,
}

/// Counts a split.
///
/// # Errors
/// A [`Failure`] if its files cannot be read.
pub fn count(
    rows: &RowSources,
    tokenizer: &Tokenizer,
    on_overflow: OnOverflow,
    context_length: Option<u32>,
    max_context: u32,
) -> Result<Counted, Failure> {
    let mut lengths = Lengths::default();
    let mut digests = HashSet::new();
    let mut rendered = Rendered::default();
    let (mut duplicate_rows, mut largest_token) = (0, 0);
    let read = for_each_row(rows, tokenizer, &mut |split_row| {
        let Ok(tokenized) = &split_row.outcome else { return Ok(()) };
        for row in &tokenized.rows {
            for _ in 0..split_row.copies {
                lengths.add(&row.tokens, &row.targets);
            }
            largest_token = row.tokens.iter().copied().fold(largest_token, u32::max);
        }
        rendered.add(tokenized);
        if digests.contains(&split_row.digest) {
            duplicate_rows += 1;
        } else if digests.len() < REMEMBERED {
            digests.insert(split_row.digest);
        }
        Ok(())
    })?;
    let census = DatasetCensus {
        format: read.format,
        files: read.files,
        file_names: read.file_names.clone(),
        rows: lengths.rows,
        bad_rows: read.bad_rows,
        tokens: lengths.tokens,
        target_tokens: lengths.target_tokens,
        duplicate_rows,
        max_tokens: lengths.max(),
        p50_tokens: lengths.quantile(50),
        p95_tokens: lengths.quantile(95),
        sha256: read.sha256.clone(),
        lengths: lengths.points(on_overflow, context_length, max_context),
    };
    Ok(Counted { census, split: rows.split, read, digests, largest_token, rendered })
}

/// Rows by length, and by where their first target is: all that truncation and packing depend on.
#[derive(Debug, Default)]
struct Lengths {
    rows: u64,
    tokens: u64,
    target_tokens: u64,
    by_length: BTreeMap<u32, u64>,
    /// Rows by where their first target is, and the most targets that one of them has.
    by_first_target: BTreeMap<u32, (u64, u32)>,
    /// The largest share of a row's tokens that are targets.
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

    /// Returns the smallest length that at least `percent` of the rows do not exceed.
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
        asked: Option<u32>,
        max_context: u32,
    ) -> Vec<LengthPoint> {
        let longest = self.max().next_multiple_of(STEP);
        let mut contexts: Vec<u32> =
            LADDER.into_iter().filter(|&context| context < longest).collect();
        contexts.extend([longest, self.quantile(95).next_multiple_of(STEP)]);
        contexts.extend(asked);
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
        // A first target at or beyond the context is cut off, and the row with it is longer.
        let empty: u64 = self.by_first_target.range(context..).map(|(_, (rows, _))| rows).sum();
        let mut rows_by_length: BTreeMap<u32, u64> =
            self.by_length.range(..=context).map(|(&length, &rows)| (length, rows)).collect();
        if on_overflow == OnOverflow::Truncate && over > empty {
            *rows_by_length.entry(context).or_default() += over - empty;
        }
        // What a cut leaves of a row's targets lies between the first one and the end.
        let left = self.by_first_target.range(..context);
        let most_targets = left.map(|(first, &(_, most))| most.min(context - first)).max();
        // The share of a packed sequence is at most that of one of its rows, and a cut may raise a row's.
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
    fn counts_what_a_context_would_cut() {
        let lengths = lengths(&[(10, 1), (100, 90), (70, 3), (64, 1)]);
        let point = lengths.point(64, OnOverflow::Truncate);
        assert_eq!((point.over, point.cut, point.empty), (2, 36 + 6, 1));
        // Left: 10, 64 (cut from 70) and 64.
        assert_eq!(point.packed, 3);
        assert_eq!(lengths.point(64, OnOverflow::Drop).packed, 2);
        // Of the row of 64 all but the first; of that of 70 as many at least; the one of 100 has ten.
        assert_eq!(point.most_targets, Some(63));
        assert_eq!(lengths.point(95, OnOverflow::Drop).most_targets, Some(67));
        assert_eq!(lengths.point(1, OnOverflow::Drop).most_targets, None);
    }

    #[test]
    fn packed_rows_have_no_more_targets_than_the_densest() {
        // Half of each is a target: of 64 packed tokens 32 are.
        let sparse = lengths(&[(10, 5), (20, 10), (40, 20)]);
        let point = sparse.point(64, OnOverflow::Truncate);
        assert_eq!((point.most_targets, point.most_packed_targets), (Some(20), Some(32)));
        // A row that is cut to what is a target.
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
    fn looks_at_the_ladder_the_data_and_the_wish() {
        let contexts = |asked, max| {
            let lengths = lengths(&[(10, 1), (200, 1), (300, 1)]);
            lengths
                .points(OnOverflow::Truncate, asked, max)
                .iter()
                .map(|point| point.context)
                .collect::<Vec<_>>()
        };
        assert_eq!(contexts(Some(100), 8192), [64, 100, 128, 192, 256, 320]);
        assert_eq!(contexts(None, 256), [64, 128, 192, 256]);
    }
}
