//! How a command fails: a message for people and an exit status of the contract.

use std::fmt;

use finetune_api::manifest::Violation;
use finetune_contract::{ExitCode, Problem};

/// A failed command.
#[derive(Debug)]
pub(super) struct Failure {
    /// The process exit status.
    pub(super) code: u8,
    message: String,
}

impl Failure {
    pub(super) fn new(code: ExitCode, message: impl Into<String>) -> Self {
        Self { code: code.code(), message: message.into() }
    }

    /// What the user must change in the manifest or on the command line.
    pub(super) fn configuration(message: impl Into<String>) -> Self {
        Self::new(ExitCode::BadConfiguration, message)
    }

    /// Every fault of a manifest, one a line.
    pub(super) fn violations(title: &str, violations: &[Violation]) -> Self {
        let lines: Vec<String> =
            violations.iter().map(|violation| format!("\n  {violation}")).collect();
        Self::configuration(format!("{title}{}", lines.concat()))
    }

    pub(super) fn internal(error: impl fmt::Display) -> Self {
        Self::new(ExitCode::Internal, error.to_string())
    }

    /// An exit status the trainer chose and has already explained.
    pub(super) fn explained(code: u8) -> Self {
        Self { code, message: String::new() }
    }

    /// An exit status the trainer chose.
    pub(super) fn status(code: u8, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// Returns whether the reason was printed already.
    pub(super) fn is_explained(&self) -> bool {
        self.message.is_empty()
    }

    /// Every problem, one a line.
    ///
    /// The status is that of the first problem only the user can fix; a retryable status
    /// must not hide one.
    pub(super) fn problems(title: &str, problems: &[Problem], total: u64) -> Self {
        let hidden = total.saturating_sub(problems.len() as u64);
        let mut lines = vec![title.to_owned()];
        lines.extend(problems.iter().map(|problem| format!("  {problem}")));
        if hidden > 0 {
            lines.push(format!("  and {hidden} more"));
        }
        let codes = || problems.iter().map(|problem| problem.reason.exit_code());
        let code = codes().find(|code| !code.is_retryable()).or_else(|| codes().next());
        Self::new(code.unwrap_or(ExitCode::BadData), lines.join("\n"))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.message)
    }
}
