//! Publishing to a store that fails at write `k`, for every `k`.

use std::{fs, sync::Arc};

use finetune_trainer::store::{Store, publish};
use object_store::memory::InMemory;

use super::{failing::Failing, manifest, uri};

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
            let sound = Store::from_object_store(&uri, Arc::clone(&memory) as _);
            publish::publish(&sound, old.path(), manifest("old"), false).unwrap();
            let failing =
                Store::from_object_store(&uri, Arc::new(Failing::writes(memory, at, lost)));
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
