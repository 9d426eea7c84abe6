//! Reads a repository of a Hugging Face hub over its HTTP API.
//!
//! This is a separate thin client because libraries hide what matters here: the token must not follow a
//! redirect to another host, errors must name the credential that was used, an interrupted transfer must
//! resume by range, and tests must be able to use a loopback server.

use std::{collections::BTreeMap, ops::Range, time::Duration};

use bytes::Bytes;
use finetune_contract::ObjectUri;
use reqwest::{
    Client, Method, Response, StatusCode, Url,
    header::{AUTHORIZATION, CONTENT_LENGTH, ETAG, LOCATION, RANGE, RETRY_AFTER},
    redirect::Policy,
};
use serde::Deserialize;

use crate::{
    failure::chain,
    store::{Entry, Environment, Error, Role, Stat, objects, runtime::block_on},
};

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";
const MAX_REDIRECTS: u32 = 5;
const MAX_WAIT: Duration = Duration::from_secs(30);

/// A repository pinned to one commit.
#[derive(Debug)]
pub struct Repository {
    connection: Connection,
    uri: ObjectUri,
    kind: &'static str,
    commit: String,
    files: BTreeMap<String, Option<u64>>,
}

/// The client of a hub.
struct Connection {
    client: Client,
    endpoint: Url,
    token: Option<String>,
    /// The origin of the token, for messages.
    credential: String,
    retries: usize,
}

impl std::fmt::Debug for Connection {
    /// Omits the token.
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Connection")
            .field("endpoint", &self.endpoint.as_str())
            .finish_non_exhaustive()
    }
}

#[derive(Deserialize)]
struct Revision {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
}

impl Repository {
    /// Resolves the revision (`main` if absent) to a commit and its files.
    ///
    /// For the role [`Role::Dataset`] the repository is a dataset repository, otherwise a model repository.
    ///
    /// # Errors
    /// [`Error`] if the hub cannot be reached, denies access, or has no such repository or revision.
    pub fn open(
        uri: &ObjectUri,
        revision: Option<&str>,
        role: Role,
        environment: &Environment,
    ) -> Result<Self, Error> {
        let connection = Connection::new(uri, role, environment)?;
        let (expected, kind) = match role {
            Role::Dataset => ("datasets", "datasets/"),
            Role::Model | Role::Adapter | Role::Checkpoint | Role::Output => ("models", ""),
        };
        let (named, repository) = uri.hub_repository();
        if let Some(named) = named.filter(|named| *named != expected) {
            let detail = format!(
                "it is a repository of {named}, but one of {expected} is required; use hf://OWNER/NAME or hf://{expected}/OWNER/NAME"
            );
            return Err(Error::Misconfigured { action: "open", uri: uri.to_string(), detail });
        }
        let api = format!("api/{expected}");
        let revision = revision.unwrap_or("main");
        let mut url = connection.url(&format!("{api}/{repository}/revision"));
        push_segments(&mut url, [revision]);
        url.set_query(Some("blobs=true"));
        let what = format!("revision {revision:?}");
        let found: Revision = block_on(async {
            let response =
                connection.send(uri, "open", &what, Method::GET, url.clone(), None).await?;
            response.json().await.map_err(|error| unavailable("open", uri, &url, &error))
        })?;
        let files = found.siblings.into_iter().map(|file| (file.rfilename, file.size)).collect();
        Ok(Self { connection, uri: uri.clone(), kind, commit: found.sha, files })
    }

    /// Returns the commit.
    pub fn commit(&self) -> &str {
        &self.commit
    }

    pub(super) async fn list(&self) -> Result<Vec<(Entry, Option<String>)>, Error> {
        let mut entries = Vec::new();
        for (name, size) in &self.files {
            let Some(path) = below(name, &self.uri.path) else { continue };
            let size = match size {
                Some(size) => *size,
                None => self.stat(path).await?.map_or(0, |stat| stat.size),
            };
            entries.push((Entry { path: path.to_owned(), size }, None));
        }
        Ok(entries)
    }

    pub(super) async fn stat(&self, path: &str) -> Result<Option<Stat>, Error> {
        let name = self.file(path);
        if !self.files.contains_key(&name) {
            return Ok(None);
        }
        let url = self.resolve(&name);
        let response = self.connection.head(&self.uri, &name, url.clone()).await?;
        let text = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
        let size = text("x-linked-size").or_else(|| text(CONTENT_LENGTH.as_str()));
        let Some(size) = size.and_then(|size| size.parse().ok()) else {
            let detail = format!("{url} announces no size");
            return Err(Error::Unavailable {
                action: "look up",
                uri: self.uri.to_string(),
                detail,
            });
        };
        let tag = text("x-linked-etag").or_else(|| text(ETAG.as_str()));
        let tag = tag.map(|tag| tag.trim_start_matches("W/").trim_matches('"').to_owned());
        // An LFS file's tag is its SHA-256; a git blob's is a SHA-1 of something else.
        let sha256 = tag.clone().filter(|tag| tag.len() == 64);
        Ok(Some(Stat { size, tag, sha256 }))
    }

    /// Reads a range; resumes an interrupted transfer after the received bytes.
    pub(super) async fn read_range(&self, path: &str, range: Range<u64>) -> Result<Bytes, Error> {
        let name = self.file(path);
        let url = self.resolve(&name);
        let mut received = Vec::new();
        let mut failures = 0;
        loop {
            let start = range.start + received.len() as u64;
            if start >= range.end {
                return Ok(received.into());
            }
            let wanted = format!("bytes={start}-{}", range.end - 1);
            let mut response = self
                .connection
                .send(&self.uri, "read", &name, Method::GET, url.clone(), Some(&wanted))
                .await?;
            // A server that ignores the range sends the whole file.
            let mut skip = if response.status() == StatusCode::PARTIAL_CONTENT { 0 } else { start };
            let before = received.len();
            let broken = loop {
                match response.chunk().await {
                    Ok(None) => break None,
                    Err(error) => break Some(error),
                    Ok(Some(chunk)) => {
                        let skipped = skip.min(chunk.len() as u64);
                        skip -= skipped;
                        received.extend_from_slice(&chunk[skipped as usize..]);
                    }
                }
                if received.len() as u64 >= range.end - range.start {
                    break None;
                }
            };
            received.truncate((range.end - range.start) as usize);
            match broken {
                None if received.len() == before => return Ok(received.into()),
                None => {}
                Some(error) if failures >= self.connection.retries => {
                    return Err(unavailable("read", &self.uri, &url, &error));
                }
                Some(_) => {
                    failures += 1;
                    tokio::time::sleep(backoff(failures)).await;
                }
            }
        }
    }

    fn file(&self, path: &str) -> String {
        match (self.uri.path.as_str(), path) {
            ("", path) => path.to_owned(),
            (root, "") => root.to_owned(),
            (root, path) => format!("{root}/{path}"),
        }
    }

    fn resolve(&self, name: &str) -> Url {
        let (_, repository) = self.uri.hub_repository();
        let path = format!("{}{repository}/resolve/{}", self.kind, self.commit);
        let mut url = self.connection.url(&path);
        push_segments(&mut url, name.split('/'));
        url
    }
}

impl Connection {
    fn new(uri: &ObjectUri, role: Role, environment: &Environment) -> Result<Self, Error> {
        let misconfigured =
            |detail: String| Error::Misconfigured { action: "open", uri: uri.to_string(), detail };
        let (variable, text) = environment
            .named(role, "HF_ENDPOINT")
            .unwrap_or_else(|| ("HF_ENDPOINT".to_owned(), DEFAULT_ENDPOINT));
        let endpoint = Url::parse(text.trim_end_matches('/'))
            .ok()
            .filter(|url| url.host().is_some() && matches!(url.scheme(), "http" | "https"))
            .ok_or_else(|| {
                misconfigured(format!(
                    "{variable} is {text:?}; use a URL such as {DEFAULT_ENDPOINT}"
                ))
            })?;
        let token = environment.named(role, "HF_TOKEN");
        let credential = token.as_ref().map_or_else(
            || format!("without a token ({}HF_TOKEN and HF_TOKEN are not set)", role.prefix()),
            |(variable, _)| format!("with the token of {variable}"),
        );
        let client = Client::builder()
            .redirect(Policy::none())
            .connect_timeout(Duration::from_secs(10))
            .read_timeout(Duration::from_secs(30))
            .user_agent(concat!("finetune-trainer/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| misconfigured(chain(&error)))?;
        Ok(Self {
            client,
            endpoint,
            token: token.map(|(_, token)| token.to_owned()),
            credential,
            retries: objects::retries(environment),
        })
    }

    fn url(&self, path: &str) -> Url {
        let mut url = self.endpoint.clone();
        push_segments(&mut url, path.split('/'));
        url
    }

    /// Requests the headers of a file. A redirect to its storage already has them.
    async fn head(&self, uri: &ObjectUri, what: &str, url: Url) -> Result<Response, Error> {
        self.send(uri, "look up", what, Method::HEAD, url, None).await
    }

    /// Sends a request with bounded retries and redirects, and converts error responses.
    async fn send(
        &self,
        uri: &ObjectUri,
        action: &'static str,
        what: &str,
        method: Method,
        first: Url,
        range: Option<&str>,
    ) -> Result<Response, Error> {
        let mut url = first.clone();
        let (mut failures, mut redirects) = (0, 0);
        loop {
            let mut request = self
                .client
                .request(method.clone(), url.clone())
                .header("accept-encoding", "identity");
            if let Some(token) =
                self.token.as_ref().filter(|_| url.origin() == self.endpoint.origin())
            {
                request = request.header(AUTHORIZATION, format!("Bearer {token}"));
            }
            if let Some(range) = range {
                request = request.header(RANGE, range);
            }
            let wait = match request.send().await {
                Err(error) if failures >= self.retries => {
                    return Err(unavailable(action, uri, &first, &error));
                }
                Err(_) => backoff(failures + 1),
                Ok(response) if response.status().is_success() => return Ok(response),
                Ok(response) if response.status().is_redirection() => {
                    let next = response
                        .headers()
                        .get(LOCATION)
                        .and_then(|location| location.to_str().ok())
                        .and_then(|location| url.join(location).ok());
                    let leaves = next.as_ref().is_some_and(|next| next.origin() != url.origin());
                    if method == Method::HEAD && leaves {
                        return Ok(response);
                    }
                    redirects += 1;
                    match next {
                        Some(next) if redirects <= MAX_REDIRECTS => url = next,
                        _ => {
                            let detail =
                                format!("{first} redirects without a target, or too many times");
                            return Err(Error::Unavailable {
                                action,
                                uri: uri.to_string(),
                                detail,
                            });
                        }
                    }
                    continue;
                }
                Ok(response) if is_temporary(response.status()) && failures < self.retries => {
                    let asked = response.headers().get(RETRY_AFTER);
                    asked
                        .and_then(|value| value.to_str().ok()?.parse().ok())
                        .map_or_else(|| backoff(failures + 1), Duration::from_secs)
                        .min(MAX_WAIT)
                }
                Ok(response) => {
                    return Err(self.response_error(uri, action, what, &first, &response));
                }
            };
            failures += 1;
            tokio::time::sleep(wait).await;
        }
    }

    /// Converts an error response. The hub hides private repositories behind 401, but has error codes.
    fn response_error(
        &self,
        uri: &ObjectUri,
        action: &'static str,
        what: &str,
        url: &Url,
        response: &Response,
    ) -> Error {
        let code = response.headers().get("x-error-code").and_then(|code| code.to_str().ok());
        let (uri, credential, status) = (uri.to_string(), &self.credential, response.status());
        match (status, code.unwrap_or_default()) {
            (_, "GatedRepo") => {
                let detail = format!(
                    "the repository is gated; accept its terms on the hub with the account of the token (asked {url} {credential})"
                );
                Error::PermissionDenied { action, uri, detail }
            }
            (_, "RevisionNotFound") => {
                let detail = format!("the repository has no {what} (asked {url} {credential})");
                Error::NotFound { action, uri, detail }
            }
            (_, "EntryNotFound") => {
                let detail =
                    format!("the repository has no file {what:?} (asked {url} {credential})");
                Error::NotFound { action, uri, detail }
            }
            (StatusCode::UNAUTHORIZED | StatusCode::NOT_FOUND, "RepoNotFound")
            | (StatusCode::NOT_FOUND, _) => {
                let detail = format!(
                    "the repository does not exist, or is private and the token has no access to it (asked {url} {credential})"
                );
                Error::NotFound { action, uri, detail }
            }
            (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN, _) => {
                let detail = format!(
                    "the hub responds {status}; check the token and its permissions (asked {url} {credential})"
                );
                Error::PermissionDenied { action, uri, detail }
            }
            _ => {
                let detail = format!("the hub responds {status} (asked {url} {credential})");
                Error::Unavailable { action, uri, detail }
            }
        }
    }
}

fn is_temporary(status: StatusCode) -> bool {
    status.is_server_error()
        || matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT)
}

fn backoff(failures: usize) -> Duration {
    Duration::from_millis(200 << failures.saturating_sub(1).min(6))
}

fn unavailable(action: &'static str, uri: &ObjectUri, url: &Url, error: &reqwest::Error) -> Error {
    // `Display` would repeat the URL, and a redirect leads to a URL with a signature.
    let mut causes = Vec::new();
    let mut next = std::error::Error::source(error);
    while let Some(cause) = next {
        causes.push(cause.to_string());
        next = cause.source();
    }
    let detail = format!("the hub cannot be reached at {url}: {}", causes.join(": "));
    Error::Unavailable { action, uri: uri.to_string(), detail }
}

/// Appends path segments, escaped, so that a revision such as `refs/pr/1` is one segment.
fn push_segments<'a>(url: &mut Url, segments: impl IntoIterator<Item = &'a str>) {
    url.path_segments_mut()
        .expect("the endpoint was checked to be http or https with a host")
        .pop_if_empty()
        .extend(segments);
}

/// Returns `name` relative to `root`; `None` if it is not below.
fn below<'a>(name: &'a str, root: &str) -> Option<&'a str> {
    if root.is_empty() {
        return Some(name);
    }
    let rest = name.strip_prefix(root)?;
    if rest.is_empty() { Some("") } else { rest.strip_prefix('/') }
}
