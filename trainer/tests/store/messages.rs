//! Error messages of stores: one for each cause that the user can fix.

use std::{fs, sync::Arc};

use finetune_contract::{FailureReason, ProblemReason};
use finetune_trainer::store::{Environment, Error, Role, Store};
use object_store::memory::InMemory;

use super::{Server, uri};

fn at(endpoint: &str) -> Environment {
    Environment::from_pairs([
        ("AWS_ENDPOINT_URL", endpoint),
        ("AWS_ACCESS_KEY_ID", "id"),
        ("AWS_SECRET_ACCESS_KEY", "hunter2"),
        ("FINETUNE_STORE_RETRIES", "0"),
    ])
}

/// Returns a store on the local disk.
fn on_disk(path: &std::path::Path) -> Store {
    let uri = uri(&format!("file://{}", path.display()));
    Store::open(&uri, None, Role::Dataset, &Environment::default()).unwrap()
}

#[test]
fn a_missing_bucket_is_distinguished_from_a_missing_object() {
    let Some(server) = Server::find() else { return };
    let store = server.open("s3://no-such-bucket-here/data", server.secret());
    let errors = [
        store.list().unwrap_err(),
        store.read("rows.jsonl").unwrap_err(),
        store.fetch("rows.jsonl", &std::env::temp_dir().join("never")).unwrap_err(),
    ];
    assert!(errors.iter().all(|error| error.problem_reason() == ProblemReason::NotFound));
    insta::assert_snapshot!(errors.map(|error| error.to_string()).join("\n"), @r"
    cannot list s3://no-such-bucket-here/data: the bucket does not exist (NoSuchBucket: The specified bucket does not exist); create it or correct the URI
    cannot read s3://no-such-bucket-here/data/rows.jsonl: the bucket does not exist (NoSuchBucket: The specified bucket does not exist); create it or correct the URI
    cannot fetch s3://no-such-bucket-here/data/rows.jsonl: the bucket does not exist (NoSuchBucket: The specified bucket does not exist); create it or correct the URI
    ");
}

#[test]
fn wrong_credentials_are_refused_by_name() {
    let Some(server) = Server::find() else { return };
    let uri = format!("s3://{}/messages", server.bucket());
    let wrong_secret = server.open(&uri, "hunter2");
    let wrong_key = server.open_as(&uri, "NOBODY", "hunter2");
    let errors = [
        wrong_secret.list().unwrap_err(),
        wrong_secret.size("rows.jsonl").unwrap_err(),
        wrong_secret.put("rows.jsonl", "{}".into()).unwrap_err(),
        wrong_key.put("rows.jsonl", "{}".into()).unwrap_err(),
    ];
    for error in &errors {
        assert_eq!(error.reason(), FailureReason::PermissionDenied, "{error}");
        assert!(!error.to_string().contains("hunter2"), "{error}");
    }
    let messages = errors.map(|error| error.to_string().replace(server.bucket(), "BUCKET"));
    insta::assert_snapshot!(messages.join("\n"), @r"
    cannot look up s3://BUCKET/messages: the store denies access: check the credentials of the Secret or environment and their permissions
    cannot look up s3://BUCKET/messages/rows.jsonl: the store denies access: check the credentials of the Secret or environment and their permissions
    cannot write s3://BUCKET/messages/rows.jsonl: the store denies access (SignatureDoesNotMatch: The request signature we calculated does not match the signature you provided. Check your key and signing method.): check the credentials of the Secret or environment and their permissions
    cannot write s3://BUCKET/messages/rows.jsonl: the store denies access (InvalidAccessKeyId: The access key ID you provided does not exist in our records.): check the credentials of the Secret or environment and their permissions
    ");
}

#[test]
fn a_missing_object_is_not_found() {
    let memory = Store::from_object_store(&uri("s3://bucket/data"), Arc::new(InMemory::new()));
    let directory = tempfile::tempdir().unwrap();
    let disk = on_disk(directory.path());
    let mut messages = Vec::new();
    for store in [&memory, &disk] {
        let to = directory.path().join("to");
        let open = store.open_read("rows.jsonl").map(|_| ()).unwrap_err();
        for error in [
            store.read("rows.jsonl").unwrap_err(),
            store.fetch("rows.jsonl", &to).unwrap_err(),
            open,
        ] {
            assert_eq!(error.problem_reason(), ProblemReason::NotFound, "{error}");
            messages.push(error.to_string().replace(directory.path().to_str().unwrap(), "/DIR"));
        }
        assert!(!to.exists());
    }
    insta::assert_snapshot!(messages.join("\n"), @r"
    cannot read s3://bucket/data/rows.jsonl: nothing is there; check the URI
    cannot fetch s3://bucket/data/rows.jsonl: nothing is there; check the URI
    cannot open s3://bucket/data/rows.jsonl: nothing is there; check the URI
    cannot read file:///DIR/rows.jsonl: nothing is there; check the URI
    cannot fetch file:///DIR/rows.jsonl: nothing is there; check the URI
    cannot open /DIR/rows.jsonl: No such file or directory (os error 2)
    ");
}

#[test]
fn an_endpoint_nobody_listens_at_is_unavailable_and_named() {
    let store =
        Store::open(&uri("s3://bucket/x"), None, Role::Output, &at("http://127.0.0.1:1")).unwrap();
    let error = store.read("rows.jsonl").unwrap_err();
    assert_eq!(error.reason(), FailureReason::StoreUnavailable);
    assert!(!error.to_string().contains("hunter2"), "{error}");
    insta::assert_snapshot!(error, @"cannot read s3://bucket/x/rows.jsonl: no connection for http://127.0.0.1:1/bucket/x/rows.jsonl: tcp connect error: Connection refused (os error 111); check the endpoint and the network");
}

#[test]
fn a_local_file_that_cannot_be_read_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path().to_str().unwrap();
    fs::create_dir(directory.path().join("folder")).unwrap();
    fs::write(directory.path().join("file"), "x").unwrap();
    let store = on_disk(directory.path());
    let errors = [
        store.read("folder").unwrap_err(),
        store.read("file/below").unwrap_err(),
        store.put_file("copy", &directory.path().join("folder")).unwrap_err(),
        store.put("file/below", "x".into()).unwrap_err(),
    ];
    let messages = errors.map(|error: Error| error.to_string().replace(place, "/DIR"));
    insta::assert_snapshot!(messages.join("\n"), @r"
    cannot read file:///DIR/folder: nothing is there; check the URI
    cannot read file:///DIR/file/below: a part of its path is a file instead of a directory; correct the URI
    cannot read /DIR/folder: Is a directory (os error 21)
    cannot write file:///DIR/file/below: a part of its path is a file instead of a directory; correct the URI
    ");
}
