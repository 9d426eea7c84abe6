//! An in-memory store that fails at a chosen read or write and records the reads.

use std::{
    fmt,
    ops::Range,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use futures::stream::BoxStream;
use object_store::{
    CopyOptions, GetOptions, GetRange, GetResult, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, memory::InMemory,
    path::Path,
};

/// Fails at a write or read and at all later ones, as after the death of a process.
#[derive(Debug)]
pub struct Failing {
    inner: Arc<InMemory>,
    writes: AtomicUsize,
    first_failing_write: usize,
    /// Whether the first failing write takes effect, and only its response is lost.
    lost: bool,
    first_failing_read: usize,
    ranges: Mutex<Vec<(String, Range<u64>)>>,
}

impl Failing {
    /// Creates a store that fails from write `at` on.
    pub fn writes(inner: Arc<InMemory>, at: usize, lost: bool) -> Self {
        Self {
            inner,
            writes: AtomicUsize::new(0),
            first_failing_write: at,
            lost,
            first_failing_read: usize::MAX,
            ranges: Mutex::default(),
        }
    }

    /// Creates a store that fails from the range read `at` on.
    pub fn reads(inner: Arc<InMemory>, at: usize) -> Self {
        Self { first_failing_read: at, ..Self::writes(inner, usize::MAX, false) }
    }

    /// Returns the ranges requested so far, with their paths.
    pub fn ranges(&self) -> Vec<(String, Range<u64>)> {
        self.ranges.lock().unwrap().clone()
    }
}

impl fmt::Display for Failing {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("failing")
    }
}

fn fault() -> object_store::Error {
    object_store::Error::Generic { store: "failing", source: "injected".into() }
}

#[async_trait::async_trait]
impl ObjectStore for Failing {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> Result<PutResult> {
        let write = self.writes.fetch_add(1, Ordering::SeqCst);
        if write < self.first_failing_write {
            return self.inner.put_opts(location, payload, options).await;
        }
        if write == self.first_failing_write && self.lost {
            self.inner.put_opts(location, payload, options).await?;
        }
        Err(fault())
    }
    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(location, options).await
    }
    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        if let Some(GetRange::Bounded(range)) = &options.range {
            let mut ranges = self.ranges.lock().unwrap();
            ranges.push((location.to_string(), range.clone()));
            if ranges.len() > self.first_failing_read {
                return Err(fault());
            }
        }
        self.inner.get_opts(location, options).await
    }
    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        if self.writes.fetch_add(1, Ordering::SeqCst) >= self.first_failing_write {
            return Box::pin(futures::stream::once(async { Err(fault()) }));
        }
        self.inner.delete_stream(locations)
    }
    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list(prefix)
    }
    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }
    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}
