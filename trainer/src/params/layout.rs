//! How tensors are divided over ranks: in units that are gathered whole, each cut into equal parts.
//!
//! Pure arithmetic. A unit is a block, or everything outside the blocks; its tensors stand one
//! after the other, and rank `r` keeps the `r`-th of equal parts of that line. A rank's parts of all
//! units are one flat tensor, so that one call updates, clips or stores everything it has.

use std::{collections::BTreeMap, ops::Range};

use crate::architecture::{modules::TensorSpec, names};

/// Elements every rank's part is a multiple of: 64 bytes in fp32.
const ALIGNMENT: usize = 16;

/// The unit of the embedding, the last norm and the head.
pub const OUTER: usize = 0;

/// Returns the unit of a block.
pub const fn unit_of_block(layer: usize) -> usize {
    layer + 1
}

/// Where the tensors of a model are, seen from one rank.
#[derive(Debug)]
pub struct Layout {
    rank: usize,
    units: Vec<Unit>,
    places: BTreeMap<String, Place>,
    /// Names in the order of an undivided flat tensor.
    names: Vec<String>,
    undivided: usize,
}

#[derive(Debug)]
struct Unit {
    /// Where this rank's part starts in its flat tensor.
    first: usize,
    /// Elements of the part.
    part: usize,
    /// Elements of the whole, filling included.
    whole: usize,
}

/// Neighbours in an undivided flat tensor that are neighbours in another one too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Their first element's index in the undivided one.
    pub undivided: usize,
    /// Its index in the other one.
    pub own: usize,
    /// How many they are.
    pub length: usize,
}

impl Span {
    /// All of a flat tensor that is not divided.
    pub const fn all(length: usize) -> Self {
        Self { undivided: 0, own: 0, length }
    }
}

/// Elements to be copied from one flat tensor to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Move {
    /// The first element's index where they come from.
    pub from: usize,
    /// Its index where they go.
    pub to: usize,
    /// How many they are.
    pub length: usize,
}

/// Lists the elements of one flat tensor that another one has too.
pub fn moves(from: &[Span], to: &[Span]) -> Vec<Move> {
    let both = |from: &Span, to: &Span| {
        let first = from.undivided.max(to.undivided);
        let end = (from.undivided + from.length).min(to.undivided + to.length);
        (first < end).then(|| Move {
            from: from.own + first - from.undivided,
            to: to.own + first - to.undivided,
            length: end - first,
        })
    };
    from.iter().flat_map(|from| to.iter().filter_map(move |to| both(from, to))).collect()
}

/// Where one tensor is.
#[derive(Debug)]
pub struct Place {
    /// Its unit.
    pub unit: usize,
    /// Its first element in the whole unit.
    pub offset: usize,
    /// Its shape.
    pub shape: Vec<i64>,
    /// Its first element in an undivided flat tensor.
    pub undivided: usize,
}

impl Place {
    /// Returns the elements of the tensor.
    pub fn length(&self) -> usize {
        self.shape.iter().product::<i64>() as usize
    }
}

impl Layout {
    /// Divides `specs` over `world_size` ranks.
    pub fn new(specs: &[TensorSpec], [rank, world_size]: [u32; 2]) -> Self {
        let (rank, world_size) = (rank as usize, world_size as usize);
        let mut wholes: Vec<usize> = Vec::new();
        let mut places = BTreeMap::new();
        let mut undivided = 0;
        for spec in specs {
            let unit = unit_of(&spec.name);
            if wholes.len() <= unit {
                wholes.resize(unit + 1, 0);
            }
            let shape = spec.shape.iter().map(|&size| size as i64).collect();
            let place = Place { unit, offset: wholes[unit], shape, undivided };
            wholes[unit] += place.length();
            undivided += place.length();
            places.insert(spec.name.clone(), place);
        }
        let mut first = 0;
        let units = wholes.into_iter().map(|length| {
            let whole = length.next_multiple_of(ALIGNMENT * world_size);
            let unit = Unit { first, part: whole / world_size, whole };
            first += unit.part;
            unit
        });
        let units = units.collect();
        let names = specs.iter().map(|spec| spec.name.clone()).collect();
        Self { rank, units, places, names, undivided }
    }

    /// Returns how many units there are.
    pub fn units(&self) -> usize {
        self.units.len()
    }

    /// Returns the elements this rank keeps.
    pub fn part_length(&self) -> usize {
        self.units.iter().map(|unit| unit.part).sum()
    }

    /// Returns the elements of an undivided flat tensor.
    pub fn undivided_length(&self) -> usize {
        self.undivided
    }

    /// Returns the elements of a whole unit, filling included.
    pub fn whole_length(&self, unit: usize) -> usize {
        self.units[unit].whole
    }

    /// Returns where this rank's part of a unit is in its flat tensor.
    pub fn part(&self, unit: usize) -> Range<usize> {
        let Unit { first, part, .. } = self.units[unit];
        first..first + part
    }

    /// Returns where a tensor is; `None` if it is not divided.
    pub fn place(&self, name: &str) -> Option<&Place> {
        self.places.get(name)
    }

    /// Lists the names in the order of an undivided flat tensor.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Lists which elements of an undivided flat tensor this rank keeps, and where.
    pub fn spans(&self) -> Vec<Span> {
        let span = |name: &String| {
            let place = self.place(name)?;
            let (range, own) = self.kept(place)?;
            Some(Span { undivided: place.undivided + range.start, own, length: range.len() })
        };
        self.names.iter().filter_map(span).collect()
    }

    /// Returns which elements of a tensor this rank keeps, and where they start in its flat tensor.
    pub fn kept(&self, place: &Place) -> Option<(Range<usize>, usize)> {
        let Unit { first, part, .. } = self.units[place.unit];
        let (start, end) = (self.rank * part, (self.rank + 1) * part);
        let from = start.max(place.offset);
        let to = end.min(place.offset + place.length());
        (from < to).then(|| (from - place.offset..to - place.offset, first + from - start))
    }
}

/// Returns the unit a tensor belongs to, by its checkpoint name.
pub(crate) fn unit_of(name: &str) -> usize {
    names::layer(name).map_or(OUTER, unit_of_block)
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
    fn every_element_is_kept_once_whatever_the_number_of_ranks() {
        for world_size in [1, 2, 3, 4, 7] {
            let layouts: Vec<_> =
                (0..world_size).map(|rank| Layout::new(&specs(), [rank, world_size])).collect();
            for spec in specs() {
                let mut kept: Vec<Range<usize>> = layouts
                    .iter()
                    .filter_map(|layout| Some(layout.kept(layout.place(&spec.name)?)?.0))
                    .collect();
                kept.sort_by_key(|range| range.start);
                let ends = kept.iter().scan(0, |end, range| {
                    let meets = range.start == *end;
                    *end = range.end;
                    Some(meets)
                });
                assert!(ends.into_iter().all(|meets| meets), "{kept:?}");
                assert_eq!(kept.last().unwrap().end, spec.shape.iter().product::<usize>());
            }
            let part = layouts[0].part_length();
            assert!(layouts.iter().all(|layout| layout.part_length() == part));
            assert!(part * world_size as usize >= layouts[0].undivided_length());
        }
    }

    #[test]
    fn what_is_divided_in_one_way_is_put_together_in_another() {
        let total = Layout::new(&specs(), [0, 1]).undivided_length();
        let whole = [Span::all(total)];
        for (before, after) in [(1, 1), (2, 3), (3, 2), (4, 1), (1, 4)] {
            let parts = (0..before).map(|rank| Layout::new(&specs(), [rank, before]).spans());
            let parts: Vec<_> = parts.collect();
            for rank in 0..after {
                let layout = Layout::new(&specs(), [rank, after]);
                let mut expected = vec![usize::MAX; layout.part_length()];
                let mut found = expected.clone();
                for Move { from, to, length } in moves(&whole, &layout.spans()) {
                    (0..length).for_each(|index| expected[to + index] = from + index);
                }
                for part in &parts {
                    // What stands at an index of the part, as an index of the undivided tensor.
                    for Move { from, to, length } in moves(part, &layout.spans()) {
                        let span = part
                            .iter()
                            .find(|span| (span.own..span.own + span.length).contains(&from));
                        let span = span.unwrap();
                        (0..length).for_each(|index| {
                            found[to + index] = span.undivided + from - span.own + index;
                        });
                    }
                }
                assert_eq!(found, expected, "{before} to {after}, rank {rank}");
            }
        }
    }

    #[test]
    fn a_unit_is_a_block_or_all_outside() {
        let layout = Layout::new(&specs(), [0, 2]);
        let units: Vec<usize> =
            layout.names().iter().map(|name| layout.place(name).unwrap().unit).collect();
        assert_eq!(units, [0, 1, 1, 2, 0]);
        assert_eq!(layout.units(), 3);
    }
}
