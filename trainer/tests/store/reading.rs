//! Fetches that are interrupted or run concurrently.

use std::{fs, ops::Range, sync::Arc, thread};

use finetune_trainer::store::{Store, fetch_model};
use object_store::memory::InMemory;

use super::{failing::Failing, uri};

/// A size of more than two ranges of a fetch.
const LARGE: usize = 20 << 20;

fn bytes() -> Vec<u8> {
    (0..LARGE).map(|i| (i % 251) as u8).collect()
}

/// Returns a store with a model, and its backend, which counts reads and fails from read `at` on.
fn model(memory: &Arc<InMemory>, at: usize) -> (Store, Arc<Failing>) {
    let failing = Arc::new(Failing::reads(Arc::clone(memory), at));
    (Store::from_object_store(&uri("s3://bucket/model"), Arc::clone(&failing) as _), failing)
}

fn put_model(memory: &Arc<InMemory>) {
    let (store, _) = model(memory, usize::MAX);
    store.put("config.json", "{}".into()).unwrap();
    store.put("model.safetensors", bytes().into()).unwrap();
    store.put("pytorch_model.bin", "not wanted".into()).unwrap();
}

fn starts(ranges: &[(String, Range<u64>)], name: &str) -> Vec<u64> {
    ranges.iter().filter(|(path, _)| path.ends_with(name)).map(|(_, range)| range.start).collect()
}

#[test]
fn an_interrupted_fetch_resumes_where_it_stopped() {
    let memory = Arc::new(InMemory::new());
    put_model(&memory);
    let directory = tempfile::tempdir().unwrap();
    let to = directory.path().join("weights");
    let (broken, _) = model(&memory, 2);
    broken.fetch("model.safetensors", &to).unwrap_err();
    assert!(!to.exists(), "a file appears complete or not at all");

    let (sound, reads) = model(&memory, usize::MAX);
    sound.fetch("model.safetensors", &to).unwrap();
    assert!(fs::read(&to).unwrap() == bytes());
    assert_eq!(starts(&reads.ranges(), "model.safetensors"), [16 << 20]);
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "nothing unfinished is left");
}

#[test]
fn an_interrupted_fetch_of_a_changed_object_starts_over() {
    let memory = Arc::new(InMemory::new());
    put_model(&memory);
    let directory = tempfile::tempdir().unwrap();
    let to = directory.path().join("weights");
    model(&memory, 2).0.fetch("model.safetensors", &to).unwrap_err();

    let (sound, reads) = model(&memory, usize::MAX);
    let changed: Vec<u8> = bytes().into_iter().map(|byte| byte ^ 1).collect();
    sound.put("model.safetensors", changed.clone().into()).unwrap();
    sound.fetch("model.safetensors", &to).unwrap();
    assert!(fs::read(&to).unwrap() == changed);
    assert_eq!(starts(&reads.ranges(), "model.safetensors")[0], 0);
}

#[test]
fn a_partially_fetched_model_is_not_used() {
    let memory = Arc::new(InMemory::new());
    put_model(&memory);
    let cache = tempfile::tempdir().unwrap();
    // config.json is one read, the weights are three.
    fetch_model(&model(&memory, 2).0, cache.path()).unwrap_err();

    let (sound, reads) = model(&memory, usize::MAX);
    let directory = fetch_model(&sound, cache.path()).unwrap();
    assert!(fs::read(directory.join("model.safetensors")).unwrap() == bytes());
    assert!(
        starts(&reads.ranges(), "config.json").is_empty(),
        "complete files are not fetched again"
    );
    assert_eq!(starts(&reads.ranges(), "model.safetensors"), [8 << 20, 16 << 20]);
}

#[test]
fn concurrent_fetches_into_one_cache_fetch_a_model_once() {
    let memory = Arc::new(InMemory::new());
    put_model(&memory);
    let cache = tempfile::tempdir().unwrap();
    let (store, reads) = model(&memory, usize::MAX);
    let directories: Vec<_> = thread::scope(|scope| {
        let fetches = [(); 4].map(|()| scope.spawn(|| fetch_model(&store, cache.path()).unwrap()));
        fetches.into_iter().map(|fetch| fetch.join().unwrap()).collect()
    });
    for directory in &directories {
        assert_eq!(*directory, directories[0]);
        assert!(fs::read(directory.join("model.safetensors")).unwrap() == bytes());
        assert!(!directory.join("pytorch_model.bin").exists());
    }
    assert_eq!(starts(&reads.ranges(), "config.json"), [0]);
    assert_eq!(starts(&reads.ranges(), "model.safetensors"), [0, 8 << 20, 16 << 20]);
}

#[test]
fn several_fetches_of_one_file_do_not_mix() {
    let memory = Arc::new(InMemory::new());
    put_model(&memory);
    let directory = tempfile::tempdir().unwrap();
    let to = directory.path().join("weights");
    let (store, _) = model(&memory, usize::MAX);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                store.fetch("model.safetensors", &to).unwrap();
                assert!(fs::read(&to).unwrap() == bytes());
            });
        }
    });
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "nothing unfinished is left");
}
