//! Everything outside this machine's memory: buckets, hubs, volumes and directories, behind one
//! blocking interface.
//!
//! `s3`, `gs`, `az`, `file` and `pvc` go through the `object_store` crate, `hf` through [`hub`].
//! The public functions block; the one asynchronous runtime of the process lives here and is never
//! seen outside.

mod backend;
mod environment;
mod error;
mod hub;
mod model;
pub mod publish;

use std::{
    fs::File,
    io::{Read, Write},
    ops::Range,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use bytes::Bytes;
use finetune_contract::{ObjectUri, Scheme};
use futures::{StreamExt, TryStreamExt};
use object_store::{ObjectStoreExt, PutMode, PutOptions, PutPayload, WriteMultipart};
use tokio::runtime::Runtime;

pub use environment::{Environment, Role};
pub use error::Error;
pub use model::fetch_model;

use backend::Objects;
use hub::Hub;

/// Where a PersistentVolumeClaim is mounted: `pvc://claim/path` is `/mnt/pvc/claim/path`.
pub const PVC_ROOT: &str = "/mnt/pvc";
/// Bytes asked for at once.
const RANGE_BYTES: u64 = 8 << 20;
/// Requests of one transfer under way at once.
const CONCURRENCY: usize = 4;
/// Files from this size on are uploaded in parts.
const MULTIPART_BYTES: u64 = 64 << 20;

/// One opened URI.
#[derive(Debug, Clone)]
pub struct Store {
    uri: ObjectUri,
    backend: Backend,
}

#[derive(Debug, Clone)]
enum Backend {
    Objects(Objects),
    Hub(Hub),
}

/// An object below a URI.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    /// Its path below the URI, with `/`; empty if the URI names the object itself.
    pub path: String,
    /// Bytes.
    pub size: u64,
}

/// What became of a create-only put.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PutIfAbsent {
    /// The object is there with our bytes.
    Created,
    /// The object was there before, with these bytes.
    Exists(Bytes),
}

impl Store {
    /// Opens a URI. Only the hub is asked something at once: which commit a revision means.
    ///
    /// # Errors
    /// [`Error`] if the store cannot be configured, or the hub has no such repository.
    pub fn open(
        uri: &ObjectUri,
        revision: Option<&str>,
        role: Role,
        environment: &Environment,
    ) -> Result<Self, Error> {
        let backend = match uri.scheme {
            Scheme::Hf => Backend::Hub(block_on(Hub::open(uri, revision, role, environment))?),
            _ => Backend::Objects(Objects::open(uri, role, environment)?),
        };
        Ok(Self { uri: uri.clone(), backend })
    }

    /// Returns the URI.
    pub fn uri(&self) -> &ObjectUri {
        &self.uri
    }

    /// Returns the commit a hub revision means; `None` for other stores.
    pub fn resolved_revision(&self) -> Option<&str> {
        match &self.backend {
            Backend::Hub(hub) => Some(hub.commit()),
            Backend::Objects(_) => None,
        }
    }

    /// Returns where an object lies on this machine; `None` if it does not.
    pub fn local_path(&self, path: &str) -> Option<PathBuf> {
        let root = local_root(&self.uri)?;
        Some(if path.is_empty() { root } else { root.join(path) })
    }

    /// Lists every object below the URI, sorted; the object itself if the URI names one.
    ///
    /// # Errors
    /// [`Error`]; a prefix without objects is an empty list.
    pub fn list(&self) -> Result<Vec<Entry>, Error> {
        let mut entries = match &self.backend {
            Backend::Hub(hub) => hub.list(),
            Backend::Objects(objects) => block_on(objects.list())?,
        };
        entries.sort();
        Ok(entries)
    }

    /// Returns the size of an object; `None` if it is not there.
    ///
    /// # Errors
    /// [`Error`] if the store cannot tell.
    pub fn size(&self, path: &str) -> Result<Option<u64>, Error> {
        match &self.backend {
            Backend::Hub(hub) => Ok(hub.size(path)),
            Backend::Objects(objects) => match block_on(objects.store.head(&objects.at(path))) {
                Ok(meta) => Ok(Some(meta.size)),
                Err(error) => match self.error(path, &error) {
                    Error::NotFound { .. } => Ok(None),
                    error => Err(error),
                },
            },
        }
    }

    /// Reads a whole object; for small ones.
    ///
    /// # Errors
    /// [`Error`].
    pub fn read(&self, path: &str) -> Result<Bytes, Error> {
        match &self.backend {
            Backend::Hub(_) => {
                let size = self.size_of(path)?;
                self.read_range(path, 0..size)
            }
            Backend::Objects(objects) => {
                let get = async { objects.store.get(&objects.at(path)).await?.bytes().await };
                block_on(get).map_err(|error| self.error(path, &error))
            }
        }
    }

    /// Reads some bytes of an object.
    ///
    /// # Errors
    /// [`Error`], also if the range reaches beyond the object.
    pub fn read_range(&self, path: &str, range: Range<u64>) -> Result<Bytes, Error> {
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        block_on(self.get_range(path, range))
    }

    /// Opens an object to be read from start to end, with bounded memory.
    ///
    /// A transfer that breaks goes on where it broke: each piece is a request of its own, and
    /// requests are repeated.
    ///
    /// # Errors
    /// [`Error`] if it is not there; reading gives the store's errors as [`std::io::Error`].
    pub fn open_read(&self, path: &str) -> Result<Box<dyn Read + Send>, Error> {
        if let Some(local) = self.local_path(path) {
            let file =
                File::open(&local).map_err(|error| self.local_error(path, &local, &error))?;
            return Ok(Box::new(std::io::BufReader::with_capacity(1 << 20, file)));
        }
        let size = self.size_of(path)?;
        Ok(Box::new(RangeReader {
            store: self.clone(),
            path: path.to_owned(),
            next: 0,
            size,
            piece: Bytes::new(),
        }))
    }

    /// Brings an object to a local file, which appears complete or not at all.
    ///
    /// An interrupted transfer leaves `<name>.part` and goes on from it.
    ///
    /// # Errors
    /// [`Error`], also if what arrived has another size or digest than the store tells.
    pub fn fetch(&self, path: &str, to: &Path) -> Result<(), Error> {
        let part = part_name(to);
        if let Some(local) = self.local_path(path) {
            std::fs::copy(&local, &part).map_err(|error| self.local_error(path, &local, &error))?;
        } else {
            self.fetch_ranges(path, &part)?;
        }
        if let (Backend::Hub(hub), Some(damage)) = (&self.backend, self.damage(path, &part)?) {
            let _ = std::fs::remove_file(&part);
            return Err(Error::Damaged { uri: hub.url(path), detail: damage });
        }
        std::fs::rename(&part, to).map_err(|error| Error::local(to, &error))
    }

    /// Writes a small object, replacing what was there.
    ///
    /// # Errors
    /// [`Error`].
    pub fn put(&self, path: &str, bytes: Bytes) -> Result<(), Error> {
        let objects = self.writable()?;
        block_on(objects.store.put(&objects.at(path), PutPayload::from(bytes)))
            .map_err(|error| self.error(path, &error))?;
        Ok(())
    }

    /// Uploads a file, replacing what was there; a large one in parts, none of which stays behind
    /// if it fails.
    ///
    /// # Errors
    /// [`Error`].
    pub fn put_file(&self, path: &str, from: &Path) -> Result<(), Error> {
        block_on(self.upload(path, from))
    }

    /// Writes an object only if there is none.
    ///
    /// An answer lost on the way is no trouble: our own bytes found there count as created.
    ///
    /// # Errors
    /// [`Error`].
    pub fn put_if_absent(&self, path: &str, bytes: Bytes) -> Result<PutIfAbsent, Error> {
        let objects = self.writable()?;
        let location = objects.at(path);
        let options = PutOptions::from(PutMode::Create);
        let put = objects.store.put_opts(&location, PutPayload::from(bytes.clone()), options);
        let Err(refusal) = block_on(put) else { return Ok(PutIfAbsent::Created) };
        // 412, or 409 of a race, or an answer that was lost: what lies there decides.
        match self.read(path) {
            Ok(found) if found == bytes => Ok(PutIfAbsent::Created),
            Ok(found) => Ok(PutIfAbsent::Exists(found)),
            Err(_) => Err(self.error(path, &refusal)),
        }
    }

    /// Removes an object; one that is not there is fine.
    ///
    /// # Errors
    /// [`Error`].
    pub fn delete(&self, path: &str) -> Result<(), Error> {
        let objects = self.writable()?;
        match block_on(objects.store.delete(&objects.at(path))) {
            Ok(()) => Ok(()),
            Err(error) => match self.error(path, &error) {
                Error::NotFound { .. } => Ok(()),
                error => Err(error),
            },
        }
    }

    /// Shows that objects can be written here, by writing and removing a small one.
    ///
    /// # Errors
    /// [`Error`].
    pub fn probe_write(&self) -> Result<(), Error> {
        let name = format!(".finetune-probe-{}", std::process::id());
        self.put(&name, Bytes::from_static(b"finetune checks that it can write here\n"))?;
        self.delete(&name)
    }

    fn writable(&self) -> Result<&Objects, Error> {
        match &self.backend {
            Backend::Objects(objects) => Ok(objects),
            Backend::Hub(_) => Err(Error::Misconfigured {
                uri: self.uri.to_string(),
                detail: "a hub cannot be written to: use s3://, gs://, az://, pvc:// or file://"
                    .to_owned(),
            }),
        }
    }

    fn size_of(&self, path: &str) -> Result<u64, Error> {
        self.size(path)?.ok_or_else(|| Error::NotFound { uri: self.name(path) })
    }

    async fn get_range(&self, path: &str, range: Range<u64>) -> Result<Bytes, Error> {
        match &self.backend {
            Backend::Hub(hub) => hub.read_range(path, range).await,
            Backend::Objects(objects) => objects
                .store
                .get_range(&objects.at(path), range)
                .await
                .map_err(|error| self.error(path, &error)),
        }
    }

    /// Appends the rest of an object to a partial file, several ranges under way at once.
    fn fetch_ranges(&self, path: &str, part: &Path) -> Result<(), Error> {
        let size = self.size_of(path)?;
        let local = |error: std::io::Error| Error::local(part, &error);
        let mut file = File::options().create(true).append(true).open(part).map_err(local)?;
        let mut have = file.metadata().map_err(local)?.len();
        if have > size {
            file.set_len(0).map_err(local)?;
            have = 0;
        }
        let starts = (have..size).step_by(RANGE_BYTES as usize);
        block_on(async {
            let mut pieces = futures::stream::iter(starts)
                .map(|start| self.get_range(path, start..size.min(start + RANGE_BYTES)))
                .buffered(CONCURRENCY);
            while let Some(piece) = pieces.try_next().await? {
                file.write_all(&piece).map_err(local)?;
            }
            Ok(())
        })?;
        file.sync_all().map_err(local)
    }

    /// Tells how a fetched file differs from what the hub says of it; `None` if it does not.
    fn damage(&self, path: &str, part: &Path) -> Result<Option<String>, Error> {
        let Backend::Hub(hub) = &self.backend else { return Ok(None) };
        let Some(expected) = hub.sha256(path) else { return Ok(None) };
        let found = publish::sha256_of_file(part)?.1;
        Ok((found != expected).then(|| format!("its SHA-256 is {found}, the hub says {expected}")))
    }

    async fn upload(&self, path: &str, from: &Path) -> Result<(), Error> {
        let objects = self.writable()?;
        let local = |error: std::io::Error| Error::local(from, &error);
        let remote = |error: object_store::Error| self.error(path, &error);
        let location = objects.at(path);
        let mut file = File::open(from).map_err(local)?;
        if file.metadata().map_err(local)?.len() < MULTIPART_BYTES {
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).map_err(local)?;
            objects.store.put(&location, PutPayload::from(bytes)).await.map_err(remote)?;
            return Ok(());
        }
        let upload = objects.store.put_multipart(&location).await.map_err(remote)?;
        let mut parts = WriteMultipart::new_with_chunk_size(upload, RANGE_BYTES as usize);
        let mut buffer = vec![0; RANGE_BYTES as usize];
        loop {
            let read = match file.read(&mut buffer) {
                Ok(read) => read,
                Err(error) => {
                    let _ = parts.abort().await;
                    return Err(local(error));
                }
            };
            if read == 0 {
                break;
            }
            if let Err(error) = parts.wait_for_capacity(CONCURRENCY).await {
                let _ = parts.abort().await;
                return Err(remote(error));
            }
            parts.write(&buffer[..read]);
        }
        // `finish` aborts by itself when a part or the completion fails.
        parts.finish().await.map_err(remote)?;
        Ok(())
    }

    fn error(&self, path: &str, error: &object_store::Error) -> Error {
        let hint = match &self.backend {
            Backend::Objects(objects) => objects.hint.as_str(),
            Backend::Hub(_) => "",
        };
        Error::from_object_store(error, self.name(path), hint)
    }

    fn local_error(&self, path: &str, local: &Path, error: &std::io::Error) -> Error {
        match error.kind() {
            std::io::ErrorKind::NotFound => Error::NotFound { uri: self.name(path) },
            std::io::ErrorKind::PermissionDenied => Error::PermissionDenied {
                uri: self.name(path),
                detail: error.to_string(),
                hint: "give the user this runs as access to the path".to_owned(),
            },
            _ => Error::local(local, error),
        }
    }

    fn name(&self, path: &str) -> String {
        if path.is_empty() { self.uri.to_string() } else { self.uri.join(path).to_string() }
    }
}

/// Returns where a URI lies on this machine; `None` for a remote one.
fn local_root(uri: &ObjectUri) -> Option<PathBuf> {
    match uri.scheme {
        Scheme::File => Some(Path::new("/").join(&uri.path)),
        Scheme::Pvc => Some(Path::new(PVC_ROOT).join(&uri.authority).join(&uri.path)),
        Scheme::Hf | Scheme::S3 | Scheme::Gs | Scheme::Az => None,
    }
}

fn part_name(to: &Path) -> PathBuf {
    let mut name = to.as_os_str().to_owned();
    name.push(".part");
    PathBuf::from(name)
}

/// Reads a remote object piece by piece.
struct RangeReader {
    store: Store,
    path: String,
    next: u64,
    size: u64,
    piece: Bytes,
}

impl Read for RangeReader {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.piece.is_empty() && self.next < self.size {
            let end = self.size.min(self.next + RANGE_BYTES);
            self.piece =
                self.store.read_range(&self.path, self.next..end).map_err(std::io::Error::other)?;
            self.next = end;
        }
        let length = buffer.len().min(self.piece.len());
        buffer[..length].copy_from_slice(&self.piece.split_to(length));
        Ok(length)
    }
}

/// Waits for a future on the process's one runtime.
fn block_on<F: Future>(future: F) -> F::Output {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME
        .get_or_init(|| {
            tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .thread_name("store")
                .enable_all()
                .build()
                .expect("two threads and an epoll handle can be had at the start of a process")
        })
        .block_on(future)
}
