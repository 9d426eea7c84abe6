//! How tensors are sharded over ranks: by unit, each flattened and divided into equal shards.
//!
//! Pure arithmetic. A unit is a block, or the root unit with everything outside the blocks. The
//! tensors of a unit are flattened and concatenated, and rank `r` stores the `r`-th of equal shards
//! of the result. A rank's shards of all units form one flat tensor, so that one call updates,
//! clips or stores everything it has.

use std::{collections::BTreeMap, ops::Range};

use crate::architecture::{modules::TensorSpec, names};

/// The length of every shard is a multiple of this many elements: 64 bytes in fp32.
const ALIGNMENT: usize = 16;

/// The root unit: the embedding, the last norm and the head.
pub const ROOT: usize = 0;

/// Returns the unit of a block.
pub const fn block_unit(layer: usize) -> usize {
    layer + 1
}

/// Where the tensors of a model are stored, seen from one rank.
#[derive(Debug)]
pub struct Layout {
    rank: usize,
    units: Vec<Unit>,
    slots: BTreeMap<String, ParamSlot>,
    /// Names in the order of the unsharded flat tensor.
    names: Vec<String>,
    /// Elements of the unsharded flat tensor.
    unsharded_length: usize,
}

#[derive(Debug)]
struct Unit {
    /// Where this rank's shard starts in its flat tensor.
    first: usize,
    /// Elements of one shard.
    shard: usize,
    /// Elements of the unit with padding.
    padded: usize,
}

/// A contiguous range of the unsharded flat tensor that is also contiguous in a local one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// The first index in the unsharded tensor.
    pub global: usize,
    /// The first index in the local tensor.
    pub local: usize,
    /// The number of elements.
    pub length: usize,
}

impl Span {
    /// Returns the span of a whole unsharded tensor.
    pub const fn all(length: usize) -> Self {
        Self { global: 0, local: 0, length }
    }
}

/// A range to copy from one flat tensor to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopyRange {
    /// The first index in the source.
    pub from: usize,
    /// The first index in the destination.
    pub to: usize,
    /// The number of elements.
    pub length: usize,
}

/// Lists the ranges that two flat tensors have in common.
pub fn overlaps(from: &[Span], to: &[Span]) -> Vec<CopyRange> {
    let overlap = |from: &Span, to: &Span| {
        let first = from.global.max(to.global);
        let end = (from.global + from.length).min(to.global + to.length);
        (first < end).then(|| CopyRange {
            from: from.local + first - from.global,
            to: to.local + first - to.global,
            length: end - first,
        })
    };
    from.iter().flat_map(|from| to.iter().filter_map(move |to| overlap(from, to))).collect()
}

/// Where one tensor is stored.
#[derive(Debug)]
pub struct ParamSlot {
    /// The unit it belongs to.
    pub unit: usize,
    /// Its first element in the unit.
    pub offset: usize,
    /// The shape of the tensor.
    pub shape: Vec<i64>,
    /// Its first element in the unsharded flat tensor.
    pub global: usize,
}

impl ParamSlot {
    /// Returns the number of elements.
    pub fn length(&self) -> usize {
        self.shape.iter().product::<i64>() as usize
    }
}

impl Layout {
    /// Shards `specs` over `world_size` ranks, seen from `rank`.
    pub fn new(specs: &[TensorSpec], [rank, world_size]: [u32; 2]) -> Self {
        let (rank, world_size) = (rank as usize, world_size as usize);
        let mut lengths: Vec<usize> = Vec::new();
        let mut slots = BTreeMap::new();
        let mut unsharded_length = 0;
        for spec in specs {
            let unit = unit_of(&spec.name);
            if lengths.len() <= unit {
                lengths.resize(unit + 1, 0);
            }
            let shape = spec.shape.iter().map(|&size| size as i64).collect();
            let slot = ParamSlot { unit, offset: lengths[unit], shape, global: unsharded_length };
            lengths[unit] += slot.length();
            unsharded_length += slot.length();
            slots.insert(spec.name.clone(), slot);
        }
        let mut first = 0;
        let units = lengths.into_iter().map(|length| {
            let padded = length.next_multiple_of(ALIGNMENT * world_size);
            let unit = Unit { first, shard: padded / world_size, padded };
            first += unit.shard;
            unit
        });
        let units = units.collect();
        let names = specs.iter().map(|spec| spec.name.clone()).collect();
        Self { rank, units, slots, names, unsharded_length }
    }

    /// Returns the number of units.
    pub fn units(&self) -> usize {
        self.units.len()
    }

    /// Returns the number of elements this rank stores, over all units.
    pub fn shard_length(&self) -> usize {
        self.units.iter().map(|unit| unit.shard).sum()
    }

    /// Returns the number of elements of the unsharded flat tensor.
    pub fn unsharded_length(&self) -> usize {
        self.unsharded_length
    }

    /// Returns the number of elements of a unit, with padding.
    pub fn unit_length(&self, unit: usize) -> usize {
        self.units[unit].padded
    }

    /// Returns the range of this rank's shard of a unit in its flat tensor.
    pub fn shard(&self, unit: usize) -> Range<usize> {
        let Unit { first, shard, .. } = self.units[unit];
        first..first + shard
    }

    /// Returns where a tensor is stored; `None` if it is not in the layout.
    pub fn slot(&self, name: &str) -> Option<&ParamSlot> {
        self.slots.get(name)
    }

    /// Lists the names in the order of the unsharded flat tensor.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Lists the elements of the unsharded flat tensor that this rank stores.
    pub fn spans(&self) -> Vec<Span> {
        let span = |name: &String| {
            let slot = self.slot(name)?;
            let (range, local) = self.local_range(slot)?;
            Some(Span { global: slot.global + range.start, local, length: range.len() })
        };
        self.names.iter().filter_map(span).collect()
    }

    /// Returns the elements of a tensor that this rank stores, and where they start in its flat
    /// tensor.
    pub fn local_range(&self, slot: &ParamSlot) -> Option<(Range<usize>, usize)> {
        let Unit { first, shard, .. } = self.units[slot.unit];
        let (start, end) = (self.rank * shard, (self.rank + 1) * shard);
        let from = start.max(slot.offset);
        let to = end.min(slot.offset + slot.length());
        (from < to).then(|| (from - slot.offset..to - slot.offset, first + from - start))
    }
}

/// Returns the unit a tensor belongs to, by its checkpoint name.
pub(crate) fn unit_of(name: &str) -> usize {
    names::layer(name).map_or(ROOT, block_unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn specs() -> Vec<TensorSpec> {
        [
            ("model.embed_tokens.weight", vec![7, 5]),
            ("model.layers.0.mlp.up_proj.weight", vec![9, 3]),
            ("model.layers.0.input_layernorm.weight", vec![5]),
            ("model.layers.1.mlp.up_proj.weight", vec![9, 3]),
            ("model.norm.weight", vec![5]),
        ]
        .map(|(name, shape)| TensorSpec { name: name.to_owned(), shape })
        .to_vec()
    }

    #[test]
    fn every_element_is_stored_once_for_any_number_of_ranks() {
        for world_size in [1, 2, 3, 4, 7] {
            let layouts: Vec<_> =
                (0..world_size).map(|rank| Layout::new(&specs(), [rank, world_size])).collect();
            for spec in specs() {
                let mut stored: Vec<Range<usize>> = layouts
                    .iter()
                    .filter_map(|layout| Some(layout.local_range(layout.slot(&spec.name)?)?.0))
                    .collect();
                stored.sort_by_key(|range| range.start);
                let ends = stored.iter().scan(0, |end, range| {
                    let meets = range.start == *end;
                    *end = range.end;
                    Some(meets)
                });
                assert!(ends.into_iter().all(|meets| meets), "{stored:?}");
                assert_eq!(stored.last().unwrap().end, spec.shape.iter().product::<usize>());
            }
            let shard = layouts[0].shard_length();
            assert!(layouts.iter().all(|layout| layout.shard_length() == shard));
            assert!(shard * world_size as usize >= layouts[0].unsharded_length());
        }
    }

    #[test]
    fn shards_of_one_world_size_are_resharded_for_another() {
        let total = Layout::new(&specs(), [0, 1]).unsharded_length();
        let unsharded = [Span::all(total)];
        for (before, after) in [(1, 1), (2, 3), (3, 2), (4, 1), (1, 4)] {
            let shards = (0..before).map(|rank| Layout::new(&specs(), [rank, before]).spans());
            let shards: Vec<_> = shards.collect();
            for rank in 0..after {
                let layout = Layout::new(&specs(), [rank, after]);
                let mut expected = vec![usize::MAX; layout.shard_length()];
                let mut found = expected.clone();
                for CopyRange { from, to, length } in overlaps(&unsharded, &layout.spans()) {
                    (0..length).for_each(|index| expected[to + index] = from + index);
                }
                for shard in &shards {
                    // The value of each element is its index in the unsharded tensor.
                    for CopyRange { from, to, length } in overlaps(shard, &layout.spans()) {
                        let span = shard
                            .iter()
                            .find(|span| (span.local..span.local + span.length).contains(&from));
                        let span = span.unwrap();
                        (0..length).for_each(|index| {
                            found[to + index] = span.global + from - span.local + index;
                        });
                    }
                }
                assert_eq!(found, expected, "{before} to {after}, rank {rank}");
            }
        }
    }

    #[test]
    fn a_unit_is_a_block_or_the_root() {
        let layout = Layout::new(&specs(), [0, 2]);
        let units: Vec<usize> =
            layout.names().iter().map(|name| layout.slot(name).unwrap().unit).collect();
        assert_eq!(units, [0, 1, 1, 2, 0]);
        assert_eq!(layout.units(), 3);
    }
}
