//! Arranges rows in sequences, shuffles the sequences in each epoch, and builds micro-batches.

use crate::{
    data::{dataset::Dataset, packing},
    runtime::rng::RngKey,
};

/// The sequences of a split.
#[derive(Debug)]
pub struct Sequences {
    rows: Vec<Vec<usize>>,
}

/// A micro-batch: `T` tokens of one or more segments, concatenated without padding.
///
/// Attention is causal within a segment and masked between segments; positions restart in each.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Batch {
    /// The tokens, `[T]`.
    pub tokens: Vec<i64>,
    /// The length of each segment; the sum is `T`.
    pub segment_lengths: Vec<usize>,
    /// The positions whose next token is a target, `[N]`, ascending.
    pub target_positions: Vec<i64>,
    /// The next token of each of these positions, `[N]`.
    pub labels: Vec<i64>,
}

impl Sequences {
    /// Arranges a split: packed, or one row per sequence.
    pub fn new(dataset: &Dataset, packing: bool, context_length: u32) -> Self {
        let rows = if packing {
            packing::pack(&dataset.lengths(), context_length)
        } else {
            (0..dataset.len()).map(|row| vec![row]).collect()
        };
        Self { rows }
    }

    /// Returns the number of sequences.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Returns whether there is no sequence.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Returns the order of the sequences in an epoch: a pure function of seed and epoch, so that
    /// checkpoints need no data cursor.
    pub fn epoch_order(&self, seed: u64, epoch: u64) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.len()).collect();
        let numbers = RngKey::from_seed(seed).fold_in_name("order").fold_in(epoch);
        // Fisher–Yates.
        for last in (1..order.len()).rev() {
            let other = (numbers.uniform(last as u64) * (last + 1) as f64) as usize;
            order.swap(last, other);
        }
        order
    }

    /// Returns the `count` sequences with the most tokens; repeats them if there are fewer.
    pub fn largest(&self, dataset: &Dataset, count: usize) -> Vec<usize> {
        let lengths = dataset.lengths();
        let tokens = |sequence: usize| -> u64 {
            self.rows[sequence].iter().map(|&row| u64::from(lengths[row])).sum()
        };
        let mut all: Vec<usize> = (0..self.len()).collect();
        all.sort_by_key(|&sequence| std::cmp::Reverse(tokens(sequence)));
        all.into_iter().cycle().take(count).collect()
    }

    /// Builds a micro-batch of sequences.
    pub fn batch(&self, dataset: &Dataset, sequences: &[usize]) -> Batch {
        let mut batch = Batch::default();
        for row in sequences.iter().flat_map(|&sequence| &self.rows[sequence]) {
            let row = dataset.row(*row);
            let start = batch.tokens.len() as i64;
            for (index, &token) in row.tokens.iter().enumerate() {
                if index > 0 && row.targets[index] {
                    batch.target_positions.push(start + index as i64 - 1);
                    batch.labels.push(i64::from(token));
                }
            }
            batch.segment_lengths.push(row.tokens.len());
            batch.tokens.extend(row.tokens.iter().map(|&token| i64::from(token)));
        }
        batch
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::data::tokenizer::targets::TokenRow;

    fn rows() -> impl Strategy<Value = Vec<TokenRow>> {
        let row = (2_usize..20, any::<u64>()).prop_map(|(length, bits)| {
            let mut targets: Vec<bool> =
                (0..length).map(|index| index > 0 && bits >> index & 1 == 1).collect();
            targets[length - 1] = true;
            // Distinct tokens identify the targets.
            TokenRow {
                tokens: (0..length as u64)
                    .map(|index| (bits.wrapping_add(index) % 100_000) as u32)
                    .collect(),
                targets,
            }
        });
        prop::collection::vec(row, 1..30)
    }

    proptest! {
        #[test]
        fn every_target_is_predicted_once_an_epoch_from_its_own_row(rows in rows(), packing: bool, epoch in 0_u64..3) {
            let directory = tempfile::tempdir().unwrap();
            let dataset = Dataset::of_rows(&rows, directory.path()).unwrap();
            let sequences = Sequences::new(&dataset, packing, 20);
            let mut found = Vec::new();
            for chosen in sequences.epoch_order(1, epoch).chunks(3) {
                let batch = sequences.batch(&dataset, chosen);
                prop_assert_eq!(batch.segment_lengths.iter().sum::<usize>(), batch.tokens.len());
                let mut ends = Vec::new();
                for length in &batch.segment_lengths {
                    ends.push(ends.last().unwrap_or(&0) + length);
                }
                for (&position, &label) in batch.target_positions.iter().zip(&batch.labels) {
                    let next = position as usize + 1;
                    prop_assert!(!ends.contains(&next), "the first token of a segment is no target");
                    prop_assert_eq!(batch.tokens[next], label);
                    found.push(label as u32);
                }
            }
            let mut expected: Vec<u32> = rows.iter().flat_map(|row| row.tokens.iter().zip(&row.targets).filter(|(_, target)| **target).map(|(token, _)| *token)).collect();
            found.sort_unstable();
            expected.sort_unstable();
            prop_assert_eq!(found, expected);
        }
    }

    #[test]
    fn the_largest_are_those_with_the_most_tokens() {
        let directory = tempfile::tempdir().unwrap();
        let row = |length: usize| TokenRow { tokens: vec![1; length], targets: vec![true; length] };
        let rows = [5, 9, 2, 7].map(row);
        let dataset = Dataset::of_rows(&rows, directory.path()).unwrap();
        let sequences = Sequences { rows: vec![vec![0], vec![1], vec![2, 3]] };
        assert_eq!(sequences.largest(&dataset, 2), [1, 2]);
        assert_eq!(sequences.largest(&dataset, 4), [1, 2, 0, 1]);
    }

    #[test]
    fn epochs_have_orders_of_their_own_and_keep_them() {
        let sequences = Sequences { rows: (0..50).map(|row| vec![row]).collect() };
        assert_eq!(sequences.epoch_order(7, 1), sequences.epoch_order(7, 1));
        assert_ne!(sequences.epoch_order(7, 1), sequences.epoch_order(7, 2));
        assert_ne!(sequences.epoch_order(7, 1), sequences.epoch_order(8, 1));
        let mut sorted = sequences.epoch_order(7, 1);
        sorted.sort_unstable();
        assert_eq!(sorted, (0..50).collect::<Vec<_>>());
    }
}
