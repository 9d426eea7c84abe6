//! Transfers whole files: resumable fetches, streams with bounded memory, multipart uploads.

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

/// The number of bytes per request, and the most that an interrupted transfer loses.
const CHUNK_BYTES: u64 = 8 << 20;
/// The size from which files are uploaded in parts.
const MULTIPART_BYTES: u64 = 32 << 20;
/// The size of a part, unless there would be too many.
pub const PART_BYTES: usize = UPLOAD_PART_BYTES as usize;
/// The most parts of an upload; S3 allows 10 000.
const MAX_PARTS: u64 = 9_000;
/// The number of parts in flight, which bounds memory to this times the size of a part.
const PARTS_IN_FLIGHT: usize = UPLOAD_PARTS_IN_FLIGHT as usize;

impl Store {
    /// Opens a file as a stream, which requests one bounded range after another.
    ///
    /// # Errors
    /// [`Error`] if the file is missing; later errors are returned by the reader.
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

    /// Returns the SHA-256 of the content of a file, read as a stream.
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
    /// An interrupted fetch resumes where it stopped, unless the object has changed. Two processes that
    /// fetch the same file wait for each other. The length is verified, and the SHA-256 if the server
    /// announces one.
    ///
    /// # Errors
    /// [`Error`] if the file is missing, unreadable or damaged, or the disk is full.
    pub fn fetch(&self, path: &str, to: &Path) -> Result<(), Error> {
        let stat = self.stat_existing("fetch", path)?;
        let directory = to.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(directory).map_err(|error| Error::local("create", directory, error))?;
        let partial = partial_path(to, &self.name(path), &stat);
        let Some(mut file) = lock_partial(&partial, to, stat.size)? else {
            return Ok(()); // Another process completed the file while this one waited for the lock.
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
                // Resuming from wrong bytes would always fail.
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

    /// Uploads a file. Large files are uploaded in parts, which are aborted on failure.
    ///
    /// # Errors
    /// [`Error`] if the file cannot be read or the store cannot be written.
    pub fn put_file(&self, path: &str, from: &Path) -> Result<(), Error> {
        let (size, parts) = file_parts(from)?;
        self.put_parts(path, size, parts)
    }

    /// Uploads `size` bytes that are given in parts, as [`Self::put_file`] does.
    ///
    /// # Guarantees
    /// At most four parts of a large object are in memory at once, beside those of the caller. A small
    /// object is in memory as a whole.
    ///
    /// # Errors
    /// [`Error`] if the store cannot be written, if a part is an error, or if the parts do not add up to
    /// `size`.
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
            detail: format!("its source changed from {size} to {sent} bytes during the upload"),
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
                // Return the first error. If aborting fails, a lifecycle rule must remove the parts.
                let _ = upload.abort().await;
                return Err(error);
            }
            // `finish` itself aborts the upload if a part fails.
            upload.finish().await.map(|_| ()).map_err(failed)
        })
    }
}

/// Returns the size of a local file, and its bytes in parts.
///
/// # Errors
/// [`Error::Local`] if the file cannot be opened; a part is an error if it cannot be read.
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

/// Opens and locks the partial file; `None` if another process has completed `to` in the meantime.
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
        // While waiting, the file may have been renamed, and another one created under its name.
        let ours = file.metadata().map_err(failed)?.ino();
        if fs::metadata(partial).is_ok_and(|named| named.ino() == ours) {
            return Ok(Some(file));
        }
        if to.metadata().is_ok_and(|meta| meta.len() == size) {
            return Ok(None);
        }
    }
}

/// Returns the path of the partial file. It depends on the identity of the object, so that a fetch never
/// resumes with the bytes of another object.
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
