//! What identifies the bytes of files: a hub's commit, a store's tag, or their content.

use crate::store::{
    Entry, Error, Store,
    transfer::{hash_file, sha256_hex},
};

/// Files that are hashed at once.
const FILES_AT_ONCE: usize = 4;

/// Returns a SHA-256 of what identifies the wanted files at a URI: it changes when any of them does.
///
/// On a hub that is the commit. Elsewhere each file counts with its name, its size and the SHA-256 of
/// its content, but for weights in a bucket: they are known by the tag that the store gives an object's
/// bytes, where it gives one, because reading them would take as long as fetching them. A file in a
/// directory or on a volume has no such tag: what its time says, a copy or a restored backup undoes.
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
    for group in wanted.chunks(FILES_AT_ONCE) {
        let marks: Vec<Result<String, Error>> = std::thread::scope(|scope| {
            let marks: Vec<_> = group
                .iter()
                .map(|(entry, tag)| scope.spawn(|| mark(store, entry, tag.as_deref())))
                .collect();
            let joined = marks.into_iter().map(|mark| {
                mark.join().expect("reading a file returns its errors and does not panic")
            });
            joined.collect()
        });
        for ((entry, _), mark) in group.iter().zip(marks) {
            lines.push(format!("{}\t{}\t{}\n", entry.path, entry.size, mark?));
        }
    }
    Ok(sha256_hex(lines.concat().as_bytes()))
}

/// Returns what tells the bytes of one file from others.
fn mark(store: &Store, entry: &Entry, tag: Option<&str>) -> Result<String, Error> {
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
    use finetune_contract::ObjectUri;

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
        assert_eq!(of(store), first, "looking changes nothing");
        put("README.md", "not part of the model");
        put("eval/tokenizer.json", "of something else");
        assert_eq!(of(store), first);
        for (name, changed, restored) in
            [("config.json", "[]", "{}"), ("model.safetensors", "two", "one")]
        {
            put(name, changed);
            assert_ne!(of(store), first, "{name} has other bytes of the same length");
            put(name, restored);
        }
        put("chat_template.jinja", "{{ messages }}");
        assert_ne!(of(store), first, "a file more");
    }

    #[test]
    fn changes_with_any_file_of_a_bucket() {
        let uri = ObjectUri::parse("s3://bucket/model").unwrap();
        check(&Store::over(&uri, Arc::new(object_store::memory::InMemory::new())));
    }

    #[test]
    fn changes_with_any_file_of_a_directory_and_not_with_its_times() {
        let directory = tempfile::tempdir().unwrap();
        let uri = ObjectUri::parse(&format!("file://{}", directory.path().display())).unwrap();
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
    fn knows_a_single_file_by_its_content() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("model.gguf");
        let uri = ObjectUri::parse(&format!("file://{}", file.display())).unwrap();
        let store = Store::open(&uri, None, Role::Model, &Environment::from_pairs([])).unwrap();
        std::fs::write(&file, "one").unwrap();
        let first = of(&store);
        std::fs::write(&file, "two").unwrap();
        assert_ne!(of(&store), first);
    }
}
