//! The one error type that crosses module borders of the trainer: a reason for code, a text for people.

use finetune_contract::{ExitCode, FailureReason};

/// Why a run, preflight or verification cannot go on.
///
/// Modules have error enums of their own and convert them here at their public functions, where
/// the reason is decided once.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// The kind; decides the exit code and whether the operator tries again.
    pub reason: FailureReason,
    /// What happened, to which object, and what to do.
    pub message: String,
}

impl Failure {
    /// Makes a failure.
    pub fn new(reason: FailureReason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into() }
    }

    /// Makes a failure from an error and everything that caused it, joined by `: `.
    pub fn from_chain(reason: FailureReason, error: &(dyn std::error::Error + 'static)) -> Self {
        Self { reason, message: chain(error) }
    }

    /// Returns the process exit status.
    pub const fn exit_code(&self) -> ExitCode {
        self.reason.exit_code()
    }
}

/// Renders an error and everything that caused it, joined by `: `.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Some libraries repeat their source in their own message.
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

impl Failure {
    /// Makes a failure of a local file operation: a full disk is its own reason.
    pub fn from_io(error: &std::io::Error, doing: &str) -> Self {
        let reason = match error.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                FailureReason::DiskFull
            }
            std::io::ErrorKind::PermissionDenied => FailureReason::PermissionDenied,
            _ => FailureReason::Internal,
        };
        Self::new(reason, format!("{doing}: {error}"))
    }
}
