//! Packs rows into sequences: best-fit decreasing.
//!
//! Each row, longest first, goes into the fullest sequence that still has room for it. The census only
//! counts the sequences with [`packed_count`], training packs them with [`pack`]; a property test checks
//! that the two agree.

use std::collections::BTreeMap;

/// Packs rows into sequences of at most `context` tokens and returns the rows of each.
///
/// Deterministic: rows of equal length keep their order.
///
/// # Panics
/// If a row is longer than `context`.
pub fn pack(lengths: &[u32], context: u32) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&row| std::cmp::Reverse(lengths[row]));
    let mut sequences: Vec<Vec<usize>> = Vec::new();
    let mut by_room: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    for row in order {
        let length = lengths[row];
        assert!(length <= context, "rows are truncated to the context before they are packed");
        let (room, sequence) = if let Some((&room, with_room)) = by_room.range_mut(length..).next()
        {
            let sequence = with_room.pop().expect("empty lists are removed");
            if with_room.is_empty() {
                by_room.remove(&room);
            }
            (room, sequence)
        } else {
            sequences.push(Vec::new());
            (context, sequences.len() - 1)
        };
        sequences[sequence].push(row);
        by_room.entry(room - length).or_default().push(sequence);
    }
    for rows in &mut sequences {
        rows.sort_unstable();
    }
    sequences
}

/// Counts the sequences that [`pack`] makes, given the number of rows of each length.
///
/// A sequence that is chosen for a row of some length remains the fullest with room for that length, so
/// it takes as many such rows as fit. Therefore all rows of a length are placed at once.
pub fn packed_count(rows_by_length: &BTreeMap<u32, u64>, context: u32) -> u64 {
    let mut by_room: BTreeMap<u32, u64> = BTreeMap::new();
    let mut sequences = 0;
    for (&length, &rows) in rows_by_length.iter().rev() {
        let mut left = rows;
        while left > 0 {
            let room = by_room.range(length.max(1)..).next().map(|(&room, &count)| (room, count));
            let (room, available) = room.unwrap_or((context, u64::MAX));
            let per_sequence = u64::from(room / length.max(1));
            let used = available.min(left.div_ceil(per_sequence));
            let full = used.min(left / per_sequence);
            if available == u64::MAX {
                sequences += used;
            } else {
                let count = by_room.get_mut(&room).expect("it was just found");
                *count -= used;
                if *count == 0 {
                    by_room.remove(&room);
                }
            }
            let mut put_back = |room: u32, count: u64| {
                if count > 0 {
                    *by_room.entry(room).or_default() += count;
                }
            };
            put_back(room - per_sequence as u32 * length, full);
            let rest = left - full * per_sequence;
            if used > full {
                put_back(room - rest as u32 * length, 1);
                left = 0;
            } else {
                left = rest;
            }
        }
    }
    sequences
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn packs_every_row_once_within_the_context(lengths in prop::collection::vec(1_u32..40, 0..200)) {
            let sequences = pack(&lengths, 40);
            let mut seen: Vec<usize> = sequences.iter().flatten().copied().collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..lengths.len()).collect::<Vec<_>>());
            for rows in &sequences {
                prop_assert!(rows.iter().map(|&row| lengths[row]).sum::<u32>() <= 40);
            }
        }

        #[test]
        fn counts_what_it_would_pack(lengths in prop::collection::vec(1_u32..40, 0..300)) {
            let mut rows_by_length = BTreeMap::new();
            for &length in &lengths {
                *rows_by_length.entry(length).or_default() += 1;
            }
            prop_assert_eq!(packed_count(&rows_by_length, 40), pack(&lengths, 40).len() as u64);
        }
    }

    #[test]
    fn fills_the_fullest_sequence_first() {
        assert_eq!(pack(&[6, 4, 7, 3], 10), [vec![2, 3], vec![0, 1]]);
    }
}
