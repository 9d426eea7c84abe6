//! What can go wrong with a store, sorted once for code and told once for people.

use std::path::PathBuf;

use finetune_contract::{FailureReason, ProblemReason};

use crate::failure::{Failure, chain};

/// Why a store did not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Nothing is there.
    #[error("{uri} does not exist")]
    NotFound {
        /// The object.
        uri: String,
    },
    /// The credentials are missing, wrong, or not enough.
    #[error("{uri}: access denied ({detail}); {hint}")]
    PermissionDenied {
        /// The object.
        uri: String,
        /// What the store said.
        detail: String,
        /// Which credential was used and what to set.
        hint: String,
    },
    /// The store does not answer, or answers that it cannot.
    #[error("{uri}: the store does not answer ({detail})")]
    Unavailable {
        /// The object.
        uri: String,
        /// What happened.
        detail: String,
    },
    /// The store cannot be used at all as it is configured.
    #[error("{uri}: {detail}")]
    Misconfigured {
        /// The URI.
        uri: String,
        /// What is wrong and how to mend it.
        detail: String,
    },
    /// What arrived is not what is stored.
    #[error("{uri} arrived damaged: {detail}")]
    Damaged {
        /// The object.
        uri: String,
        /// How it differs.
        detail: String,
    },
    /// The output holds the result of another run.
    #[error(
        "{uri} holds the result of run {other}: choose another output.uri, or set output.overwrite to true to replace it"
    )]
    OutputExists {
        /// The output.
        uri: String,
        /// Whose it is.
        other: String,
    },
    /// A local file cannot be read or written.
    #[error("{path:?}: {detail}")]
    Local {
        /// The file.
        path: PathBuf,
        /// What the system said.
        detail: String,
        /// Whether the disk is full.
        is_full: bool,
    },
}

impl Error {
    /// Returns the reason a run fails with.
    pub const fn reason(&self) -> FailureReason {
        match self {
            Self::NotFound { .. } | Self::Misconfigured { .. } => {
                FailureReason::InvalidConfiguration
            }
            Self::PermissionDenied { .. } => FailureReason::PermissionDenied,
            Self::Unavailable { .. } | Self::Damaged { .. } => FailureReason::StoreUnavailable,
            Self::OutputExists { .. } => FailureReason::OutputExists,
            Self::Local { is_full: true, .. } => FailureReason::DiskFull,
            Self::Local { is_full: false, .. } => FailureReason::Internal,
        }
    }

    /// Returns the kind of problem a preflight reports.
    pub const fn problem_reason(&self) -> ProblemReason {
        match self {
            Self::NotFound { .. } => ProblemReason::NotFound,
            Self::PermissionDenied { .. } => ProblemReason::PermissionDenied,
            Self::Unavailable { .. } | Self::Damaged { .. } | Self::Local { .. } => {
                ProblemReason::Unavailable
            }
            Self::Misconfigured { .. } => ProblemReason::InvalidSpec,
            Self::OutputExists { .. } => ProblemReason::OutputExists,
        }
    }

    /// Makes the error of a local file operation.
    pub fn local(path: impl Into<PathBuf>, error: &std::io::Error) -> Self {
        let is_full = matches!(
            error.kind(),
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded
        );
        Self::Local { path: path.into(), detail: error.to_string(), is_full }
    }

    /// Sorts an error of the object store library.
    pub(super) fn from_object_store(error: &object_store::Error, uri: String, hint: &str) -> Self {
        use object_store::Error as Source;
        if let Some(io) = local_cause(error) {
            return match io.kind() {
                std::io::ErrorKind::NotFound => Self::NotFound { uri },
                std::io::ErrorKind::PermissionDenied => Self::PermissionDenied {
                    uri,
                    detail: io.to_string(),
                    hint: "give the user this runs as access to the path".to_owned(),
                },
                _ => Self::local(uri, io),
            };
        }
        let detail = short(&chain(error));
        match error {
            Source::NotFound { .. } => Self::NotFound { uri },
            Source::PermissionDenied { .. } | Source::Unauthenticated { .. } => {
                Self::PermissionDenied { uri, detail, hint: hint.to_owned() }
            }
            Source::Generic { .. }
            | Source::JoinError { .. }
            | Source::Precondition { .. }
            | Source::AlreadyExists { .. }
            | Source::NotModified { .. } => Self::Unavailable { uri, detail },
            _ => Self::Misconfigured { uri, detail },
        }
    }
}

/// Finds the operating system's error below a library's, unless it is one of the network.
fn local_cause<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a std::io::Error> {
    let mut cause = Some(error);
    let mut found = None;
    while let Some(error) = cause {
        if error.is::<reqwest::Error>() {
            return None;
        }
        if let Some(io) = error.downcast_ref::<std::io::Error>() {
            found = io.raw_os_error().map(|_| io);
        }
        cause = error.source();
    }
    found
}

/// Cuts what a server said to one readable line.
pub(super) fn short(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if line.chars().count() <= 300 { line } else { line.chars().take(299).chain(['…']).collect() }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::new(error.reason(), error.to_string())
    }
}
