//! The commit protocol of a result directory: files first, the manifest last and create-only.
//!
//! A result without a manifest is not published, and a reader that finds the manifest finds every file
//! that it lists. Files have their final names from the start (consumers load the directory as it is), so
//! two publishers must not upload at the same time: the operator runs one attempt at a time, and
//! [`fetch_verified`] downloads every byte again before a run succeeds.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use finetune_contract::{
    Comparison, InputDigests, Manifest, ManifestFile, artifact::MANIFEST_NAME, parse, render,
};

use crate::store::{
    Error, PutIfAbsent, Store,
    transfer::{hash_file, sha256_hex},
};

/// The number of files that are uploaded in parallel.
const PARALLEL_UPLOADS: usize = 4;

/// A published result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// The manifest.
    pub manifest: Manifest,
    /// The SHA-256 of the bytes of the manifest.
    pub manifest_sha256: String,
}

impl Published {
    fn of(manifest: Manifest, bytes: &[u8]) -> Self {
        Self { manifest, manifest_sha256: sha256_hex(bytes) }
    }
}

/// The contents of the output of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OutputContents {
    /// No published result: no manifest, or one of the same inputs with missing files.
    Vacant,
    /// A complete result of the same inputs.
    SameInputs(Box<Published>),
    /// A result of other or unknown inputs, described for people.
    OtherInputs(String),
}

/// Compares the output with the result that a run would publish.
///
/// A result counts as the same if it was made from the same inputs, by any run. The manifests of an earlier
/// release do not record all inputs; such a result counts as the same if an earlier attempt of this run
/// (`is_retry`) published it.
///
/// # Errors
/// [`Error`] if the store cannot be read.
pub fn inspect(store: &Store, planned: &Manifest, is_retry: bool) -> Result<OutputContents, Error> {
    inspect_with(store, |existing| match existing.compare(planned) {
        Comparison::Equal => None,
        Comparison::Unknown if is_retry && existing.run_id == planned.run_id => None,
        Comparison::Unknown => Some(inputs_not_recorded(existing)),
        Comparison::Different(differences) => Some(of_other_inputs(&differences)),
    })
}

/// Compares the output with the inputs of a run whose settings are not decided yet.
///
/// # Errors
/// [`Error`] if the store cannot be read.
pub fn inspect_by_inputs(store: &Store, planned: &InputDigests) -> Result<OutputContents, Error> {
    inspect_with(store, |existing| {
        let (Some(inputs), Some(_)) = (&existing.inputs, &existing.settings) else {
            let is_other = existing.train_sha256 != planned.train_sha256;
            let rows = ["the rows of dataset.train".to_owned()];
            return Some(if is_other {
                of_other_inputs(&rows)
            } else {
                inputs_not_recorded(existing)
            });
        };
        let differences = inputs.differences(planned);
        (!differences.is_empty()).then(|| of_other_inputs(&differences))
    })
}

/// Inspects an output; `other` returns why a manifest does not count as the same.
fn inspect_with(
    store: &Store,
    other: impl FnOnce(&Manifest) -> Option<String>,
) -> Result<OutputContents, Error> {
    let Some(bytes) = read_bytes(store)? else { return Ok(OutputContents::Vacant) };
    let Ok(manifest) = parse_manifest(store, &bytes) else {
        return Ok(OutputContents::OtherInputs(UNREADABLE_RESULT.to_owned()));
    };
    if let Some(why) = other(&manifest) {
        return Ok(OutputContents::OtherInputs(why));
    }
    if !sizes_match(store, &manifest)? {
        return Ok(OutputContents::Vacant);
    }
    Ok(OutputContents::SameInputs(Box::new(Published::of(manifest, &bytes))))
}

const UNREADABLE_RESULT: &str = "a result whose manifest cannot be read";

fn of_other_inputs(differences: &[String]) -> String {
    format!("a result of different inputs (differing: {})", differences.join(", "))
}

fn inputs_not_recorded(existing: &Manifest) -> String {
    format!(
        "the result of run {}, published by an earlier release that recorded only the training rows, which are the same; the validation rows, the model files and the settings cannot be compared",
        existing.run_id
    )
}

/// Returns whether there is a manifest.
///
/// # Errors
/// [`Error`] if the request fails.
pub fn has_manifest(store: &Store) -> Result<bool, Error> {
    Ok(store.size(MANIFEST_NAME)?.is_some())
}

/// Reads the manifest of a published result.
///
/// # Errors
/// [`Error`] if the store cannot be read or the manifest is damaged.
pub fn read_manifest(store: &Store) -> Result<Option<Manifest>, Error> {
    read_bytes(store)?.map(|bytes| parse_manifest(store, &bytes)).transpose()
}

/// Uploads every file of `directory` and publishes them with a manifest.
///
/// # Guarantees
/// The first published result of the same inputs wins: publishing again returns that result and changes
/// nothing, even if the new bytes differ, because the old ones may be in use. Only a result with a missing
/// or truncated file is replaced.
///
/// The manifest is written after all of its files, and a manifest that is replaced is deleted before any
/// of them is written. After a failure, publishing can be retried. Two cases remain: a concurrent publisher
/// may overwrite files of the first, which [`fetch_verified`] detects; and an interrupted replacement may
/// leave files of the replaced result, which no manifest lists.
///
/// # Errors
/// [`Error::OutputExists`] if there is a result of different inputs and `overwrite` is false, or if one appears
/// in the meantime; otherwise an error of the store.
pub fn publish(
    store: &Store,
    directory: &Path,
    manifest_without_files: Manifest,
    overwrite: bool,
) -> Result<Published, Error> {
    let manifest = Manifest { files: list_files(directory)?, ..manifest_without_files };

    let mut replaced_files = Vec::new();
    if let Some(found) = read_bytes(store)? {
        match parse_manifest(store, &found) {
            Ok(old) if counts_as_same(&old, &manifest, overwrite) => {
                if sizes_match(store, &old)? {
                    return Ok(Published::of(old, &found));
                }
                replaced_files = old.files;
            }
            Ok(old) if overwrite => replaced_files = old.files,
            Err(_) if overwrite => {}
            Ok(old) => return Err(output_exists(store, &old, &manifest)),
            Err(_) => {
                let uri = store.uri().to_string();
                return Err(Error::OutputExists { uri, contents: UNREADABLE_RESULT.to_owned() });
            }
        }
        // object_store has no conditional delete. Checking again keeps the race window small.
        if read_bytes(store)?.as_ref() == Some(&found) {
            store.delete(MANIFEST_NAME)?;
        }
    }

    upload(store, directory, &manifest.files)?;
    if !sizes_match(store, &manifest)? {
        return Err(Error::Damaged {
            uri: store.uri().to_string(),
            detail: "an uploaded file has another size than the local one".to_owned(),
        });
    }
    let bytes = Bytes::from(render(&manifest));
    if let PutIfAbsent::Exists(found) = store.put_if_absent(MANIFEST_NAME, bytes.clone())? {
        let winner = parse_manifest(store, &found)?;
        if !counts_as_same(&winner, &manifest, false) {
            return Err(output_exists(store, &winner, &manifest));
        }
        return Ok(Published::of(winner, &found));
    }

    let kept: BTreeSet<&str> = manifest.files.iter().map(|file| file.path.as_str()).collect();
    for file in replaced_files.iter().filter(|file| !kept.contains(file.path.as_str())) {
        store.delete(&file.path)?;
    }
    Ok(Published::of(manifest, &bytes))
}

/// Returns whether an existing result counts as the one to publish. The manifests of an earlier release do
/// not record all inputs; such a result counts if it is of the same run, unless it may be replaced.
fn counts_as_same(existing: &Manifest, planned: &Manifest, overwrite: bool) -> bool {
    match existing.compare(planned) {
        Comparison::Equal => true,
        Comparison::Unknown => existing.run_id == planned.run_id && !overwrite,
        Comparison::Different(_) => false,
    }
}

fn output_exists(store: &Store, existing: &Manifest, planned: &Manifest) -> Error {
    let contents = match existing.compare(planned) {
        Comparison::Different(differences) => of_other_inputs(&differences),
        Comparison::Equal | Comparison::Unknown => inputs_not_recorded(existing),
    };
    Error::OutputExists { uri: store.uri().to_string(), contents }
}

/// Fetches every file of a manifest, verifies its size and SHA-256, and returns the number of bytes.
///
/// # Errors
/// [`Error::Damaged`] with the file that differs, or an error of the store.
pub fn fetch_verified(store: &Store, manifest: &Manifest, to: &Path) -> Result<u64, Error> {
    let mut total = 0;
    for file in &manifest.files {
        check_path(store, &file.path)?;
        let target = to.join(&file.path);
        store.fetch(&file.path, &target)?;
        let (size, sha256) = hash_file(&target)?;
        if (size, &sha256) != (file.size, &file.sha256) {
            return Err(Error::Damaged {
                uri: store.name(&file.path),
                detail: format!(
                    "the manifest says {} bytes with SHA-256 {}, the store has {size} bytes with {sha256}",
                    file.size, file.sha256
                ),
            });
        }
        total += size;
    }
    Ok(total)
}

fn read_bytes(store: &Store) -> Result<Option<Bytes>, Error> {
    match store.size(MANIFEST_NAME)? {
        None => Ok(None),
        Some(_) => store.read(MANIFEST_NAME).map(Some),
    }
}

fn parse_manifest(store: &Store, bytes: &[u8]) -> Result<Manifest, Error> {
    parse(&String::from_utf8_lossy(bytes)).map_err(|error| Error::Damaged {
        uri: store.name(MANIFEST_NAME),
        detail: error.to_string(),
    })
}

/// Refuses a path outside the target directory. Manifests come from a bucket and are not trusted.
fn check_path(store: &Store, path: &str) -> Result<(), Error> {
    let is_plain = !path.is_empty()
        && path.split('/').all(|part| !matches!(part, "" | "." | "..") && !part.contains('\\'));
    if is_plain {
        return Ok(());
    }
    Err(Error::Damaged {
        uri: store.name(MANIFEST_NAME),
        detail: format!("it lists the path {path:?}, which is not inside the result"),
    })
}

/// Lists every file below a directory with size and digest, sorted by path.
fn list_files(directory: &Path) -> Result<Vec<ManifestFile>, Error> {
    let mut files = Vec::new();
    let mut pending: Vec<(PathBuf, String)> = vec![(directory.to_owned(), String::new())];
    while let Some((current, prefix)) = pending.pop() {
        let read = |error| Error::local("list", &current, error);
        for entry in fs::read_dir(&current).map_err(read)? {
            let entry = entry.map_err(read)?;
            let path = format!("{prefix}{}", entry.file_name().to_string_lossy());
            if entry.path().is_dir() {
                pending.push((entry.path(), format!("{path}/")));
            } else if path != MANIFEST_NAME {
                let (size, sha256) = hash_file(&entry.path())?;
                files.push(ManifestFile { path, size, sha256 });
            }
        }
    }
    files.sort();
    Ok(files)
}

/// Uploads files, a few in parallel; returns the first error.
fn upload(store: &Store, directory: &Path, files: &[ManifestFile]) -> Result<(), Error> {
    for group in files.chunks(PARALLEL_UPLOADS) {
        std::thread::scope(|scope| {
            let uploads: Vec<_> = group
                .iter()
                .map(|file| scope.spawn(|| store.put_file(&file.path, &directory.join(&file.path))))
                .collect();
            uploads.into_iter().try_for_each(|upload| {
                upload.join().expect("an upload returns its errors and does not panic")
            })
        })?;
    }
    Ok(())
}

fn sizes_match(store: &Store, manifest: &Manifest) -> Result<bool, Error> {
    for file in &manifest.files {
        if store.size(&file.path)? != Some(file.size) {
            return Ok(false);
        }
    }
    Ok(true)
}
