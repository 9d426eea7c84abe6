//! The commit protocol of a result directory: files first, the manifest last and create-only.
//!
//! A result without its manifest does not exist; whoever reads the manifest first finds every file
//! it names. Object names are final (consumers load the directory as it is), so two publishers must
//! not upload at the same time: the operator runs one attempt at a time, and [`fetch_verified`]
//! re-reads every byte before a run says it succeeded.

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

/// Files that go up at once.
const FILES_IN_FLIGHT: usize = 4;

/// A committed result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// What was committed.
    pub manifest: Manifest,
    /// SHA-256 of the manifest's bytes.
    pub manifest_sha256: String,
}

impl Published {
    fn of(manifest: Manifest, bytes: &[u8]) -> Self {
        Self { manifest, manifest_sha256: sha256_hex(bytes) }
    }
}

/// What a run finds at its output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// Nothing that counts: no manifest, or one of the same inputs whose files are not all there.
    Vacant,
    /// A complete result of the same inputs.
    Same(Box<Published>),
    /// A result of other inputs, or nobody can tell of which; in words for people.
    Other(String),
}

/// Tells what is at the output of a run that would publish `here`.
///
/// A result is the run's own if it was made from the same inputs, whoever made it. What an earlier
/// release published does not say enough to tell; it is the run's own if `is_retry`, an earlier
/// attempt of the very run, published it.
///
/// # Errors
/// [`Error`] if the store cannot be read.
pub fn find(store: &Store, here: &Manifest, is_retry: bool) -> Result<Found, Error> {
    find_by(store, |there| match there.compare(here) {
        Comparison::Equal => None,
        Comparison::Unknown if is_retry && there.run_id == here.run_id => None,
        Comparison::Unknown => Some(not_recorded(there)),
        Comparison::Different(differences) => Some(of_other_inputs(&differences)),
    })
}

/// Tells what is at the output of a run of which only the inputs are known yet, not the settings.
///
/// # Errors
/// [`Error`] if the store cannot be read.
pub fn find_of_inputs(store: &Store, here: &InputDigests) -> Result<Found, Error> {
    find_by(store, |there| {
        let (Some(inputs), Some(_)) = (&there.inputs, &there.settings) else {
            let is_other = there.train_sha256 != here.train_sha256;
            let rows = ["the rows of dataset.train".to_owned()];
            return Some(if is_other { of_other_inputs(&rows) } else { not_recorded(there) });
        };
        let differences = inputs.differences(here);
        (!differences.is_empty()).then(|| of_other_inputs(&differences))
    })
}

/// Reads what is at an output; `other` says why a manifest is of other inputs.
fn find_by(store: &Store, other: impl FnOnce(&Manifest) -> Option<String>) -> Result<Found, Error> {
    let Some(bytes) = read_bytes(store)? else { return Ok(Found::Vacant) };
    let Ok(manifest) = parse_manifest(store, &bytes) else {
        return Ok(Found::Other(UNREADABLE.to_owned()));
    };
    if let Some(why) = other(&manifest) {
        return Ok(Found::Other(why));
    }
    if !sizes_match(store, &manifest)? {
        return Ok(Found::Vacant);
    }
    Ok(Found::Same(Box::new(Published::of(manifest, &bytes))))
}

const UNREADABLE: &str = "a result whose manifest cannot be read";

fn of_other_inputs(differences: &[String]) -> String {
    format!("a result of other inputs (different are {})", differences.join(", "))
}

fn not_recorded(there: &Manifest) -> String {
    format!(
        "the result of run {}, of an earlier release that recorded only the training rows, which are the same: the validation rows, the model's files and the settings cannot be compared",
        there.run_id
    )
}

/// Tells whether a manifest is there.
///
/// # Errors
/// [`Error`] if the store cannot be asked.
pub fn is_there(store: &Store) -> Result<bool, Error> {
    Ok(store.size(MANIFEST_NAME)?.is_some())
}

/// Reads the manifest of a published result.
///
/// # Errors
/// [`Error`] if the store cannot be read or the manifest is damaged.
pub fn read_manifest(store: &Store) -> Result<Option<Manifest>, Error> {
    read_bytes(store)?.map(|bytes| parse_manifest(store, &bytes)).transpose()
}

/// Uploads every file of `directory` and commits them by a manifest.
///
/// # Guarantees
/// The first committed result of the same inputs wins: publishing them again returns that result and
/// changes nothing, even when the new bytes differ, because someone may be reading the old. Only a
/// committed result with a missing or cut file is replaced.
///
/// A manifest is written only behind all of its files, and one that is replaced is removed before
/// any of them. After any failure, doing it again converges. What is left to the caller: a second
/// publisher at the same time may still write over files of the first, which [`fetch_verified`]
/// finds; and a replacement that is cut short may leave files of the replaced result, which no
/// manifest names.
///
/// # Errors
/// [`Error::OutputExists`] if a result of other inputs is there and `overwrite` is false, or appears
/// meanwhile; else whatever the store reports.
pub fn publish(
    store: &Store,
    directory: &Path,
    manifest_without_files: Manifest,
    overwrite: bool,
) -> Result<Published, Error> {
    let manifest = Manifest { files: describe(directory)?, ..manifest_without_files };

    let mut superseded = Vec::new();
    if let Some(found) = read_bytes(store)? {
        match parse_manifest(store, &found) {
            Ok(old) if is_same(&old, &manifest, overwrite) => {
                if sizes_match(store, &old)? {
                    return Ok(Published::of(old, &found));
                }
                superseded = old.files;
            }
            Ok(old) if overwrite => superseded = old.files,
            Err(_) if overwrite => {}
            Ok(old) => return Err(output_exists(store, &old, &manifest)),
            Err(_) => {
                let uri = store.uri().to_string();
                return Err(Error::OutputExists { uri, holds: UNREADABLE.to_owned() });
            }
        }
        // object_store has no conditional delete; looking again leaves the smallest window.
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
        if !is_same(&winner, &manifest, false) {
            return Err(output_exists(store, &winner, &manifest));
        }
        return Ok(Published::of(winner, &found));
    }

    let kept: BTreeSet<&str> = manifest.files.iter().map(|file| file.path.as_str()).collect();
    for file in superseded.iter().filter(|file| !kept.contains(file.path.as_str())) {
        store.delete(&file.path)?;
    }
    Ok(Published::of(manifest, &bytes))
}

/// Tells whether a result counts as the one to be published. What an earlier release published says
/// too little; it counts by its run, unless it may be replaced.
fn is_same(there: &Manifest, here: &Manifest, overwrite: bool) -> bool {
    match there.compare(here) {
        Comparison::Equal => true,
        Comparison::Unknown => there.run_id == here.run_id && !overwrite,
        Comparison::Different(_) => false,
    }
}

fn output_exists(store: &Store, there: &Manifest, here: &Manifest) -> Error {
    let holds = match there.compare(here) {
        Comparison::Different(differences) => of_other_inputs(&differences),
        Comparison::Equal | Comparison::Unknown => not_recorded(there),
    };
    Error::OutputExists { uri: store.uri().to_string(), holds }
}

/// Fetches every file of a manifest and checks size and SHA-256; returns the bytes read.
///
/// # Errors
/// [`Error::Damaged`] naming the file that differs, or whatever the store reports.
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
                    "the manifest says {} bytes with SHA-256 {}, the store holds {size} with {sha256}",
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

/// Refuses a path that would leave the target directory: manifests come from a bucket.
fn check_path(store: &Store, path: &str) -> Result<(), Error> {
    let is_plain = !path.is_empty()
        && path.split('/').all(|part| !matches!(part, "" | "." | "..") && !part.contains('\\'));
    if is_plain {
        return Ok(());
    }
    Err(Error::Damaged {
        uri: store.name(MANIFEST_NAME),
        detail: format!("it names the path {path:?}, which is not inside the result"),
    })
}

/// Describes every file below a directory, sorted by path.
fn describe(directory: &Path) -> Result<Vec<ManifestFile>, Error> {
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

/// Uploads files, a few at once; the first error wins.
fn upload(store: &Store, directory: &Path, files: &[ManifestFile]) -> Result<(), Error> {
    for group in files.chunks(FILES_IN_FLIGHT) {
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
