//! Reads and counts the rows of a split, and judges what was found.

use finetune_contract::{
    DatasetCensus, ModelFacts, OnInvalidRow, OnOverflow, PreflightConfig, ProblemReason, Split,
};

use crate::{
    data::{census, row_sources::RowSources, rows::ReadSummary, tokenizer::Tokenizer},
    preflight::findings::{Findings, open},
    store::{Environment, Role},
};

/// The most names of skipped files in a message.
const MAX_FILE_NAMES: usize = 8;

/// Counts and checks splits with one tokenizer.
pub(super) struct SplitCheck<'a> {
    pub(super) config: &'a PreflightConfig,
    pub(super) environment: &'a Environment,
    pub(super) facts: &'a ModelFacts,
    pub(super) tokenizer: &'a Tokenizer,
}

impl SplitCheck<'_> {
    /// Counts a split; `None` if there is none or it cannot be read.
    pub(super) fn count(
        &self,
        split: Split,
        findings: &mut Findings,
    ) -> Option<census::CountedSplit> {
        let rows = RowSources::open(&self.config.dataset, split, |uri, location| {
            open(uri, None, Role::Dataset, self.environment, location, findings).ok_or(())
        });
        let rows = rows.ok().flatten()?;
        let location = rows.location();
        let counted = census::count(
            &rows,
            self.tokenizer,
            self.config.dataset.on_overflow,
            self.config.context_length,
            self.facts.max_position_embeddings,
        );
        let counted = match counted {
            Ok(counted) => counted,
            Err(failure) => {
                findings.add_failure(location, &failure);
                return None;
            }
        };
        self.check(location, &counted, findings);
        Some(counted)
    }

    fn check(&self, location: &str, counted: &census::CountedSplit, findings: &mut Findings) {
        let DatasetCensus { rows, bad_rows, duplicate_rows, max_tokens, .. } = counted.census;
        self.check_invalid_rows(location, &counted.summary, findings);
        if rows == 0 && bad_rows == 0 {
            let message = match self.config.dataset.validation_fraction {
                Some(fraction) if location == "spec.dataset.validationFraction" => {
                    format!("holds out no row, because there are so few: raise it above {fraction}")
                }
                _ => "the dataset has no rows".to_owned(),
            };
            findings.add_problem(ProblemReason::NothingToTrain, location, message);
        }
        if !counted.summary.skipped_files.is_empty() {
            let names = &counted.summary.skipped_files;
            let shown: Vec<&str> = names.iter().take(MAX_FILE_NAMES).map(String::as_str).collect();
            let more = if names.len() > shown.len() { ", …" } else { "" };
            let message = format!(
                "{} files are named after another split and left out: {}{more}; to use a file anyway, give its own URI",
                names.len(),
                shown.join(", ")
            );
            findings.add_warning(ProblemReason::InvalidDataset, location, message);
        }
        if duplicate_rows > 0 {
            let message = format!("{duplicate_rows} of {rows} rows repeat an earlier row");
            findings.add_warning(ProblemReason::DuplicateRows, location, message);
        }
        for warning in counted.rendering_stats.warnings(self.tokenizer) {
            findings.add_warning(ProblemReason::Servability, location, warning);
        }
        self.check_overflow(location, rows, max_tokens, counted, findings);
    }

    /// Reports one problem for each kind of error, or one warning if such rows are dropped.
    fn check_invalid_rows(&self, location: &str, summary: &ReadSummary, findings: &mut Findings) {
        let on_invalid_row = self.config.dataset.on_invalid_row;
        let refusal = summary.refusal(on_invalid_row);
        if refusal.is_none() {
            for group in &summary.error_groups {
                let message = format!("left out: {}", group.message());
                findings.add_warning(ProblemReason::InvalidDataset, &group.locations[0], message);
            }
            return;
        }
        let before = findings.problems_total;
        if let (Some(refusal), OnInvalidRow::Drop) = (refusal, on_invalid_row) {
            findings.add_problem(ProblemReason::InvalidDataset, location, refusal);
        }
        for group in &summary.error_groups {
            findings.add_problem(
                ProblemReason::InvalidDataset,
                &group.locations[0],
                group.message(),
            );
        }
        findings.problems_total = findings.problems_total.max(before + summary.invalid_rows);
    }

    fn check_overflow(
        &self,
        location: &str,
        rows: u64,
        max_tokens: u32,
        counted: &census::CountedSplit,
        findings: &mut Findings,
    ) {
        let max = self.facts.max_position_embeddings;
        let context = match self.config.context_length {
            Some(context) if context > max => {
                let message = format!(
                    "contextLength is {context}, but the model supports at most {max} positions: set it to {max} or less"
                );
                if counted.split == Split::Train {
                    findings.add_problem(
                        ProblemReason::InvalidSpec,
                        "spec.training.contextLength",
                        message,
                    );
                }
                return;
            }
            Some(context) => context,
            // The plan will choose a context length; only rows longer than the maximum are a problem.
            None => max,
        };
        let Some(point) = counted.census.lengths.iter().find(|point| point.context == context)
        else {
            return;
        };
        if point.over == 0 {
            return;
        }
        let figures = format!(
            "{} of {rows} rows have more than {context} tokens (the longest {max_tokens}); {} tokens would be cut",
            point.over, point.cut
        );
        match self.config.dataset.on_overflow {
            OnOverflow::Error => {
                let message = format!(
                    "{figures}: raise training.contextLength, or set dataset.onOverflow to truncate or drop"
                );
                findings.add_problem(ProblemReason::Overflow, location, message);
            }
            OnOverflow::Truncate if point.over == rows && point.empty == rows => {
                let message = format!(
                    "{figures}, which leaves no row with a token to train on: raise training.contextLength"
                );
                findings.add_problem(ProblemReason::NothingToTrain, location, message);
            }
            OnOverflow::Drop if point.over == rows => {
                let message = format!(
                    "{figures}, and every row would be dropped: raise training.contextLength"
                );
                findings.add_problem(ProblemReason::NothingToTrain, location, message);
            }
            OnOverflow::Truncate if point.empty > 0 => {
                let message = format!(
                    "{figures}, and {} of these rows would have no token left to train on and be left out",
                    point.empty
                );
                findings.add_warning(ProblemReason::Overflow, location, message);
            }
            OnOverflow::Truncate | OnOverflow::Drop => {
                findings.add_warning(ProblemReason::Overflow, location, figures);
            }
        }
    }
}
