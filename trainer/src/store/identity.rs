//! Computes the digest that identifies the files at a URI: from a commit, from tags, or from content.

use crate::store::{
    Entry, Error, Store,
    transfer::{hash_file, sha256_hex},
};

/// The number of files that are hashed in parallel.
const PARALLEL_FILES: usize = 4;

/// Returns a SHA-256 that changes with any of the wanted files at a URI.
///
/// On a hub it is computed from the commit. Elsewhere it is computed from the name, the size and the
/// SHA-256 of each file, except for weights in a bucket: if the store provides a tag for their bytes, it
/// is used instead, because reading them takes as long as fetching them. Files in directories and on
/// volumes have no such tag; their modification time is not reliable after a copy or a restored backup.
///
/// # Errors
/// [`Error`] if the files cannot be listed or read.
pub fn identity(store: &Store, is_wanted: impl Fn(&str) -> bool) -> Result<String, Error> {
    if let Some(commit) = store.resolved_revision() {
        let text = format!("commit {commit} of {}", store.uri());
        return Ok(sha256_hex(text.as_bytes()));
    }
    let mut wanted = store.list_tagged()?;
    wanted.retain(|(entry, _)| entry.path.is_empty() || is_wanted(&entry.path));
    let mut lines = Vec::new();
    for group in wanted.chunks(PARALLEL_FILES) {
        let identities: Vec<Result<String, Error>> = std::thread::scope(|scope| {
            let threads: Vec<_> = group
                .iter()
                .map(|(entry, tag)| scope.spawn(|| file_identity(store, entry, tag.as_deref())))
                .collect();
            let joined = threads.into_iter().map(|thread| {
                thread.join().expect("reading a file returns its errors and does not panic")
            });
            joined.collect()
        });
        for ((entry, _), identity) in group.iter().zip(identities) {
            lines.push(format!("{}\t{}\t{}\n", entry.path, entry.size, identity?));
        }
    }
    Ok(sha256_hex(lines.concat().as_bytes()))
}

/// Returns what identifies the bytes of one file.
fn file_identity(store: &Store, entry: &Entry, tag: Option<&str>) -> Result<String, Error> {
    let local = store.local_path(&entry.path);
    let name = if entry.path.is_empty() { store.uri().file_name() } else { &entry.path };
    match (local, tag) {
        (Some(local), _) => Ok(format!("sha256 {}", hash_file(&local)?.1)),
        (None, Some(tag)) if is_weights(name) => Ok(format!("tag {tag}")),
        (None, _) => Ok(format!("sha256 {}", store.hash(&entry.path)?)),
    }
}

fn is_weights(name: &str) -> bool {
    name.ends_with(".safetensors") || name.ends_with(".gguf")
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bytes::Bytes;
    use finetune_contract::{ObjectUri, testing::file_uri};

    use super::identity;
    use crate::store::{Environment, Role, Store, is_model_file};

    fn of(store: &Store) -> String {
        identity(store, is_model_file).unwrap()
    }

    fn check(store: &Store) {
        let put = |name: &str, text: &'static str| {
            store.put(name, Bytes::from_static(text.as_bytes())).unwrap();
        };
        put("config.json", "{}");
        put("model.safetensors", "one");
        let first = of(store);
        assert_eq!(of(store), first, "reading changes nothing");
        put("README.md", "not part of the model");
        put("eval/tokenizer.json", "of something else");
        assert_eq!(of(store), first);
        for (name, changed, restored) in
            [("config.json", "[]", "{}"), ("model.safetensors", "two", "one")]
        {
            put(name, changed);
            assert_ne!(of(store), first, "{name} has different bytes of the same length");
            put(name, restored);
        }
        put("chat_template.jinja", "{{ messages }}");
        assert_ne!(of(store), first, "an additional file");
    }

    #[test]
    fn changes_with_any_file_of_a_bucket() {
        let uri = ObjectUri::parse("s3://bucket/model").unwrap();
        check(&Store::from_object_store(&uri, Arc::new(object_store::memory::InMemory::new())));
    }

    #[test]
    fn changes_with_any_file_of_a_directory_and_not_with_its_times() {
        let directory = tempfile::tempdir().unwrap();
        let uri = file_uri(directory.path());
        let store = Store::open(&uri, None, Role::Output, &Environment::from_pairs([])).unwrap();
        check(&store);
        let before = of(&store);
        let weights = directory.path().join("model.safetensors");
        let copy = std::fs::read(&weights).unwrap();
        std::fs::remove_file(&weights).unwrap();
        std::fs::write(&weights, copy).unwrap();
        assert_eq!(of(&store), before, "the same bytes at another time");
    }

    #[test]
    fn identifies_a_single_file_by_its_content() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("model.gguf");
        let uri = file_uri(&file);
        let store = Store::open(&uri, None, Role::Model, &Environment::from_pairs([])).unwrap();
        std::fs::write(&file, "one").unwrap();
        let first = of(&store);
        std::fs::write(&file, "two").unwrap();
        assert_ne!(of(&store), first);
    }
}
