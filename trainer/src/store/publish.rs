//! Publishing a directory: complete or absent.
//!
//! Files first, the manifest last and create-only. A reader who trusts manifests, and the digests
//! in them, never takes a half-written result or a mix of two for one.

use std::{
    fs::File,
    io::Read,
    path::{Component, Path, PathBuf},
};

use bytes::Bytes;
use finetune_contract::{
    Manifest, ManifestFile, OutputState, RunId, artifact::MANIFEST_NAME, parse, render,
};
use futures::{StreamExt, TryStreamExt};
use sha2::{Digest, Sha256};

use super::{CONCURRENCY, Error, PutIfAbsent, Store, block_on};
use crate::hex;

/// A result that is complete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// Its manifest as it lies there.
    pub manifest: Manifest,
    /// The digest of the manifest's bytes.
    pub manifest_sha256: String,
}

/// Tells what lies at an output.
///
/// # Errors
/// [`Error`] of the store.
pub fn output_state(store: &Store, run_id: &RunId) -> Result<OutputState, Error> {
    Ok(match found(store)? {
        Found::Nothing => OutputState::Vacant,
        Found::Result(published) if published.manifest.run_id == *run_id => {
            OutputState::PublishedByThisRun
        }
        Found::Result(_) | Found::Foreign => OutputState::PublishedByAnotherRun,
    })
}

/// Reads the manifest at an output; `None` if nothing complete is there.
///
/// # Errors
/// [`Error`] of the store, or `Damaged` if the manifest cannot be read by this version.
pub fn read_manifest(store: &Store) -> Result<Option<Published>, Error> {
    match found(store)? {
        Found::Nothing => Ok(None),
        Found::Result(published) => Ok(Some(published)),
        Found::Foreign => Err(Error::Damaged {
            uri: store.uri().join(MANIFEST_NAME).to_string(),
            detail: "it is no manifest this version can read".to_owned(),
        }),
    }
}

/// Publishes every file of a directory under a manifest.
///
/// A complete result of the same run is left as it is and returned: it won. One of another run is
/// refused, or with `overwrite` replaced: its manifest is removed first, its surplus files last.
///
/// # Errors
/// [`Error`]; unless it says otherwise, nothing complete is at the output then.
pub fn publish(
    store: &Store,
    directory: &Path,
    mut manifest: Manifest,
    overwrite: bool,
) -> Result<Published, Error> {
    manifest.files = files_of(directory)?;
    let mut replaced = Vec::new();
    match found(store)? {
        Found::Nothing => {}
        Found::Result(published) if published.manifest.run_id == manifest.run_id => {
            return Ok(published);
        }
        Found::Result(published) if overwrite => replaced = published.manifest.files,
        Found::Foreign if overwrite => {}
        Found::Result(published) => return Err(exists(store, &published.manifest.run_id.0)),
        Found::Foreign => return Err(exists(store, "unknown")),
    }
    if overwrite {
        store.delete(MANIFEST_NAME)?;
    }
    upload(store, directory, &manifest.files)?;
    for file in &manifest.files {
        let size = store.size(&file.path)?;
        if size != Some(file.size) {
            let detail = format!("it has {size:?} bytes after {} were uploaded", file.size);
            return Err(Error::Damaged { uri: store.uri().join(&file.path).to_string(), detail });
        }
    }
    let bytes = Bytes::from(render(&manifest));
    match store.put_if_absent(MANIFEST_NAME, bytes.clone())? {
        PutIfAbsent::Created => {}
        PutIfAbsent::Exists(other) => {
            return match sort(&other) {
                Found::Result(published) if published.manifest.run_id == manifest.run_id => {
                    Ok(published)
                }
                Found::Result(published) => Err(exists(store, &published.manifest.run_id.0)),
                Found::Foreign | Found::Nothing => Err(exists(store, "unknown")),
            };
        }
    }
    for file in replaced.iter().filter(|old| manifest.files.iter().all(|new| new.path != old.path))
    {
        store.delete(&file.path)?;
    }
    Ok(Published { manifest, manifest_sha256: hex(&Sha256::digest(&bytes)) })
}

/// Fetches every file of a manifest and checks sizes and digests; returns the bytes read.
///
/// # Errors
/// [`Error::Damaged`] for a file that is not what the manifest says, or another [`Error`].
pub fn fetch_verified(store: &Store, manifest: &Manifest, to: &Path) -> Result<u64, Error> {
    let mut bytes = 0;
    for file in &manifest.files {
        let uri = store.uri().join(&file.path).to_string();
        let is_plain =
            Path::new(&file.path).components().all(|part| matches!(part, Component::Normal(_)));
        if !is_plain {
            return Err(Error::Damaged {
                uri,
                detail: "the manifest names a path outside the output".to_owned(),
            });
        }
        let path = to.join(&file.path);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(|error| Error::local(parent, &error))?;
        }
        match store.fetch(&file.path, &path) {
            Err(Error::NotFound { .. }) => {
                return Err(Error::Damaged {
                    uri,
                    detail: "the manifest names it, but it does not exist".to_owned(),
                });
            }
            fetched => fetched?,
        }
        let (size, sha256) = sha256_of_file(&path)?;
        if (size, &sha256) != (file.size, &file.sha256) {
            let detail = format!(
                "it has {size} bytes and SHA-256 {sha256}, the manifest says {} and {}",
                file.size, file.sha256
            );
            return Err(Error::Damaged { uri, detail });
        }
        bytes += size;
    }
    Ok(bytes)
}

/// Returns the size and the SHA-256 of a local file.
///
/// # Errors
/// [`Error::Local`].
pub fn sha256_of_file(path: &Path) -> Result<(u64, String), Error> {
    let local = |error: std::io::Error| Error::local(path, &error);
    let mut file = File::open(path).map_err(local)?;
    let (mut hash, mut size) = (Sha256::new(), 0);
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(local)? {
            0 => return Ok((size, hex(&hash.finalize()))),
            read => {
                hash.update(&buffer[..read]);
                size += read as u64;
            }
        }
    }
}

/// What lies where a manifest belongs.
enum Found {
    Nothing,
    Result(Published),
    /// Something this version cannot read; not ours to replace unasked.
    Foreign,
}

fn found(store: &Store) -> Result<Found, Error> {
    match store.read(MANIFEST_NAME) {
        Ok(bytes) => Ok(sort(&bytes)),
        Err(Error::NotFound { .. }) => Ok(Found::Nothing),
        Err(error) => Err(error),
    }
}

fn sort(bytes: &Bytes) -> Found {
    match parse::<Manifest>(&String::from_utf8_lossy(bytes)) {
        Ok(manifest) => {
            Found::Result(Published { manifest, manifest_sha256: hex(&Sha256::digest(bytes)) })
        }
        Err(_) => Found::Foreign,
    }
}

fn exists(store: &Store, other: &str) -> Error {
    Error::OutputExists { uri: store.uri().to_string(), other: other.to_owned() }
}

fn upload(store: &Store, directory: &Path, files: &[ManifestFile]) -> Result<(), Error> {
    let uploads = files.iter().map(|file| async {
        let from = directory.join(&file.path);
        store.upload(&file.path, &from).await
    });
    block_on(futures::stream::iter(uploads).buffer_unordered(CONCURRENCY).try_collect())
}

/// Lists the files of a directory, sorted by path, with their digests.
fn files_of(directory: &Path) -> Result<Vec<ManifestFile>, Error> {
    let mut files = Vec::new();
    let mut pending = vec![PathBuf::new()];
    while let Some(below) = pending.pop() {
        let path = directory.join(&below);
        let local = |error: std::io::Error| Error::local(&path, &error);
        for entry in std::fs::read_dir(&path).map_err(local)? {
            let entry = entry.map_err(local)?;
            let below = below.join(entry.file_name());
            if entry.file_type().map_err(local)?.is_dir() {
                pending.push(below);
            } else {
                let (size, sha256) = sha256_of_file(&entry.path())?;
                files.push(ManifestFile {
                    path: below.to_string_lossy().into_owned(),
                    size,
                    sha256,
                });
            }
        }
    }
    files.sort();
    Ok(files)
}
