//! The sources of the rows of a split, and which of their rows belong to it.

use finetune_contract::{DatasetFormat, DatasetSource, ObjectUri, OnInvalidRow, Split};

use crate::{data::formats::ReadOptions, runtime::rng::RngKey, store::Store};

/// The sources of one split, opened.
#[derive(Debug)]
pub struct RowSources {
    /// The sources in the order of the manifest.
    pub sources: Vec<Source>,
    /// The split.
    pub split: Split,
    /// How invalid rows are handled.
    pub on_invalid_row: OnInvalidRow,
    /// The fraction of the training rows that is held out for validation.
    validation_fraction: Option<f64>,
    seed: u64,
}

/// One source of rows.
#[derive(Debug)]
pub struct Source {
    /// The field of the manifest, such as `spec.dataset.train`.
    pub location: String,
    /// The store of the files.
    pub store: Store,
    /// How the rows are parsed.
    pub options: ReadOptions,
    /// How often each row occurs in an epoch, on average.
    weight: f64,
}

impl RowSources {
    /// Opens the sources of a split by calling `open` with each URI and its manifest field; `None` if
    /// the dataset has no such split.
    ///
    /// # Errors
    /// An error of `open`.
    pub fn open<E>(
        dataset: &DatasetSource,
        split: Split,
        mut open: impl FnMut(&ObjectUri, &str) -> Result<Store, E>,
    ) -> Result<Option<Self>, E> {
        let rows = match split {
            Split::Train => dataset.train_sources(),
            Split::Validation => dataset.validation_sources(),
        };
        let mut sources = Vec::with_capacity(rows.len());
        for (index, row_source) in rows.into_iter().enumerate() {
            let location = location(dataset, split, index);
            sources.push(Source {
                store: open(&row_source.uri, &location)?,
                location,
                options: ReadOptions::of(dataset, row_source.format),
                weight: row_source.weight,
            });
        }
        let this = Self {
            sources,
            split,
            on_invalid_row: dataset.on_invalid_row,
            validation_fraction: dataset.validation_fraction,
            seed: dataset.seed.unwrap_or(0),
        };
        Ok(if this.sources.is_empty() { None } else { Some(this) })
    }

    /// Returns the manifest field of the split.
    pub fn location(&self) -> &'static str {
        match (self.split, self.validation_fraction, self.sources.len()) {
            (Split::Train, _, 1) => "spec.dataset.train",
            (Split::Train, _, _) => "spec.dataset.sources",
            (Split::Validation, None, _) => "spec.dataset.validation",
            (Split::Validation, Some(_), _) => "spec.dataset.validationFraction",
        }
    }

    /// Returns the URIs of all sources, for messages.
    pub fn uris(&self) -> String {
        let uris: Vec<_> =
            self.sources.iter().map(|source| source.store.uri().to_string()).collect();
        uris.join(", ")
    }

    /// Returns whether a row belongs to the split. That depends only on its digest, so equal rows are
    /// always in the same split.
    pub fn contains(&self, digest: u128) -> bool {
        let Some(fraction) = self.validation_fraction else { return true };
        let numbers = RngKey::from_seed(self.seed).fold_in_name("validation fraction");
        let is_held_out = numbers.fold_in((digest >> 64) as u64).uniform(digest as u64) < fraction;
        is_held_out == (self.split == Split::Validation)
    }

    /// Returns how often a row of a source occurs in an epoch; `number` is the index of the row.
    pub fn copies(&self, source: usize, number: u64) -> u64 {
        let weight = self.sources[source].weight;
        let numbers =
            RngKey::from_seed(self.seed).fold_in_name("source weight").fold_in(source as u64);
        weight.trunc() as u64 + u64::from(numbers.uniform(number) < weight.fract())
    }

    /// Returns the format of the first source according to the manifest.
    pub fn format(&self) -> DatasetFormat {
        self.sources.first().map_or(DatasetFormat::Auto, |source| source.options.format)
    }
}

fn location(dataset: &DatasetSource, split: Split, index: usize) -> String {
    match (split, &dataset.validation, &dataset.train) {
        (Split::Validation, Some(_), _) => "spec.dataset.validation".to_owned(),
        (_, _, Some(_)) => "spec.dataset.train".to_owned(),
        (_, _, None) => format!("spec.dataset.sources[{index}].uri"),
    }
}

#[cfg(test)]
mod tests {
    use finetune_contract::RowSource;

    use super::*;
    use crate::store::{Environment, Role};

    fn sources(change: impl FnOnce(&mut DatasetSource), split: Split) -> RowSources {
        let mut dataset = DatasetSource::of("file:///a.jsonl".parse().unwrap());
        change(&mut dataset);
        let open = |uri: &ObjectUri, _: &str| {
            Store::open(uri, None, Role::Dataset, &Environment::default())
        };
        RowSources::open(&dataset, split, open).unwrap().unwrap()
    }

    fn digest(row: u64) -> u128 {
        let numbers = RngKey::from_seed(row);
        u128::from(numbers.draw(0)) << 64 | u128::from(numbers.draw(1))
    }

    #[test]
    fn every_row_is_in_one_split_and_equal_rows_in_the_same() {
        let with_fraction = |split| {
            sources(
                |dataset| (dataset.validation_fraction, dataset.seed) = (Some(0.1), Some(7)),
                split,
            )
        };
        let (train, validation) = (with_fraction(Split::Train), with_fraction(Split::Validation));
        let held_out = (0..10_000).filter(|&row| validation.contains(digest(row))).count();
        assert!((900..1100).contains(&held_out), "{held_out}");
        assert!(
            (0..10_000).all(|row| train.contains(digest(row)) != validation.contains(digest(row)))
        );
    }

    #[test]
    fn a_weight_is_how_often_a_row_occurs() {
        let weighted = |weight| {
            let set = |dataset: &mut DatasetSource| {
                dataset.train = None;
                dataset.sources = vec![RowSource {
                    uri: "file:///b.jsonl".parse().unwrap(),
                    format: DatasetFormat::Auto,
                    weight,
                }];
            };
            let sources = sources(set, Split::Train);
            (0..1000).map(|number| sources.copies(0, number)).sum::<u64>()
        };
        assert_eq!([weighted(1.0), weighted(3.0)], [1000, 3000]);
        assert!((450..550).contains(&weighted(0.5)), "{}", weighted(0.5));
        assert!((2200..2300).contains(&weighted(2.25)), "{}", weighted(2.25));
    }
}
