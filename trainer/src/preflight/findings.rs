//! Collects the problems and warnings of a preflight.

use finetune_contract::{FailureReason, ObjectUri, Problem, ProblemReason};

use crate::{
    failure::Failure,
    store::{self, Environment, Role, Store},
};

/// The manifest field of the model.
pub(super) const MODEL_URI: &str = "spec.model.uri";

/// The most problems that are reported in full; all are counted.
const MAX_PROBLEMS: usize = 20;

/// The problems and warnings so far.
#[derive(Debug, Default)]
pub(super) struct Findings {
    pub(super) problems: Vec<Problem>,
    pub(super) problems_total: u64,
    pub(super) warnings: Vec<Problem>,
}

impl Findings {
    pub(super) fn add_problem(
        &mut self,
        reason: ProblemReason,
        location: &str,
        message: impl Into<String>,
    ) {
        self.problems_total += 1;
        if self.problems.len() < MAX_PROBLEMS {
            self.problems.push(Problem {
                reason,
                location: location.to_owned(),
                message: message.into(),
            });
        }
    }

    pub(super) fn add_warning(
        &mut self,
        reason: ProblemReason,
        location: &str,
        message: impl Into<String>,
    ) {
        self.warnings.push(Problem {
            reason,
            location: location.to_owned(),
            message: message.into(),
        });
    }

    pub(super) fn add_store_error(&mut self, location: &str, error: &store::Error) {
        self.add_problem(error.problem_reason(), location, error.to_string());
    }

    pub(super) fn into_first_failure(self) -> Failure {
        let Some(Problem { reason, location, message }) = self.problems.into_iter().next() else {
            return Failure::new(
                FailureReason::Internal,
                "a check failed without reporting a problem",
            );
        };
        let reason = match reason {
            ProblemReason::PermissionDenied => FailureReason::PermissionDenied,
            ProblemReason::Unavailable => FailureReason::StoreUnavailable,
            ProblemReason::InvalidModel
            | ProblemReason::UnsupportedModel
            | ProblemReason::InvalidTokenizer => FailureReason::InvalidModel,
            ProblemReason::InvalidDataset => FailureReason::InvalidDataset,
            _ => FailureReason::InvalidConfiguration,
        };
        Failure::new(reason, format!("{location}: {message}"))
    }

    pub(super) fn add_failure(&mut self, location: &str, failure: &Failure) {
        let reason = match failure.reason {
            FailureReason::InvalidModel => ProblemReason::InvalidModel,
            FailureReason::InvalidDataset => ProblemReason::InvalidDataset,
            FailureReason::PermissionDenied => ProblemReason::PermissionDenied,
            FailureReason::InvalidConfiguration => ProblemReason::NotFound,
            _ => ProblemReason::Unavailable,
        };
        self.add_problem(reason, location, failure.message.clone());
    }

    pub(super) fn check_vocabulary(&mut self, largest_token: u32, vocab_size: u32) {
        if largest_token >= vocab_size {
            let message = format!(
                "the tokenizer produces token {largest_token}, but the embedding of the model has only {vocab_size} rows: tokenizer and model do not belong together"
            );
            self.add_problem(ProblemReason::InvalidTokenizer, "spec.model.uri", message);
        }
    }

    pub(super) fn warn_about_date(&mut self, printed: Option<&str>, is_set: bool) {
        if let Some(day) = printed.filter(|_| !is_set) {
            let message = format!(
                "the chat template prints the current date, {day}, into every row: set dataset.templateDate to get the same text on another day"
            );
            self.add_warning(ProblemReason::Servability, "spec.dataset", message);
        }
    }

    pub(super) fn warn_about_overlap(&mut self, overlapping: u64, held_out: u64) {
        if overlapping > 0 {
            let message = format!(
                "{overlapping} of {held_out} validation rows are also training rows: the validation loss will be too low"
            );
            self.add_warning(ProblemReason::DuplicateRows, "spec.dataset.validation", message);
        }
    }
}

/// Opens a URI of the run; reports a problem and returns `None` if that fails.
pub(super) fn open(
    uri: &ObjectUri,
    revision: Option<&str>,
    role: Role,
    environment: &Environment,
    location: &str,
    findings: &mut Findings,
) -> Option<Store> {
    match Store::open(uri, revision, role, environment) {
        Ok(store) => Some(store),
        Err(error) => {
            findings.add_store_error(location, &error);
            None
        }
    }
}
