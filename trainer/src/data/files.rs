//! Which files of a dataset hold its rows.

use finetune_contract::{FailureReason, Split};

use crate::{
    failure::Failure,
    store::{Entry, Store},
};

/// How a file is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// JSON: lines, an array, or objects.
    Json,
    /// Comma- or tab-separated values.
    Csv,
    /// Parquet.
    Parquet,
}

/// The endings of data files, for messages.
const ENDINGS: &str = ".jsonl, .json, .csv, .tsv (each also with .gz or .zst) or .parquet";

/// Tells by its name how a file is read; `None` if it is no data file.
pub fn kind(name: &str) -> Option<Kind> {
    let has = |name: &str, endings: &[&str]| endings.iter().any(|ending| name.ends_with(ending));
    if name.ends_with(".parquet") {
        return Some(Kind::Parquet);
    }
    let name = without_compression(name);
    if has(name, &[".jsonl", ".json", ".ndjson"]) {
        Some(Kind::Json)
    } else {
        has(name, &[".csv", ".tsv"]).then_some(Kind::Csv)
    }
}

/// Takes the ending of a compressed file off.
pub(super) fn without_compression(name: &str) -> &str {
    name.strip_suffix(".gz").or_else(|| name.strip_suffix(".zst")).unwrap_or(name)
}

/// The files of a split, and those beside them that were left out.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Files {
    /// Those that are read, sorted.
    pub taken: Vec<Entry>,
    /// Paths of data files that are not.
    pub left_out: Vec<String>,
}

/// Lists the data files at a URI; below a prefix those of the split.
///
/// # Errors
/// A [`Failure`] if the store fails or there is none.
pub fn list(store: &Store, split: Split) -> Result<Files, Failure> {
    let all = store.list()?;
    if all.is_empty() {
        // As when a store says so itself: the URI is wrong, not the data.
        let message = format!("nothing is at {}", store.uri());
        return Err(Failure::new(FailureReason::InvalidConfiguration, message));
    }
    let invalid = |message: String| Err(Failure::new(FailureReason::InvalidDataset, message));
    let uri = store.uri();
    if let [only] = all.as_slice()
        && only.path.is_empty()
    {
        if kind(uri.file_name()).is_none() {
            return invalid(format!("{uri} is no data file: its name must end in {ENDINGS}"));
        }
        return Ok(Files { taken: all, left_out: Vec::new() });
    }
    let files = choose(all, split);
    if !files.taken.is_empty() {
        return Ok(files);
    }
    if files.left_out.is_empty() {
        return invalid(format!(
            "{uri} has no data: it must name a file, or a prefix with files that end in {ENDINGS}"
        ));
    }
    invalid(format!(
        "{uri} has no file for {}: {} are named for another split; to use one of them all the same, name the file itself",
        match split {
            Split::Train => "training",
            Split::Validation => "validation",
        },
        files.left_out.join(", ")
    ))
}

/// Files that describe a dataset.
///
/// # Source
/// `datasets` writes `dataset_info.json`, `dataset_infos.json`, `dataset_dict.json` and `state.json`.
const DESCRIPTIONS: [&str; 8] = [
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "metadata.json",
    "manifest.json",
    "config.json",
    "package.json",
];

fn choose(all: Vec<Entry>, split: Split) -> Files {
    let mut files = Files::default();
    let data = all.into_iter().filter(|entry| {
        let name = entry.path.rsplit('/').next().unwrap_or(&entry.path);
        let is_hidden =
            entry.path.split('/').any(|part| part.starts_with('.') || part == "__MACOSX");
        let describes =
            DESCRIPTIONS.contains(&name) || name.ends_with(".index.json") || name == "index.json";
        !is_hidden && !describes && kind(name).is_some()
    });
    let (own, others): (Vec<_>, Vec<_>) =
        data.partition(|entry| named(&entry.path).is_none_or(|named| named == Named::of(split)));
    let is_named = |entry: &Entry| named(&entry.path).is_some();
    // Files of held-out rows beside others are all there is to hold out.
    let only_named = split == Split::Validation && own.iter().any(is_named);
    let (taken, rest): (Vec<_>, Vec<_>) =
        own.into_iter().partition(|entry| !only_named || is_named(entry));
    files.taken = taken;
    files.left_out = others.into_iter().chain(rest).map(|entry| entry.path).collect();
    files.left_out.sort();
    files
}

/// The split that a path is named for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Named {
    Train,
    Validation,
    Test,
}

impl Named {
    const fn of(split: Split) -> Self {
        match split {
            Split::Train => Self::Train,
            Split::Validation => Self::Validation,
        }
    }
}

/// Finds a split's name among the words of a path; the file's own name counts before its folders.
///
/// # Source
/// The words are those by which `datasets` finds splits (`datasets/data_files.py`).
fn named(path: &str) -> Option<Named> {
    path.rsplit('/').find_map(|part| {
        part.split(|character: char| !character.is_ascii_alphanumeric()).find_map(|word| match word
            .to_ascii_lowercase()
            .as_str()
        {
            "train" | "training" => Some(Named::Train),
            "validation" | "valid" | "val" | "dev" => Some(Named::Validation),
            "test" | "testing" | "eval" | "evaluation" => Some(Named::Test),
            _ => None,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(paths: &[&str], split: Split) -> String {
        let entry = |path: &&str| Entry { path: (*path).to_owned(), size: 1 };
        let Files { taken, left_out } = choose(paths.iter().map(entry).collect(), split);
        let taken: Vec<_> = taken.into_iter().map(|entry| entry.path).collect();
        format!("{} | {}", taken.join(" "), left_out.join(" "))
    }

    #[test]
    fn a_prefix_stands_for_the_rows_of_its_split() {
        let hub =
            ["README.md", "train.jsonl", "validation.jsonl", "test.jsonl", "dataset_infos.json"];
        assert_eq!(check(&hub, Split::Train), "train.jsonl | test.jsonl validation.jsonl");
        assert_eq!(check(&hub, Split::Validation), "validation.jsonl | test.jsonl train.jsonl");
        let shards = [
            "data/train-00000-of-00002.parquet",
            "data/train-00001-of-00002.parquet",
            "data/test_sft-00000-of-00001.parquet",
        ];
        assert_eq!(
            check(&shards, Split::Train),
            "data/train-00000-of-00002.parquet data/train-00001-of-00002.parquet | data/test_sft-00000-of-00001.parquet"
        );
        let folders = ["train/0.jsonl.gz", "dev/0.jsonl.gz", "eval/0.json", "latest.jsonl"];
        assert_eq!(
            check(&folders, Split::Train),
            "train/0.jsonl.gz latest.jsonl | dev/0.jsonl.gz eval/0.json"
        );
        assert_eq!(
            check(&folders, Split::Validation),
            "dev/0.jsonl.gz | eval/0.json latest.jsonl train/0.jsonl.gz"
        );
        assert_eq!(check(&["a.jsonl", "b.csv"], Split::Validation), "a.jsonl b.csv | ");
    }

    #[test]
    fn hidden_files_and_descriptions_are_no_rows() {
        assert_eq!(
            check(
                &["._train.jsonl", "train.jsonl", ".cache/train.jsonl", "__MACOSX/train.jsonl"],
                Split::Train
            ),
            "train.jsonl | "
        );
        assert_eq!(
            check(
                &[
                    "dataset_dict.json",
                    "train/dataset_info.json",
                    "train/state.json",
                    "x.index.json",
                    "notes.txt",
                    "a.json"
                ],
                Split::Train
            ),
            "a.json | "
        );
    }
}
