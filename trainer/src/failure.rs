//! The error type that crosses module boundaries of the trainer: a reason for code, a message for
//! people.

use std::any::Any;

use finetune_contract::{ExitCode, FailureReason};

/// Why a run, preflight or verification failed.
///
/// Modules have error enums of their own and convert them at their public functions, which is where
/// the reason is decided.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// Decides the exit code and whether the operator retries.
    pub reason: FailureReason,
    /// What happened, to which object, and what to do.
    pub message: String,
}

impl Failure {
    /// Creates a failure.
    pub fn new(reason: FailureReason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into() }
    }

    /// Creates a failure from an error and its causes, joined by `: `.
    pub fn from_chain(reason: FailureReason, error: &(dyn std::error::Error + 'static)) -> Self {
        Self { reason, message: chain(error) }
    }

    /// Creates a failure from an error of the local file system; a full disk has its own reason.
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

    /// Creates a failure from the payload of a panic. libtorch reports running out of memory by a
    /// panic; any other is a bug of the trainer.
    pub fn from_panic(panic: &(dyn Any + Send)) -> Self {
        let text = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied())
            .unwrap_or("no message");
        let is_out_of_memory = ["can't allocate memory", "out of memory", "OutOfMemoryError"]
            .iter()
            .any(|words| text.contains(words));
        if is_out_of_memory {
            let message = format!("the device ran out of memory ({text})");
            return Self::new(FailureReason::OutOfMemory, message);
        }
        Self::new(
            FailureReason::Internal,
            format!("this is a bug of the trainer, please report it: {text}"),
        )
    }

    /// Returns the process exit code.
    pub const fn exit_code(&self) -> ExitCode {
        self.reason.exit_code()
    }
}

/// Renders an error and its causes, joined by `: `.
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
