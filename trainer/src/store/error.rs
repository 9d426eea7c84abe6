//! The errors of a store: messages for people, and a table of reasons for code.

use std::{error, io, path::Path};

use finetune_contract::{FailureReason, ProblemReason};

use crate::failure::{Failure, chain};

/// Why a request to a store failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An object, file, repository or revision does not exist.
    #[error("cannot {action} {uri}: {detail}")]
    NotFound {
        /// The action that failed.
        action: &'static str,
        /// The object.
        uri: String,
        /// What does not exist, and what to check.
        detail: String,
    },
    /// The credentials are missing or wrong, or do not permit the action.
    #[error("cannot {action} {uri}: {detail}")]
    PermissionDenied {
        /// The action that failed.
        action: &'static str,
        /// The object.
        uri: String,
        /// The response of the server, and what to check.
        detail: String,
    },
    /// The store does not respond, or responds with a temporary error.
    #[error("cannot {action} {uri}: {detail}")]
    Unavailable {
        /// The action that failed.
        action: &'static str,
        /// The object.
        uri: String,
        /// What happened.
        detail: String,
    },
    /// An option or URI is invalid, or the response of the store is unusable.
    #[error("cannot {action} {uri}: {detail}")]
    Misconfigured {
        /// The action that failed.
        action: &'static str,
        /// The object.
        uri: String,
        /// What is wrong, and what to use instead.
        detail: String,
    },
    /// The bytes do not match their announced size or digest.
    #[error("{uri} is damaged: {detail}")]
    Damaged {
        /// The object.
        uri: String,
        /// The expected and the actual value.
        detail: String,
    },
    /// The local disk is full.
    #[error("cannot write {path}: the disk is full; free space or choose another directory")]
    DiskFull {
        /// The file.
        path: String,
    },
    /// An operation of the local file system failed.
    #[error("cannot {action} {path}: {source}")]
    Local {
        /// The action that failed.
        action: &'static str,
        /// The file.
        path: String,
        /// The error of the system.
        #[source]
        source: io::Error,
    },
    /// The output contains a result of different inputs.
    #[error(
        "{uri} already contains {contents}: choose another output.uri, or set output.overwrite: true to replace it"
    )]
    OutputExists {
        /// The output.
        uri: String,
        /// What it contains, and how that differs.
        contents: String,
    },
}

impl Error {
    /// Returns the reason for the failure of a run.
    pub fn reason(&self) -> FailureReason {
        self.reasons().0
    }

    /// Returns the reason for a problem of a preflight.
    pub fn problem_reason(&self) -> ProblemReason {
        self.reasons().1
    }

    /// The table of both reasons.
    fn reasons(&self) -> (FailureReason, ProblemReason) {
        match self {
            Self::NotFound { .. } => (FailureReason::InvalidConfiguration, ProblemReason::NotFound),
            Self::PermissionDenied { .. } => {
                (FailureReason::PermissionDenied, ProblemReason::PermissionDenied)
            }
            Self::Unavailable { .. } | Self::Damaged { .. } => {
                (FailureReason::StoreUnavailable, ProblemReason::Unavailable)
            }
            Self::Misconfigured { .. } => {
                (FailureReason::InvalidConfiguration, ProblemReason::InvalidSpec)
            }
            Self::DiskFull { .. } => (FailureReason::DiskFull, ProblemReason::Unavailable),
            Self::Local { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                (FailureReason::PermissionDenied, ProblemReason::PermissionDenied)
            }
            Self::Local { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                (FailureReason::InvalidConfiguration, ProblemReason::NotFound)
            }
            Self::Local { source, .. }
                if matches!(
                    source.kind(),
                    io::ErrorKind::NotADirectory | io::ErrorKind::IsADirectory
                ) =>
            {
                (FailureReason::InvalidConfiguration, ProblemReason::InvalidSpec)
            }
            Self::Local { .. } => (FailureReason::StoreUnavailable, ProblemReason::Unavailable),
            Self::OutputExists { .. } => (FailureReason::OutputExists, ProblemReason::OutputExists),
        }
    }

    /// Creates an error of the local file system.
    pub(super) fn local(action: &'static str, path: &Path, source: io::Error) -> Self {
        let path = path.display().to_string();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::DiskFull { path },
            _ => Self::Local { action, path, source },
        }
    }

    /// Converts an error of object_store, using its kind, the error code of the server and the error of
    /// the system.
    pub(super) fn object(action: &'static str, uri: String, error: object_store::Error) -> Self {
        if let Some(kind) = io_kind(&error) {
            match kind {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                    return Self::DiskFull { path: uri };
                }
                io::ErrorKind::NotADirectory => {
                    let detail =
                        "a part of its path is a file instead of a directory; correct the URI"
                            .to_owned();
                    return Self::Misconfigured { action, uri, detail };
                }
                io::ErrorKind::PermissionDenied => {
                    let detail = "permission denied by the file system: check the owner and mode of the file and its directories".to_owned();
                    return Self::PermissionDenied { action, uri, detail };
                }
                _ => {}
            }
        }
        let text = chain(&error);
        let code = between(&text, "<Code>", "</Code>");
        let response = code.map_or_else(String::new, |code| {
            let message = between(&text, "<Message>", "</Message>").unwrap_or_default();
            format!(" ({code}: {message})")
        });
        let status = between(&text, "status code: ", " ").unwrap_or_default();
        if code == Some("NoSuchBucket") {
            let detail =
                format!("the bucket does not exist{response}; create it or correct the URI");
            return Self::NotFound { action, uri, detail };
        }
        if text.contains("incorrectly configured region") || code == Some("PermanentRedirect") {
            let detail =
                "the bucket is in another region: set AWS_REGION to the bucket's region".to_owned();
            return Self::Misconfigured { action, uri, detail };
        }
        if code == Some("AuthorizationHeaderMalformed") {
            let detail = format!(
                "the request is signed for the wrong region{response}: set AWS_REGION to the bucket's region"
            );
            return Self::Misconfigured { action, uri, detail };
        }
        match error {
            object_store::Error::NotFound { .. } => {
                let detail = "nothing is there; check the URI".to_owned();
                Self::NotFound { action, uri, detail }
            }
            _ if status == "401" || status == "403" => {
                let detail = format!(
                    "the store denies access{response}: check the credentials of the Secret or environment and their permissions"
                );
                Self::PermissionDenied { action, uri, detail }
            }
            object_store::Error::PermissionDenied { .. }
            | object_store::Error::Unauthenticated { .. } => {
                let detail = format!(
                    "the store denies access{response}: check the credentials of the Secret or environment and their permissions"
                );
                Self::PermissionDenied { action, uri, detail }
            }
            object_store::Error::UnknownConfigurationKey { .. }
            | object_store::Error::NotSupported { .. }
            | object_store::Error::NotImplemented { .. }
            | object_store::Error::InvalidPath { .. } => {
                Self::Misconfigured { action, uri, detail: text }
            }
            _ => {
                let detail = no_connection(&text).unwrap_or(text);
                Self::Unavailable { action, uri, detail }
            }
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::new(error.reason(), error.to_string())
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        Self::other(error)
    }
}

/// Finds the error of the system among the causes of an error.
fn io_kind(error: &(dyn error::Error + 'static)) -> Option<io::ErrorKind> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return Some(io.kind());
        }
        next = error.source();
    }
    None
}

/// Returns the text between two delimiters.
fn between<'a>(text: &'a str, start: &str, end: &str) -> Option<&'a str> {
    let rest = text.split_once(start)?.1;
    Some(rest.split_once(end)?.0)
}

/// Extracts from an error text which server could not be connected to, and why.
fn no_connection(text: &str) -> Option<String> {
    let why = text.split_once("client error (Connect): ")?.1;
    let request = between(text, "Error performing ", " in ")?;
    let url = request.split_once(' ').map_or(request, |(_, url)| url);
    Some(format!("no connection for {url}: {why}; check the endpoint and the network"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENOSPC: i32 = 28;
    const EDQUOT: i32 = 122;

    #[test]
    fn a_full_disk_is_distinguished_from_an_unavailable_store() {
        for code in [ENOSPC, EDQUOT] {
            let full = || io::Error::from_raw_os_error(code);
            let in_library =
                object_store::Error::Generic { store: "LocalFileSystem", source: full().into() };
            let errors = [
                Error::local("write", Path::new("/out/a"), full()),
                Error::object("write", "file:///out/a".to_owned(), in_library),
            ];
            for error in errors {
                assert_eq!(error.reason(), FailureReason::DiskFull, "{error}");
                let text = error.to_string().replace("file://", "");
                insta::allow_duplicates! {
                    insta::assert_snapshot!(text, @"cannot write /out/a: the disk is full; free space or choose another directory");
                }
            }
        }
    }
}
