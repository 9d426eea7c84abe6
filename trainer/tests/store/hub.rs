//! Tests against a local server that implements the API of the hub, correctly and incorrectly.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
};

use finetune_trainer::store::{Environment, Error, Role, Store};

use super::uri;

/// Starts a server that answers each request (its head's lines) by raw bytes; returns its URL.
fn serve(answer: impl Fn(&[String]) -> String + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream: TcpStream = stream.unwrap();
            let reader = BufReader::new(stream.try_clone().unwrap());
            let head: Vec<String> =
                reader.lines().map_while(Result::ok).take_while(|line| !line.is_empty()).collect();
            if !head.is_empty() {
                let _ = stream.write_all(answer(&head).as_bytes());
            }
        }
    });
    url
}

fn reply(status: &str, headers: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "HTTP/1.1 {status}\r\nConnection: close\r\n{headers}Content-Length: {length}\r\n\r\n{body}"
    )
}

fn revision() -> String {
    reply("200 OK", "", r#"{"sha":"c0ffee","siblings":[{"rfilename":"config.json","size":10}]}"#)
}

fn open(endpoint: &str) -> Result<Store, Error> {
    let environment = Environment::from_pairs([
        ("HF_ENDPOINT", endpoint),
        ("FINETUNE_MODEL_HF_TOKEN", "hf_secret"),
        ("FINETUNE_STORE_RETRIES", "3"),
    ]);
    Store::open(&uri("hf://o/n"), None, Role::Model, &environment)
}

fn refusal(status: &'static str, code: &'static str) -> String {
    let endpoint = serve(move |_| reply(status, &format!("X-Error-Code: {code}\r\n"), ""));
    open(&endpoint).unwrap_err().to_string().replace(&endpoint, "HUB")
}

#[test]
fn a_repository_may_be_named_with_its_kind() {
    let asked = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&asked);
    let endpoint = serve(move |head| {
        seen.lock().unwrap().push(head[0].clone());
        revision()
    });
    let environment = Environment::from_pairs([("HF_ENDPOINT", endpoint.as_str())]);
    let open = |text: &str, role| Store::open(&uri(text), None, role, &environment);
    open("hf://datasets/o/n/train.jsonl", Role::Dataset).unwrap();
    open("hf://o/n/train.jsonl", Role::Dataset).unwrap();
    open("hf://models/o/n", Role::Model).unwrap();
    open("hf://datasets/n", Role::Model).unwrap();
    insta::assert_snapshot!(asked.lock().unwrap().join("\n"), @"
    GET /api/datasets/o/n/revision/main?blobs=true HTTP/1.1
    GET /api/datasets/o/n/revision/main?blobs=true HTTP/1.1
    GET /api/models/o/n/revision/main?blobs=true HTTP/1.1
    GET /api/models/datasets/n/revision/main?blobs=true HTTP/1.1
    ");
    let refused = open("hf://datasets/o/n", Role::Model).unwrap_err().to_string();
    insta::assert_snapshot!(refused, @"cannot open hf://datasets/o/n: it is a repository of datasets, but one of models is required; use hf://OWNER/NAME or hf://models/OWNER/NAME");
}

#[test]
fn says_gated_missing_repository_and_missing_revision_apart() {
    insta::assert_snapshot!(refusal("403 Forbidden", "GatedRepo"), @"cannot open hf://o/n: the repository is gated; accept its terms on the hub with the account of the token (asked HUB/api/models/o/n/revision/main?blobs=true with the token of FINETUNE_MODEL_HF_TOKEN)");
    insta::assert_snapshot!(refusal("401 Unauthorized", "RepoNotFound"), @"cannot open hf://o/n: the repository does not exist, or is private and the token has no access to it (asked HUB/api/models/o/n/revision/main?blobs=true with the token of FINETUNE_MODEL_HF_TOKEN)");
    insta::assert_snapshot!(refusal("404 Not Found", "RevisionNotFound"), @r#"cannot open hf://o/n: the repository has no revision "main" (asked HUB/api/models/o/n/revision/main?blobs=true with the token of FINETUNE_MODEL_HF_TOKEN)"#);
}

/// A hub whose file is redirected to a second host that breaks off and is busy at first.
fn fetch(sha256: &str) -> (Result<String, Error>, Vec<String>) {
    let requests = Arc::new(Mutex::new(Vec::<String>::new()));
    let seen = Arc::clone(&requests);
    let storage = serve(move |head| {
        let mut seen = seen.lock().unwrap();
        seen.push(head.join("\n").to_ascii_lowercase());
        match seen.len() {
            1 => reply("503 Service Unavailable", "Retry-After: 0\r\n", ""),
            2 => "HTTP/1.1 206 Partial\r\nConnection: close\r\nContent-Length: 10\r\n\r\n0123"
                .to_owned(),
            _ => reply("206 Partial", "", "456789"),
        }
    });
    let etag = sha256.to_owned();
    let endpoint = serve(move |head| {
        assert!(head.iter().any(|line| line == "authorization: Bearer hf_secret"), "{head:?}");
        if head[0].contains("/api/") {
            return revision();
        }
        assert!(head[0].contains("/o/n/resolve/c0ffee/config.json"), "{head:?}");
        let headers =
            format!("X-Linked-Size: 10\r\nX-Linked-ETag: \"{etag}\"\r\nLocation: {storage}/f\r\n");
        reply("302 Found", &headers, "")
    });
    let store = open(&endpoint).unwrap();
    assert_eq!(store.resolved_revision(), Some("c0ffee"));
    let directory = tempfile::tempdir().unwrap();
    let to = directory.path().join("config.json");
    let outcome = store.fetch("config.json", &to).map(|()| std::fs::read_to_string(&to).unwrap());
    assert!(outcome.is_ok() || !to.exists());
    let requests = requests.lock().unwrap().clone();
    (outcome, requests)
}

#[test]
fn a_busy_host_and_a_broken_transfer_are_overcome_and_the_token_stays_at_the_hub() {
    let sha256 = "84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882";
    let (outcome, requests) = fetch(sha256);
    assert_eq!(outcome.unwrap(), "0123456789");
    assert!(requests.iter().all(|head| !head.contains("hf_secret")), "{requests:?}");
    assert!(requests[2].contains("range: bytes=4-9"), "{requests:?}");
}

#[test]
fn wrong_bytes_are_refused() {
    let (outcome, _) = fetch(&"0".repeat(64));
    assert!(matches!(outcome, Err(Error::Damaged { .. })));
}
