//! The behavior that all stores must share.

use std::{fs, io::Read as _, sync::Arc, thread};

use finetune_contract::{Manifest, RunId};
use finetune_trainer::store::{
    Entry, Environment, Error, PutIfAbsent, Role, Store, fetch_model,
    publish::{self, OutputContents},
};
use object_store::memory::InMemory;

use super::{Server, manifest, uri};

#[test]
fn memory_conforms() {
    check_conformance(&Store::from_object_store(
        &uri("s3://bucket/base"),
        Arc::new(InMemory::new()),
    ));
}

#[test]
fn disk_conforms() {
    let directory = tempfile::tempdir().unwrap();
    let uri = uri(&format!("file://{}/base", directory.path().display()));
    check_conformance(&Store::open(&uri, None, Role::Output, &Environment::default()).unwrap());
}

#[test]
fn s3_conforms() {
    let Some(server) = Server::find() else { return };
    let uri = format!("s3://{}/store-test-{}", server.bucket(), std::process::id());
    check_conformance(&server.open(&uri, server.secret()));
}

fn check_conformance(store: &Store) {
    assert_eq!(store.list().unwrap(), []);
    assert_eq!(store.size("a").unwrap(), None);
    assert!(matches!(store.read("a"), Err(Error::NotFound { .. })));
    store.check_writable().unwrap();
    store.put("b/c d", "123".into()).unwrap();
    store.put("a", "hello".into()).unwrap();
    store.put("a", "hello world".into()).unwrap();
    let entry = |path: &str, size| Entry { path: path.to_owned(), size };
    assert_eq!(store.list().unwrap(), [entry("a", 11), entry("b/c d", 3)]);
    assert_eq!(store.read_range("a", 6..100).unwrap(), "world");

    assert_eq!(store.put_if_absent("m", "ours".into()).unwrap(), PutIfAbsent::Created);
    assert_eq!(store.put_if_absent("m", "ours".into()).unwrap(), PutIfAbsent::Created);
    let exists = PutIfAbsent::Exists("ours".into());
    assert_eq!(store.put_if_absent("m", "theirs".into()).unwrap(), exists);
    store.delete("m").unwrap();
    store.delete("m").unwrap();

    let local = tempfile::tempdir().unwrap();
    let large: Vec<u8> = (0..(40u32 << 20)).map(|i| (i % 251) as u8).collect();
    fs::write(local.path().join("large"), &large).unwrap();
    store.put_file("large", &local.path().join("large")).unwrap();
    let mut read = Vec::new();
    store.open_read("large").unwrap().read_to_end(&mut read).unwrap();
    assert!(read == large);
    store.fetch("large", &local.path().join("x/back")).unwrap();
    assert!(fs::read(local.path().join("x/back")).unwrap() == large);
    assert_eq!(fs::read_dir(local.path().join("x")).unwrap().count(), 1);
    for path in ["a", "b/c d", "large"] {
        store.delete(path).unwrap();
    }
    publishes(store);
}

fn publishes(store: &Store) {
    let local = tempfile::tempdir().unwrap();
    fs::write(local.path().join("config.json"), "{}").unwrap();
    fs::create_dir(local.path().join("adapter")).unwrap();
    fs::write(local.path().join("adapter/w.safetensors"), "weights").unwrap();
    assert_eq!(publish::inspect(store, &manifest("one"), false).unwrap(), OutputContents::Vacant);
    let first = publish::publish(store, local.path(), manifest("one"), false).unwrap();
    assert_eq!(publish::publish(store, local.path(), manifest("one"), false).unwrap(), first);
    let found = |here: &Manifest| publish::inspect(store, here, false).unwrap();
    assert_eq!(found(&manifest("one")), OutputContents::SameInputs(Box::new(first.clone())));
    let by_another = Manifest { run_id: RunId("two".to_owned()), ..manifest("one") };
    assert_eq!(
        found(&by_another),
        OutputContents::SameInputs(Box::new(first.clone())),
        "of the same inputs"
    );
    let mut other = manifest("one");
    other.inputs.as_mut().unwrap().model_sha256 = "1".repeat(64);
    let expected = "a result of different inputs (differing: the files of model.uri)";
    assert_eq!(found(&other), OutputContents::OtherInputs(expected.to_owned()));
    let back = tempfile::tempdir().unwrap();
    assert_eq!(publish::fetch_verified(store, &first.manifest, back.path()).unwrap(), 9);

    // Different bytes of the same run do not replace a result that may be in use.
    fs::write(local.path().join("config.json"), "[]").unwrap();
    assert_eq!(publish::publish(store, local.path(), manifest("one"), false).unwrap(), first);
    assert_eq!(store.read("config.json").unwrap(), "{}");
    // An incomplete result is replaced.
    store.delete("adapter/w.safetensors").unwrap();
    assert_eq!(found(&manifest("one")), OutputContents::Vacant);
    let repaired = publish::publish(store, local.path(), manifest("one"), false).unwrap();
    let back = tempfile::tempdir().unwrap();
    publish::fetch_verified(store, &repaired.manifest, back.path()).unwrap();
    assert_eq!(fs::read_to_string(back.path().join("config.json")).unwrap(), "[]");
    fs::write(local.path().join("config.json"), "{}").unwrap();

    let refused = publish::publish(store, local.path(), manifest("two"), false).unwrap_err();
    let expected =
        r#"a result of different inputs (differing: training.seed ("one" there, "two" here))"#;
    assert!(refused.to_string().contains(expected), "{refused}");
    fs::remove_dir_all(local.path().join("adapter")).unwrap();
    let second = publish::publish(store, local.path(), manifest("two"), true).unwrap();
    assert_eq!(publish::read_manifest(store).unwrap(), Some(second.manifest.clone()));
    assert_eq!(store.size("adapter/w.safetensors").unwrap(), None);

    store.put("config.json", "[]".into()).unwrap();
    let back = tempfile::tempdir().unwrap();
    let damaged = publish::fetch_verified(store, &second.manifest, back.path()).unwrap_err();
    assert!(matches!(damaged, Error::Damaged { .. }), "{damaged}");

    let cache = tempfile::tempdir().unwrap();
    let model = fetch_model(store, cache.path()).unwrap();
    assert_eq!(fs::read_to_string(model.join("config.json")).unwrap(), "[]");
}

#[test]
fn two_publishers_of_one_run_both_get_the_first_result() {
    let store = Store::from_object_store(&uri("s3://bucket/base"), Arc::new(InMemory::new()));
    let outcomes: Vec<_> = thread::scope(|scope| {
        let publishers = ["{1}", "{2}"].map(|text| {
            let store = &store;
            scope.spawn(move || {
                let local = tempfile::tempdir().unwrap();
                fs::write(local.path().join("config.json"), text).unwrap();
                publish::publish(store, local.path(), manifest("one"), false).unwrap()
            })
        });
        publishers.into_iter().map(|publisher| publisher.join().unwrap()).collect()
    });
    assert_eq!(outcomes[0], outcomes[1]);
    assert_eq!(publish::read_manifest(&store).unwrap(), Some(outcomes[0].manifest.clone()));
}

#[test]
fn the_uri_of_a_file_lists_that_file_and_directory_markers_are_omitted() {
    let memory = Arc::new(InMemory::new());
    let base = Store::from_object_store(&uri("s3://bucket/base"), Arc::clone(&memory) as _);
    base.put("rows.jsonl", "{}".into()).unwrap();
    base.put("d", "".into()).unwrap();
    base.put("d.x", "1".into()).unwrap();
    base.put("d/e", "1".into()).unwrap();
    let paths: Vec<String> = base.list().unwrap().into_iter().map(|entry| entry.path).collect();
    assert_eq!(paths, ["d.x", "d/e", "rows.jsonl"]);
    let one = Store::from_object_store(&uri("s3://bucket/base/rows.jsonl"), memory);
    assert_eq!(one.list().unwrap(), [Entry { path: String::new(), size: 2 }]);
    assert_eq!(one.read("").unwrap(), "{}");
}

#[test]
fn a_result_of_an_earlier_release_belongs_only_to_its_own_run() {
    let store = Store::from_object_store(&uri("s3://bucket/base"), Arc::new(InMemory::new()));
    let local = tempfile::tempdir().unwrap();
    fs::write(local.path().join("config.json"), "{}").unwrap();
    let before = Manifest { inputs: None, settings: None, ..manifest("one") };
    let first = publish::publish(&store, local.path(), before, false).unwrap();
    let found = |here: &Manifest, is_retry| publish::inspect(&store, here, is_retry).unwrap();
    assert_eq!(found(&manifest("one"), true), OutputContents::SameInputs(Box::new(first.clone())));
    for (here, is_retry) in [(manifest("one"), false), (manifest("two"), true)] {
        let OutputContents::OtherInputs(why) = found(&here, is_retry) else {
            panic!("it is taken for its own")
        };
        assert!(why.contains("run one") && why.contains("cannot be compared"), "{why}");
    }
    let mut repaired = manifest("one");
    repaired.train_sha256 = "1".repeat(64);
    assert!(matches!(found(&repaired, true), OutputContents::OtherInputs(_)));
    // With `overwrite`, the next run replaces it.
    fs::write(local.path().join("config.json"), "[]").unwrap();
    let second = publish::publish(&store, local.path(), manifest("one"), true).unwrap();
    assert_ne!(second.manifest.files, first.manifest.files);
}
