//! Reads and writes files: one blocking [`Store`] over S3, Google Cloud Storage, Azure, the local disk,
//! volumes and a Hugging Face hub.
//!
//! In reading order: `environment` selects the credentials, `objects` opens object stores, [`hub`] is the
//! client of a hub, `transfer` moves whole files, [`publish`] is the commit protocol of a result,
//! [`fetch_model`] caches base models.
//!
//! This module must not know what the files mean, and no other module may read the environment.

pub mod directory;
mod environment;
mod error;
pub mod hub;
mod identity;
mod model_cache;
mod objects;
pub mod publish;
mod runtime;
mod transfer;

use std::{
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use finetune_contract::{ObjectUri, Scheme, process::PVC_ROOT};
use futures::TryStreamExt as _;
use object_store::{
    GetOptions, ObjectStore, ObjectStoreExt as _, PutMode, PutOptions, path::Path as Key,
};

pub use environment::{Environment, Role};
pub use error::Error;
pub use identity::identity;
pub use model_cache::{TEMPLATE_FOLDER, fetch_model, is_model_file};
pub use transfer::{PART_BYTES, file_parts, hash_file, sha256_hex};

use crate::store::runtime::block_on;

/// The number of attempts of a create-only put whose response is lost or a conflict.
const CREATE_ATTEMPTS: u32 = 5;

/// An opened URI; cheap to clone.
#[derive(Debug, Clone)]
pub struct Store {
    uri: ObjectUri,
    backend: Backend,
}

/// The implementation of a [`Store`].
#[derive(Debug, Clone)]
enum Backend {
    Objects { store: Arc<dyn ObjectStore>, root: String },
    Hub(Arc<hub::Repository>),
}

/// One file below the URI of a store.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    /// The path relative to the URI, with `/`; empty if the URI is that of the file.
    pub path: String,
    /// The size in bytes.
    pub size: u64,
}

/// The result of a create-only put.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PutIfAbsent {
    /// The object now has the given bytes, or already had them.
    Created,
    /// The object has other bytes and was not changed.
    Exists(Bytes),
}

/// The size of an object, and what the store reports to identify its bytes.
#[derive(Debug, Clone)]
struct Stat {
    size: u64,
    /// A tag that changes with the bytes.
    tag: Option<String>,
    sha256: Option<String>,
}

impl Store {
    /// Opens a URI; for a hub, this resolves `revision` to a commit.
    ///
    /// # Errors
    /// [`Error`] if the options are invalid or, for a hub, the revision cannot be resolved.
    pub fn open(
        uri: &ObjectUri,
        revision: Option<&str>,
        role: Role,
        environment: &Environment,
    ) -> Result<Self, Error> {
        if let Some((variable, server, allowed)) = environment.forbidden_server() {
            return Err(Error::Misconfigured {
                action: "open",
                uri: uri.to_string(),
                detail: format!(
                    "{variable} is set to the server {server}, which the administrator does not allow; allowed are {allowed}"
                ),
            });
        }
        use_ring();
        let backend = match uri.scheme {
            Scheme::Hf => {
                let repository = hub::Repository::open(uri, revision, role, environment)?;
                Backend::Hub(Arc::new(repository))
            }
            _ if revision.is_some() => {
                return Err(Error::Misconfigured {
                    action: "open",
                    uri: uri.to_string(),
                    detail: "only hf:// has revisions; remove `revision`".to_owned(),
                });
            }
            Scheme::Pvc => {
                let root = format!("{PVC_ROOT}/{}/{}", uri.authority, uri.path);
                let root = root.trim_matches('/').to_owned();
                Backend::Objects { store: objects::open(uri, role, environment)?, root }
            }
            _ => Backend::Objects {
                store: objects::open(uri, role, environment)?,
                root: uri.path.clone(),
            },
        };
        Ok(Self { uri: uri.clone(), backend })
    }

    /// Creates a store from an object store, such as one in memory or one that injects faults.
    pub fn from_object_store(uri: &ObjectUri, store: Arc<dyn ObjectStore>) -> Self {
        Self { uri: uri.clone(), backend: Backend::Objects { store, root: uri.path.clone() } }
    }

    /// Returns the URI.
    pub fn uri(&self) -> &ObjectUri {
        &self.uri
    }

    /// Returns the commit that the revision of a hub resolved to.
    pub fn resolved_revision(&self) -> Option<&str> {
        match &self.backend {
            Backend::Objects { .. } => None,
            Backend::Hub(repository) => Some(repository.commit()),
        }
    }

    /// Lists every file below the URI, sorted by path, without directory markers. Without files the
    /// list is empty.
    ///
    /// # Errors
    /// [`Error`] if the store cannot be read.
    pub fn list(&self) -> Result<Vec<Entry>, Error> {
        Ok(self.list_tagged()?.into_iter().map(|(entry, _)| entry).collect())
    }

    /// Lists the files with the tags of their bytes.
    pub(crate) fn list_tagged(&self) -> Result<Vec<(Entry, Option<String>)>, Error> {
        let (store, root) = match &self.backend {
            Backend::Hub(repository) => return block_on(repository.list()),
            Backend::Objects { store, root } => (store, root),
        };
        if !self.uri.is_prefix
            && !root.is_empty()
            && let Some(stat) = self.stat("")?
        {
            return Ok(vec![(Entry { path: String::new(), size: stat.size }, stat.tag)]);
        }
        let prefix = if root.is_empty() { None } else { Some(self.key("")?) };
        let found: Vec<_> = block_on(store.list(prefix.as_ref()).try_collect())
            .map_err(|error| self.failed("list", "", error))?;
        let mut entries: Vec<(Entry, Option<String>)> = Vec::new();
        for meta in found {
            let Some(path) = meta.location.as_ref().strip_prefix(root.as_str()) else { continue };
            let path = path.trim_start_matches('/').to_owned();
            // An empty path is the directory marker of a web console, without its final slash.
            if !path.is_empty() {
                entries.push((Entry { path, size: meta.size }, meta.e_tag));
            }
        }
        entries.sort();
        let mut kept: Vec<(Entry, Option<String>)> = Vec::with_capacity(entries.len());
        for index in 0..entries.len() {
            let (entry, _) = &entries[index];
            let inside = format!("{}/", entry.path);
            // Names such as `a.b` sort between `a` and `a/b`, so check all names with this prefix.
            let is_marker = entry.size == 0
                && entries[index + 1..]
                    .iter()
                    .take_while(|(other, _)| other.path.starts_with(&entry.path))
                    .any(|(other, _)| other.path.starts_with(&inside));
            if !is_marker {
                kept.push(entries[index].clone());
            }
        }
        Ok(kept)
    }

    /// Returns the size of a file; `None` if it does not exist.
    ///
    /// # Errors
    /// [`Error`] if the request fails.
    pub fn size(&self, path: &str) -> Result<Option<u64>, Error> {
        Ok(self.stat(path)?.map(|stat| stat.size))
    }

    fn stat(&self, path: &str) -> Result<Option<Stat>, Error> {
        match &self.backend {
            Backend::Hub(repository) => block_on(repository.stat(path)),
            Backend::Objects { store, .. } => match block_on(store.head(&self.key(path)?)) {
                Ok(meta) => Ok(Some(Stat { size: meta.size, tag: meta.e_tag, sha256: None })),
                Err(object_store::Error::NotFound { .. }) => Ok(None),
                Err(error) => Err(self.failed("look up", path, error)),
            },
        }
    }

    /// As [`Self::stat`], but a missing file is an error.
    fn stat_existing(&self, action: &'static str, path: &str) -> Result<Stat, Error> {
        if let Some(stat) = self.stat(path)? {
            return Ok(stat);
        }
        // The error response to a HEAD has no body; that to a GET says whether the bucket is missing.
        if let Backend::Objects { store, .. } = &self.backend {
            block_on(store.get_range(&self.key(path)?, 0..1))
                .map_err(|error| self.failed(action, path, error))?;
        }
        Err(Error::NotFound {
            action,
            uri: self.name(path),
            detail: "nothing is there; check the URI".to_owned(),
        })
    }

    /// Reads a whole file into memory.
    ///
    /// # Errors
    /// [`Error`] if it is missing or cannot be read.
    pub fn read(&self, path: &str) -> Result<Bytes, Error> {
        match &self.backend {
            Backend::Hub(repository) => {
                let stat = self.stat_existing("read", path)?;
                block_on(repository.read_range(path, 0..stat.size))
            }
            Backend::Objects { store, .. } => {
                let key = self.key(path)?;
                block_on(async { store.get(&key).await?.bytes().await })
                    .map_err(|error| self.failed("read", path, error))
            }
        }
    }

    /// Reads a range of a file; a range beyond the end of the file is truncated.
    ///
    /// # Errors
    /// [`Error`] if the file is missing or cannot be read.
    pub fn read_range(&self, path: &str, range: Range<u64>) -> Result<Bytes, Error> {
        self.read_range_of(path, range, None)
    }

    /// Reads a range of the version `tag` of a file.
    fn read_range_of(
        &self,
        path: &str,
        range: Range<u64>,
        tag: Option<&str>,
    ) -> Result<Bytes, Error> {
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        match &self.backend {
            Backend::Hub(repository) => block_on(repository.read_range(path, range)),
            Backend::Objects { store, .. } => {
                let options = GetOptions::new().with_range(Some(range)).with_if_match(tag);
                let key = self.key(path)?;
                block_on(async { store.get_opts(&key, options).await?.bytes().await }).map_err(
                    |error| match error {
                        object_store::Error::Precondition { .. } => Error::Damaged {
                            uri: self.name(path),
                            detail: "it was replaced while it was being read; retry".to_owned(),
                        },
                        error => self.failed("read", path, error),
                    },
                )
            }
        }
    }

    /// Returns the local path of a file; only `file://` and `pvc://` have one.
    pub fn local_path(&self, path: &str) -> Option<PathBuf> {
        match (self.uri.scheme, &self.backend) {
            (Scheme::File | Scheme::Pvc, Backend::Objects { root, .. }) => {
                let base = Path::new("/").join(root);
                Some(if path.is_empty() { base } else { base.join(path) })
            }
            _ => None,
        }
    }

    /// Writes a small object, replacing an existing one.
    ///
    /// # Errors
    /// [`Error`] if the store cannot be written.
    pub fn put(&self, path: &str, bytes: Bytes) -> Result<(), Error> {
        let store = self.writable("write", path)?;
        block_on(store.put(&self.key(path)?, bytes.into()))
            .map(|_| ())
            .map_err(|error| self.failed("write", path, error))
    }

    /// Writes an object only if it does not exist.
    ///
    /// # Guarantees
    /// Of several writers of different bytes exactly one gets [`PutIfAbsent::Created`]. If a response is
    /// lost, or S3 reports a conflict although there is no object, the object is read to decide: equal
    /// bytes count as created.
    ///
    /// # Errors
    /// [`Error`] if the store cannot be written.
    pub fn put_if_absent(&self, path: &str, bytes: Bytes) -> Result<PutIfAbsent, Error> {
        let store = self.writable("create", path)?;
        let key = self.key(path)?;
        let mut attempt = 1;
        loop {
            let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
            let error = match block_on(store.put_opts(&key, bytes.clone().into(), options)) {
                Ok(_) => return Ok(PutIfAbsent::Created),
                Err(error) => self.failed("create", path, error),
            };
            if !matches!(error, Error::Unavailable { .. }) {
                return Err(error);
            }
            match self.read(path) {
                Ok(found) if found == bytes => return Ok(PutIfAbsent::Created),
                Ok(found) => return Ok(PutIfAbsent::Exists(found)),
                Err(Error::NotFound { .. }) if attempt < CREATE_ATTEMPTS => {
                    std::thread::sleep(Duration::from_millis(50 << attempt));
                    attempt += 1;
                }
                Err(_) => return Err(error),
            }
        }
    }

    /// Deletes an object if it exists.
    ///
    /// # Errors
    /// [`Error`] if the request fails.
    pub fn delete(&self, path: &str) -> Result<(), Error> {
        let store = self.writable("delete", path)?;
        match block_on(store.delete(&self.key(path)?)) {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(self.failed("delete", path, error)),
        }
    }

    /// Checks that the store can be written, by writing and deleting a small object.
    ///
    /// # Errors
    /// [`Error`] if either fails.
    pub fn check_writable(&self) -> Result<(), Error> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        let name = format!(".finetune-probe-{}-{now}", std::process::id());
        self.put(&name, Bytes::from_static(b"finetune write probe\n"))?;
        self.delete(&name)
    }

    /// Returns the object store, if it can be written.
    fn writable(&self, action: &'static str, path: &str) -> Result<&Arc<dyn ObjectStore>, Error> {
        match &self.backend {
            Backend::Objects { store, .. } => Ok(store),
            Backend::Hub(_) => Err(Error::Misconfigured {
                action,
                uri: self.name(path),
                detail: "hf:// is read only; use s3://, gs://, az://, pvc:// or file:// for output"
                    .to_owned(),
            }),
        }
    }

    /// Returns the object key of a relative path.
    fn key(&self, path: &str) -> Result<Key, Error> {
        let root = match &self.backend {
            Backend::Objects { root, .. } => root.as_str(),
            Backend::Hub(_) => "",
        };
        let whole = match (root, path) {
            ("", path) => path.to_owned(),
            (root, "") => root.to_owned(),
            (root, path) => format!("{root}/{path}"),
        };
        Key::parse(&whole).map_err(|error| self.failed("name", path, error.into()))
    }

    /// Returns the URI of a relative path, for messages.
    fn name(&self, path: &str) -> String {
        if path.is_empty() { self.uri.to_string() } else { self.uri.join(path).to_string() }
    }

    fn failed(&self, action: &'static str, path: &str, error: object_store::Error) -> Error {
        Error::object(action, self.name(path), error)
    }
}

/// Makes ring the TLS provider of every client in this process.
fn use_ring() {
    // Fails if a provider is set already, which can only be ring: no other is compiled in.
    let _ = rustls::crypto::ring::default_provider().install_default();
}
