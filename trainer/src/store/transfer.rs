//! Whole files in and out: resumable fetches, bounded streams, multipart uploads.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use finetune_contract::cost::{UPLOAD_PART_BYTES, UPLOAD_PARTS_IN_FLIGHT};
use object_store::{ObjectStoreExt as _, PutPayload, WriteMultipart};
use sha2::{Digest, Sha256};

use crate::{
    hex,
    store::{Error, Stat, Store, runtime::block_on},
};

/// Bytes asked for at once; also what a broken transfer loses at most.
const CHUNK_BYTES: u64 = 8 << 20;
/// Files at least this large go up in parts.
const MULTIPART_BYTES: u64 = 32 << 20;
/// Bytes of a part, unless that made too many.
pub const PART_BYTES: usize = UPLOAD_PART_BYTES as usize;
/// S3 takes at most 10 000 parts.
const MAX_PARTS: u64 = 9_000;
/// Parts in flight; bounds memory to this times the part size.
const PARTS_IN_FLIGHT: usize = UPLOAD_PARTS_IN_FLIGHT as usize;

impl Store {
    /// Opens a file as a stream that asks for one bounded range after another.
    ///
    /// # Errors
    /// [`Error`] if the file is missing; later failures come through the reader.
    pub fn open_read(&self, path: &str) -> Result<Box<dyn Read + Send>, Error> {
        if let Some(local) = self.local_path(path) {
            let file = File::open(&local).map_err(|error| Error::local("open", &local, error))?;
            return Ok(Box::new(io::BufReader::new(file)));
        }
        let stat = self.stat_existing("open", path)?;
        Ok(Box::new(RangeReader {
            store: self.clone(),
            path: path.to_owned(),
            stat,
            position: 0,
            chunk: Bytes::new(),
        }))
    }

    /// Returns the SHA-256 of a file's content, read as a stream.
    ///
    /// # Errors
    /// [`Error`] if the file is missing or cannot be read.
    pub(super) fn hash(&self, path: &str) -> Result<String, Error> {
        let read = |error| Error::local("read", Path::new(&self.name(path)), error);
        let mut reader = self.open_read(path)?;
        let mut hasher = Sha256::new();
        let mut buffer = vec![0; 1 << 20];
        loop {
            let length = reader.read(&mut buffer).map_err(read)?;
            if length == 0 {
                return Ok(hex(&hasher.finalize()));
            }
            hasher.update(&buffer[..length]);
        }
    }

    /// Fetches a file to `to`, which appears complete or not at all.
    ///
    /// # Guarantees
    /// An interrupted fetch goes on where it stopped, unless the object changed in between. Two
    /// processes that fetch the same file wait for each other. The length is checked, and the
    /// SHA-256 where the server tells it.
    ///
    /// # Errors
    /// [`Error`] if the file is missing, unreadable or damaged, or the disk is full.
    pub fn fetch(&self, path: &str, to: &Path) -> Result<(), Error> {
        let stat = self.stat_existing("fetch", path)?;
        let directory = to.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(directory).map_err(|error| Error::local("create", directory, error))?;
        let partial = partial_path(to, &self.name(path), &stat);
        let Some(mut file) = lock_partial(&partial, to, stat.size)? else {
            return Ok(()); // Another process finished while we waited for the lock.
        };
        let write = |error| Error::local("write", &partial, error);
        let mut position = file.seek(SeekFrom::End(0)).map_err(write)?;
        if position > stat.size {
            file.set_len(0).map_err(write)?;
            position = file.seek(SeekFrom::Start(0)).map_err(write)?;
        }
        while position < stat.size {
            let end = stat.size.min(position + CHUNK_BYTES);
            let bytes = self.read_range_of(path, position..end, stat.tag.as_deref())?;
            file.write_all(&bytes).map_err(write)?;
            position += bytes.len() as u64;
            if bytes.len() as u64 != end - (position - bytes.len() as u64) {
                return Err(Error::Damaged {
                    uri: self.name(path),
                    detail: format!("it ended at byte {position} of {}", stat.size),
                });
            }
        }
        if let Some(expected) = &stat.sha256 {
            let (_, found) = hash_file(&partial)?;
            if found != *expected {
                // Resuming from wrong bytes would fail for ever.
                fs::remove_file(&partial)
                    .map_err(|error| Error::local("remove", &partial, error))?;
                return Err(Error::Damaged {
                    uri: self.name(path),
                    detail: format!("its SHA-256 is {found}, the server announced {expected}"),
                });
            }
        }
        file.sync_all().map_err(write)?;
        fs::rename(&partial, to).map_err(|error| Error::local("rename", &partial, error))
    }

    /// Writes a file's bytes to an object: in parts when large, which are aborted on failure.
    ///
    /// # Errors
    /// [`Error`] if the file cannot be read or the store not written.
    pub fn put_file(&self, path: &str, from: &Path) -> Result<(), Error> {
        let (size, parts) = file_parts(from)?;
        self.put_parts(path, size, parts)
    }

    /// Writes `size` bytes that come part by part to an object, as [`Self::put_file`] does.
    ///
    /// # Guarantees
    /// Of a large object no more than four parts are in memory at once, beside those that the
    /// caller has there anyway; of a small one all are.
    ///
    /// # Errors
    /// [`Error`] if the store cannot be written, the first error among the parts, or that they are
    /// more or less than `size`.
    pub fn put_parts(
        &self,
        path: &str,
        size: u64,
        mut parts: impl Iterator<Item = Result<Bytes, Error>>,
    ) -> Result<(), Error> {
        let store = self.writable("write", path)?;
        let key = self.key(path)?;
        let failed = |error| self.failed("write", path, error);
        let changed = |sent: u64| Error::Damaged {
            uri: self.name(path),
            detail: format!("what it is made of changed from {size} to {sent} bytes meanwhile"),
        };
        if size < MULTIPART_BYTES {
            let whole: PutPayload =
                parts.collect::<Result<Vec<Bytes>, Error>>()?.into_iter().collect();
            if whole.content_length() as u64 != size {
                return Err(changed(whole.content_length() as u64));
            }
            return block_on(store.put(&key, whole)).map(|_| ()).map_err(failed);
        }
        let part_bytes = size.div_ceil(MAX_PARTS).max(PART_BYTES as u64) as usize;
        block_on(async {
            let upload = store.put_multipart(&key).await.map_err(failed)?;
            let mut upload = WriteMultipart::new_with_chunk_size(upload, part_bytes);
            let mut sent = 0;
            let outcome = loop {
                let part = match parts.next() {
                    None if sent == size => break Ok(()),
                    None => break Err(changed(sent)),
                    Some(Err(error)) => break Err(error),
                    Some(Ok(part)) => part,
                };
                if let Err(error) = upload.wait_for_capacity(PARTS_IN_FLIGHT - 1).await {
                    break Err(failed(error));
                }
                sent += part.len() as u64;
                upload.put(part);
            };
            if let Err(error) = outcome {
                // The first error is the one to tell; a lifecycle rule removes orphaned parts.
                let _ = upload.abort().await;
                return Err(error);
            }
            // `finish` aborts by itself when a part fails.
            upload.finish().await.map(|_| ()).map_err(failed)
        })
    }
}

/// Returns a local file's size, and its bytes in parts.
///
/// # Errors
/// [`Error::Local`], also for a part.
pub fn file_parts(
    from: &Path,
) -> Result<(u64, impl Iterator<Item = Result<Bytes, Error>> + use<'_>), Error> {
    let read = move |error| Error::local("read", from, error);
    let mut file = File::open(from).map_err(read)?;
    let size = file.metadata().map_err(read)?.len();
    let part_bytes = size.min(PART_BYTES as u64) as usize;
    let parts = std::iter::from_fn(move || {
        let mut part = Vec::with_capacity(part_bytes);
        match (&mut file).take(PART_BYTES as u64).read_to_end(&mut part) {
            Ok(0) => None,
            Ok(_) => Some(Ok(part.into())),
            Err(error) => Some(Err(read(error))),
        }
    });
    Ok((size, parts))
}

/// Reads a file range by range.
struct RangeReader {
    store: Store,
    path: String,
    stat: Stat,
    position: u64,
    chunk: Bytes,
}

impl Read for RangeReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.chunk.is_empty() && self.position < self.stat.size {
            let end = self.stat.size.min(self.position + CHUNK_BYTES);
            let tag = self.stat.tag.as_deref();
            self.chunk = self.store.read_range_of(&self.path, self.position..end, tag)?;
            if self.chunk.is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.position += self.chunk.len() as u64;
        }
        let length = buffer.len().min(self.chunk.len());
        buffer[..length].copy_from_slice(&self.chunk.split_to(length));
        Ok(length)
    }
}

/// Opens and locks the unfinished file; `None` if another process has completed `to` meanwhile.
fn lock_partial(partial: &Path, to: &Path, size: u64) -> Result<Option<File>, Error> {
    let failed = |error| Error::local("lock", partial, error);
    loop {
        let file = OpenOptions::new()
            .create(true)
            .read(true)
            .write(true)
            .truncate(false)
            .open(partial)
            .map_err(failed)?;
        file.lock().map_err(failed)?;
        // The name may have been renamed away, and even made anew, while we waited.
        let ours = file.metadata().map_err(failed)?.ino();
        if fs::metadata(partial).is_ok_and(|named| named.ino() == ours) {
            return Ok(Some(file));
        }
        if to.metadata().is_ok_and(|meta| meta.len() == size) {
            return Ok(None);
        }
    }
}

/// Names the unfinished file so that only the very same bytes are ever continued.
fn partial_path(to: &Path, uri: &str, stat: &Stat) -> PathBuf {
    let identity = format!("{uri}\n{}\n{:?}\n{:?}", stat.size, stat.tag, stat.sha256);
    let name = to.file_name().unwrap_or_default().to_string_lossy();
    to.with_file_name(format!(".{name}.{}.partial", &sha256_hex(identity.as_bytes())[..16]))
}

/// Returns the size and SHA-256 of a local file.
///
/// # Errors
/// [`Error::Local`].
pub fn hash_file(path: &Path) -> Result<(u64, String), Error> {
    let read = |error| Error::local("read", path, error);
    let mut file = File::open(path).map_err(read)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut size = 0;
    loop {
        let length = file.read(&mut buffer).map_err(read)?;
        if length == 0 {
            return Ok((size, hex(&hasher.finalize())));
        }
        hasher.update(&buffer[..length]);
        size += length as u64;
    }
}

/// Returns the SHA-256 of bytes in lower-case hexadecimal.
pub fn sha256_hex(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}
