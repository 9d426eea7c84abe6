//! A Hugging Face hub over its HTTP API: one commit's file list, then ranges of its files.
//!
//! Our own thin client: of the public API two calls are needed, and preflight must read the first
//! bytes of weight files, tell a gated repository from a missing one, and never send the token to
//! the host a download is redirected to. `reqwest` drops the `Authorization` header when a redirect
//! leaves the host; a test proves it.
//!
//! # Source
//! `GET /api/models/{repo}/revision/{revision}?blobs=true` and `GET /{repo}/resolve/{commit}/{path}`,
//! with the error codes of `huggingface_hub/errors.py` in the header `X-Error-Code`.

use std::{ops::Range, sync::Arc, time::Duration};

use bytes::Bytes;
use finetune_contract::ObjectUri;
use reqwest::{Client, Response, StatusCode, header};
use serde::Deserialize;

use super::{Entry, Environment, Error, Role, error::short};
use crate::failure::chain;

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";
/// Requests for the same thing, at most.
const ATTEMPTS: u32 = 6;

/// One commit of a repository.
#[derive(Clone)]
pub(super) struct Hub {
    client: Client,
    endpoint: String,
    repository: String,
    /// The path below the repository that the URI names.
    below: String,
    token: Option<Arc<str>>,
    commit: String,
    files: Arc<[RepositoryFile]>,
    first_pause: Duration,
}

impl std::fmt::Debug for Hub {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Hub")
            .field("repository", &self.repository)
            .field("commit", &self.commit)
            .finish_non_exhaustive()
    }
}

#[derive(Debug, Deserialize)]
struct Revision {
    sha: String,
    siblings: Vec<RepositoryFile>,
}

#[derive(Debug, Clone, Deserialize)]
struct RepositoryFile {
    rfilename: String,
    size: Option<u64>,
    lfs: Option<LargeFile>,
}

#[derive(Debug, Clone, Deserialize)]
struct LargeFile {
    sha256: Option<String>,
}

impl Hub {
    pub(super) async fn open(
        uri: &ObjectUri,
        revision: Option<&str>,
        role: Role,
        environment: &Environment,
    ) -> Result<Self, Error> {
        let misconfigured = |detail: String| Error::Misconfigured { uri: uri.to_string(), detail };
        let endpoint =
            environment.get(role, "HF_ENDPOINT").unwrap_or(DEFAULT_ENDPOINT).trim_end_matches('/');
        let client = Client::builder()
            .user_agent(concat!("finetune-operator/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(Duration::from_secs(10))
            .read_timeout(Duration::from_secs(60))
            .build()
            .map_err(|error| misconfigured(chain(&error)))?;
        let pause =
            environment.get(role, "FINETUNE_STORE_PAUSE_MS").and_then(|value| value.parse().ok());
        let mut hub = Self {
            client,
            endpoint: endpoint.to_owned(),
            repository: uri.authority.clone(),
            below: uri.path.clone(),
            token: environment.get(role, "HF_TOKEN").map(Arc::from),
            commit: String::new(),
            files: Arc::new([]),
            first_pause: Duration::from_millis(pause.unwrap_or(500)),
        };
        let revision = revision.unwrap_or("main");
        let url =
            format!("{endpoint}/api/models/{}/revision/{revision}?blobs=true", hub.repository);
        let body = hub.get(&url, None).await?;
        let found: Revision = serde_json::from_slice(&body).map_err(|error| {
            misconfigured(format!("{url} did not answer as a hub does: {error}"))
        })?;
        hub.commit = found.sha;
        hub.files = found.siblings.into();
        Ok(hub)
    }

    pub(super) fn commit(&self) -> &str {
        &self.commit
    }

    pub(super) fn list(&self) -> Vec<Entry> {
        let below = |file: &RepositoryFile| {
            let rest = file.rfilename.strip_prefix(&self.below)?;
            let path = if self.below.is_empty() || rest.is_empty() {
                rest
            } else {
                rest.strip_prefix('/')?
            };
            Some(Entry { path: path.to_owned(), size: file.size.unwrap_or(0) })
        };
        self.files.iter().filter_map(below).collect()
    }

    pub(super) fn size(&self, path: &str) -> Option<u64> {
        self.file(path)?.size
    }

    /// Returns the digest the hub keeps of a large file.
    pub(super) fn sha256(&self, path: &str) -> Option<&str> {
        self.file(path)?.lfs.as_ref()?.sha256.as_deref()
    }

    /// Returns where a file is downloaded from.
    pub(super) fn url(&self, path: &str) -> String {
        format!("{}/{}/resolve/{}/{}", self.endpoint, self.repository, self.commit, self.full(path))
    }

    pub(super) async fn read_range(&self, path: &str, range: Range<u64>) -> Result<Bytes, Error> {
        self.get(&self.url(path), Some(range)).await
    }

    fn file(&self, path: &str) -> Option<&RepositoryFile> {
        let full = self.full(path);
        self.files.iter().find(|file| file.rfilename == full)
    }

    fn full(&self, path: &str) -> String {
        match (self.below.as_str(), path) {
            ("", path) => path.to_owned(),
            (below, "") => below.to_owned(),
            (below, path) => format!("{below}/{path}"),
        }
    }

    /// Gets a body or a range of it, repeating what may pass: broken transfers, 429 and 5xx.
    async fn get(&self, url: &str, range: Option<Range<u64>>) -> Result<Bytes, Error> {
        let mut pause = self.first_pause;
        let mut attempt = 1;
        loop {
            let (error, asked_pause) = match self.try_get(url, range.clone()).await {
                Ok(bytes) => return Ok(bytes),
                Err(Refusal::Final(error)) => return Err(error),
                Err(Refusal::Passing { error, pause }) => (error, pause),
            };
            if attempt == ATTEMPTS {
                return Err(error);
            }
            tokio::time::sleep(asked_pause.unwrap_or(pause).min(Duration::from_secs(30))).await;
            pause *= 2;
            attempt += 1;
        }
    }

    async fn try_get(&self, url: &str, range: Option<Range<u64>>) -> Result<Bytes, Refusal> {
        let unavailable = |detail: String| Refusal::Passing {
            error: Error::Unavailable { uri: url.to_owned(), detail: short(&detail) },
            pause: None,
        };
        let mut request = self.client.get(url);
        if let Some(token) = &self.token {
            request = request.bearer_auth(token);
        }
        if let Some(range) = &range {
            request =
                request.header(header::RANGE, format!("bytes={}-{}", range.start, range.end - 1));
        }
        let response = request.send().await.map_err(|error| unavailable(chain(&error)))?;
        let status = response.status();
        if !status.is_success() {
            return Err(self.refusal(url, status, &response));
        }
        let mut body = response.bytes().await.map_err(|error| unavailable(chain(&error)))?;
        let Some(range) = range else { return Ok(body) };
        if status == StatusCode::OK && body.len() as u64 >= range.end {
            // The server does not know ranges and sent everything.
            body = body.slice(range.start as usize..range.end as usize);
        }
        let expected = range.end - range.start;
        if body.len() as u64 == expected {
            Ok(body)
        } else {
            Err(unavailable(format!("{} of {expected} bytes arrived", body.len())))
        }
    }

    fn refusal(&self, url: &str, status: StatusCode, response: &Response) -> Refusal {
        let header_text =
            |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
        let code = header_text("x-error-code").unwrap_or_default();
        let used = if self.token.is_some() {
            "the token in HF_TOKEN was used"
        } else {
            "no HF_TOKEN is set"
        };
        let page = format!("{}/{}", self.endpoint, self.repository);
        let denied = |hint: String| {
            Refusal::Final(Error::PermissionDenied {
                uri: url.to_owned(),
                detail: format!("{status}"),
                hint,
            })
        };
        let missing =
            |what: &str| Refusal::Final(Error::NotFound { uri: format!("{url} ({what}; {used})") });
        match (code, status.as_u16()) {
            ("GatedRepo", _) => denied(format!(
                "the repository is gated and {used}: accept its terms at {page} and set a token that may read it"
            )),
            ("RepoNotFound", _) => missing("no such repository, or a private one"),
            ("RevisionNotFound", _) => missing("no such revision"),
            ("EntryNotFound", _) => missing("no such file"),
            (_, 401 | 403) => denied(format!("{used}: set a token that may read {page}")),
            (_, 404 | 410) => missing("nothing is there"),
            (_, 429 | 500..=599 | 408) => Refusal::Passing {
                error: Error::Unavailable { uri: url.to_owned(), detail: status.to_string() },
                pause: header_text("retry-after")
                    .and_then(|text| text.parse().ok())
                    .map(Duration::from_secs),
            },
            _ => Refusal::Final(Error::Misconfigured {
                uri: url.to_owned(),
                detail: format!("the hub answered {status}"),
            }),
        }
    }
}

/// Why a request gave nothing.
enum Refusal {
    /// Asking again cannot help.
    Final(Error),
    /// Asking again may help, after a pause.
    Passing { error: Error, pause: Option<Duration> },
}
