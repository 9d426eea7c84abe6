//! A store that fails at write `k`, for every `k`.

use std::{
    fmt, fs,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use finetune_trainer::store::{Store, publish};
use futures::stream::BoxStream;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, memory::InMemory, path::Path,
};

use super::{manifest, uri};

/// Fails from write `at` on, as a killed process would; when `lost`, that write still happens.
#[derive(Debug)]
struct Failing {
    inner: Arc<InMemory>,
    writes: AtomicUsize,
    at: usize,
    lost: bool,
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
        if write < self.at {
            return self.inner.put_opts(location, payload, options).await;
        }
        if write == self.at && self.lost {
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
        self.inner.get_opts(location, options).await
    }
    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        if self.writes.fetch_add(1, Ordering::SeqCst) >= self.at {
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

#[test]
fn a_failure_at_any_write_never_leaves_a_manifest_of_missing_or_mixed_files() {
    let old = tempfile::tempdir().unwrap();
    fs::write(old.path().join("a"), "old a").unwrap();
    fs::write(old.path().join("gone"), "old").unwrap();
    let new = tempfile::tempdir().unwrap();
    fs::write(new.path().join("a"), "new a").unwrap();
    fs::write(new.path().join("b"), "new b").unwrap();
    let uri = uri("s3://bucket/out");
    for lost in [false, true] {
        let mut succeeded = false;
        for at in 0..10 {
            let memory = Arc::new(InMemory::new());
            let sound = Store::over(&uri, Arc::clone(&memory) as _);
            publish::publish(&sound, old.path(), manifest("old"), false).unwrap();
            let failing = Failing { inner: memory, writes: AtomicUsize::new(0), at, lost };
            let failing = Store::over(&uri, Arc::new(failing));
            succeeded = publish::publish(&failing, new.path(), manifest("new"), true).is_ok();
            let back = tempfile::tempdir().unwrap();
            if let Some(manifest) = publish::read_manifest(&sound).unwrap() {
                publish::fetch_verified(&sound, &manifest, back.path()).unwrap();
            }
            let again = publish::publish(&sound, new.path(), manifest("new"), true).unwrap();
            let back = tempfile::tempdir().unwrap();
            publish::fetch_verified(&sound, &again.manifest, back.path()).unwrap();
            assert_eq!(again.manifest.run_id.0, "new");
        }
        assert!(succeeded, "ten writes are more than a publication needs");
    }
}
