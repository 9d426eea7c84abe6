//! Selects the files of a split among the files of a dataset.

use finetune_contract::{FailureReason, Split};

use crate::{
    failure::Failure,
    store::{Entry, Store},
};

/// The format of a data file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileFormat {
    /// JSON lines, one JSON array, or consecutive JSON objects.
    Json,
    /// Comma- or tab-separated values.
    Csv,
    /// Parquet.
    Parquet,
}

/// The file extensions of data files, for messages.
const EXTENSIONS: &str = ".jsonl, .json, .csv, .tsv (each also with .gz or .zst) or .parquet";

/// Returns the format of a file by its name; `None` if it is not a data file.
pub fn file_format(name: &str) -> Option<FileFormat> {
    let has = |name: &str, endings: &[&str]| endings.iter().any(|ending| name.ends_with(ending));
    if name.ends_with(".parquet") {
        return Some(FileFormat::Parquet);
    }
    let name = strip_compression(name);
    if has(name, &[".jsonl", ".json", ".ndjson"]) {
        Some(FileFormat::Json)
    } else {
        has(name, &[".csv", ".tsv"]).then_some(FileFormat::Csv)
    }
}

/// Removes the extension of a compressed file.
pub(super) fn strip_compression(name: &str) -> &str {
    name.strip_suffix(".gz").or_else(|| name.strip_suffix(".zst")).unwrap_or(name)
}

/// The files of a split, and the data files that do not belong to it.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct SplitFiles {
    /// The files of the split, sorted.
    pub selected: Vec<Entry>,
    /// The paths of other data files.
    pub skipped: Vec<String>,
}

/// Lists the data files of a split at a URI, which names one file or a prefix.
///
/// # Errors
/// A [`Failure`] if the store fails or there are no such files.
pub fn list(store: &Store, split: Split) -> Result<SplitFiles, Failure> {
    let all = store.list()?;
    if all.is_empty() {
        // The same reason as for a missing object: the URI is wrong, not the data.
        let message = format!("nothing is at {}", store.uri());
        return Err(Failure::new(FailureReason::InvalidConfiguration, message));
    }
    let invalid = |message: String| Err(Failure::new(FailureReason::InvalidDataset, message));
    let uri = store.uri();
    if let [only] = all.as_slice()
        && only.path.is_empty()
    {
        if file_format(uri.file_name()).is_none() {
            return invalid(format!("{uri} is not a data file: its name must end in {EXTENSIONS}"));
        }
        return Ok(SplitFiles { selected: all, skipped: Vec::new() });
    }
    let files = select(all, split);
    if !files.selected.is_empty() {
        return Ok(files);
    }
    if files.skipped.is_empty() {
        return invalid(format!(
            "{uri} has no data files: it must name a file, or a prefix with files that end in {EXTENSIONS}"
        ));
    }
    invalid(format!(
        "{uri} has no file for {}: {} are named after another split; to use one of them anyway, give its own URI",
        match split {
            Split::Train => "training",
            Split::Validation => "validation",
        },
        files.skipped.join(", ")
    ))
}

/// JSON files that describe a dataset and contain no rows.
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

fn select(all: Vec<Entry>, split: Split) -> SplitFiles {
    let mut files = SplitFiles::default();
    let data = all.into_iter().filter(|entry| {
        let name = entry.path.rsplit('/').next().unwrap_or(&entry.path);
        let is_hidden =
            entry.path.split('/').any(|part| part.starts_with('.') || part == "__MACOSX");
        let describes =
            DESCRIPTIONS.contains(&name) || name.ends_with(".index.json") || name == "index.json";
        !is_hidden && !describes && file_format(name).is_some()
    });
    let (own, others): (Vec<_>, Vec<_>) = data.partition(|entry| {
        split_name(&entry.path).is_none_or(|split_name| split_name == SplitName::of(split))
    });
    let is_named = |entry: &Entry| split_name(&entry.path).is_some();
    // If any file is named after validation, unnamed files belong to training.
    let only_named = split == Split::Validation && own.iter().any(is_named);
    let (selected, rest): (Vec<_>, Vec<_>) =
        own.into_iter().partition(|entry| !only_named || is_named(entry));
    files.selected = selected;
    files.skipped = others.into_iter().chain(rest).map(|entry| entry.path).collect();
    files.skipped.sort();
    files
}

/// The split that a path is named after.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SplitName {
    Train,
    Validation,
    Test,
}

impl SplitName {
    const fn of(split: Split) -> Self {
        match split {
            Split::Train => Self::Train,
            Split::Validation => Self::Validation,
        }
    }
}

/// Finds the name of a split among the words of a path. The file name takes precedence over folders.
///
/// # Source
/// The words are those by which `datasets` finds splits (`datasets/data_files.py`).
fn split_name(path: &str) -> Option<SplitName> {
    path.rsplit('/').find_map(|part| {
        part.split(|character: char| !character.is_ascii_alphanumeric()).find_map(|word| match word
            .to_ascii_lowercase()
            .as_str()
        {
            "train" | "training" => Some(SplitName::Train),
            "validation" | "valid" | "val" | "dev" => Some(SplitName::Validation),
            "test" | "testing" | "eval" | "evaluation" => Some(SplitName::Test),
            _ => None,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(paths: &[&str], split: Split) -> String {
        let entry = |path: &&str| Entry { path: (*path).to_owned(), size: 1 };
        let SplitFiles { selected, skipped } = select(paths.iter().map(entry).collect(), split);
        let selected: Vec<_> = selected.into_iter().map(|entry| entry.path).collect();
        format!("{} | {}", selected.join(" "), skipped.join(" "))
    }

    #[test]
    fn a_prefix_selects_the_files_of_the_split() {
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
    fn hidden_files_and_descriptions_are_not_data_files() {
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
