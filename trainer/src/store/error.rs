//! What can go wrong with a store, as messages for people and one table of reasons for code.

use std::{error::Error as StdError, io, path::Path};

use finetune_contract::{FailureReason, ProblemReason};

use crate::failure::{Failure, chain};

/// Why a store could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No object, file, repository or revision is there.
    #[error("cannot {action} {uri}: {detail}")]
    NotFound {
        /// What we were doing.
        action: &'static str,
        /// To which object.
        uri: String,
        /// What is missing and what to check.
        detail: String,
    },
    /// The credentials are missing, wrong, or not allowed to do this.
    #[error("cannot {action} {uri}: {detail}")]
    PermissionDenied {
        /// What we were doing.
        action: &'static str,
        /// To which object.
        uri: String,
        /// What the server said and what to check.
        detail: String,
    },
    /// The store does not answer, or answers that it cannot now.
    #[error("cannot {action} {uri}: {detail}")]
    Unavailable {
        /// What we were doing.
        action: &'static str,
        /// To which object.
        uri: String,
        /// What happened.
        detail: String,
    },
    /// An option, scheme or answer with which the store cannot be used.
    #[error("cannot {action} {uri}: {detail}")]
    Misconfigured {
        /// What we were doing.
        action: &'static str,
        /// To which object.
        uri: String,
        /// What is wrong and what to write instead.
        detail: String,
    },
    /// Bytes are not those that were promised.
    #[error("{uri} is damaged: {detail}")]
    Damaged {
        /// The object.
        uri: String,
        /// Expected and found.
        detail: String,
    },
    /// The local disk is full.
    #[error("cannot write {path}: the disk is full; free space or choose another directory")]
    DiskFull {
        /// The file.
        path: String,
    },
    /// The local file system refuses.
    #[error("cannot {action} {path}: {source}")]
    Local {
        /// What we were doing.
        action: &'static str,
        /// The file.
        path: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The output holds a result that was not made from this run's inputs.
    #[error(
        "{uri} already holds {holds}: choose another output.uri, or set output.overwrite: true to replace it"
    )]
    OutputExists {
        /// The output.
        uri: String,
        /// What it holds, and how it differs.
        holds: String,
    },
}

impl Error {
    /// Returns the reason a run ends with.
    pub fn reason(&self) -> FailureReason {
        self.reasons().0
    }

    /// Returns the reason a preflight reports.
    pub fn problem_reason(&self) -> ProblemReason {
        self.reasons().1
    }

    /// The one table of both.
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

    /// Describes a failure of the local file system.
    pub(super) fn local(action: &'static str, path: &Path, source: io::Error) -> Self {
        let path = path.display().to_string();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::DiskFull { path },
            _ => Self::Local { action, path, source },
        }
    }

    /// Describes what object_store reports, from its kind, the server's code and the system's error.
    pub(super) fn object(action: &'static str, uri: String, error: object_store::Error) -> Self {
        if let Some(kind) = io_kind(&error) {
            match kind {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                    return Self::DiskFull { path: uri };
                }
                io::ErrorKind::NotADirectory => {
                    let detail =
                        "a part of its path is a file where a directory is needed; mend the URI"
                            .to_owned();
                    return Self::Misconfigured { action, uri, detail };
                }
                io::ErrorKind::PermissionDenied => {
                    let detail = "the file system refuses: check the owner and mode of the file and its directories".to_owned();
                    return Self::PermissionDenied { action, uri, detail };
                }
                _ => {}
            }
        }
        let text = chain(&error);
        let code = between(&text, "<Code>", "</Code>");
        let said = code.map_or_else(String::new, |code| {
            let message = between(&text, "<Message>", "</Message>").unwrap_or_default();
            format!(" ({code}: {message})")
        });
        let status = between(&text, "status code: ", " ").unwrap_or_default();
        if code == Some("NoSuchBucket") {
            let detail = format!("the bucket does not exist{said}; create it or mend the URI");
            return Self::NotFound { action, uri, detail };
        }
        if text.contains("incorrectly configured region") || code == Some("PermanentRedirect") {
            let detail =
                "the bucket lives in another region: set AWS_REGION to the bucket's region"
                    .to_owned();
            return Self::Misconfigured { action, uri, detail };
        }
        if code == Some("AuthorizationHeaderMalformed") {
            let detail = format!(
                "the request is signed for the wrong region{said}: set AWS_REGION to the bucket's region"
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
                    "the store refuses{said}: check the credentials of the Secret or environment and what they may do"
                );
                Self::PermissionDenied { action, uri, detail }
            }
            object_store::Error::PermissionDenied { .. }
            | object_store::Error::Unauthenticated { .. } => {
                let detail = format!(
                    "the store refuses{said}: check the credentials of the Secret or environment and what they may do"
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

/// Finds the system's error below a library's.
fn io_kind(error: &(dyn StdError + 'static)) -> Option<io::ErrorKind> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return Some(io.kind());
        }
        next = error.source();
    }
    None
}

/// Returns the text between two marks.
fn between<'a>(text: &'a str, start: &str, end: &str) -> Option<&'a str> {
    let rest = text.split_once(start)?.1;
    Some(rest.split_once(end)?.0)
}

/// Says to which server no connection could be made, and why; the rest of the text is noise.
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
    fn a_full_disk_is_told_from_an_unavailable_store() {
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
