//! Everything that can be checked before a machine worth money is asked for.
//!
//! It never fails: each trouble becomes a [`Problem`], and the checks that do not depend on it go
//! on, so that a user sees all there is to mend at once.

mod adapter;
mod lora;
mod machine;
mod model;
#[cfg(test)]
mod tests;
mod weights;

use std::path::Path;

use finetune_contract::{
    CONTRACT_VERSION, DatasetCensus, FailureReason, ModelFacts, ObjectUri, OnInvalidRow,
    OnOverflow, OutputState, PreflightConfig, PreflightReport, Problem, ProblemReason,
    PublishedResult, Split, settings_text,
};

use crate::{
    data::{RowSources, Tokenizer, census, rows::Read},
    failure::Failure,
    inputs,
    store::{
        self, Environment, Role, Store,
        publish::{self, Found, Published},
        sha256_hex,
    },
};

/// The manifest's field that names the model.
const MODEL_URI: &str = "spec.model.uri";

/// Problems shown in full; all are counted.
const SHOWN: usize = 20;
/// Names of files shown.
const SHOWN_FILES: usize = 8;

/// The field of the output.
const OUTPUT: &str = "spec.output.uri";

/// Checks a run.
pub fn run(
    config: &PreflightConfig,
    environment: &Environment,
    work_dir: &Path,
) -> PreflightReport {
    let mut findings = Findings::default();
    let model = model::check(config, environment, work_dir, &mut findings);
    let (mut train, mut validation, mut overlapping_rows) = (None, None, 0);
    if let Some(model::Checked { facts, tokenizer, .. }) = &model {
        let check = SplitCheck { config, environment, facts, tokenizer };
        let counted = check.count(Split::Train, &mut findings);
        let held_out = check.count(Split::Validation, &mut findings);
        if let (Some(counted), Some(held_out)) = (&counted, &held_out) {
            overlapping_rows = held_out.digests.intersection(&counted.digests).count() as u64;
            findings.warn_of_overlap(overlapping_rows, held_out.census.rows);
        }
        let largest_token =
            [&counted, &held_out].into_iter().flatten().map(|split| split.largest_token).max();
        findings.judge_tokenizer(largest_token.unwrap_or(0), facts.vocab_size);
        train = counted.map(|counted| counted.census);
        validation = held_out.map(|counted| counted.census);
    }
    let template_date = model.as_ref().and_then(|checked| checked.tokenizer.printed_date());
    let given = &config.dataset.rendering.template_date;
    findings.remark_on_date(template_date.as_deref(), given.is_some());
    let rows = train.as_ref().map(|train| (train, validation.as_ref()));
    let (output, published) = check_output(config, rows, environment, &mut findings);
    PreflightReport {
        version: CONTRACT_VERSION,
        run_id: config.run_id.clone(),
        problems: findings.problems,
        problems_total: findings.problems_total,
        warnings: findings.warnings,
        lora: model.as_ref().and_then(|checked| checked.lora.clone()),
        model: model.map(|checked| checked.facts),
        train,
        validation,
        overlapping_rows,
        template_date,
        output,
        published,
        machine: Some(machine::facts(config.measure_machine)),
    }
}

/// Opens what is needed to see the training rows as tokens, without checking anything else.
///
/// # Errors
/// The first problem.
pub fn training_rows(
    config: &PreflightConfig,
    environment: &Environment,
    work_dir: &Path,
) -> Result<(Tokenizer, RowSources), Failure> {
    let mut findings = Findings::default();
    let tokenizer = model::tokenizer(config, environment, work_dir, &mut findings);
    let rows = RowSources::open(&config.dataset, Split::Train, |uri, location| {
        open(uri, None, Role::Dataset, environment, location, &mut findings).ok_or(())
    });
    match (tokenizer, rows.ok().flatten()) {
        (Some(tokenizer), Some(rows)) => Ok((tokenizer, rows)),
        _ => Err(findings.first_as_failure()),
    }
}

/// What was found so far.
#[derive(Debug, Default)]
struct Findings {
    problems: Vec<Problem>,
    problems_total: u64,
    warnings: Vec<Problem>,
}

impl Findings {
    fn problem(&mut self, reason: ProblemReason, location: &str, message: impl Into<String>) {
        self.problems_total += 1;
        if self.problems.len() < SHOWN {
            self.problems.push(Problem {
                reason,
                location: location.to_owned(),
                message: message.into(),
            });
        }
    }

    fn warning(&mut self, reason: ProblemReason, location: &str, message: impl Into<String>) {
        self.warnings.push(Problem {
            reason,
            location: location.to_owned(),
            message: message.into(),
        });
    }

    fn store_problem(&mut self, location: &str, error: &store::Error) {
        self.problem(error.problem_reason(), location, error.to_string());
    }

    fn first_as_failure(self) -> Failure {
        let Some(Problem { reason, location, message }) = self.problems.into_iter().next() else {
            return Failure::new(FailureReason::Internal, "something is missing without a reason");
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

    fn failure(&mut self, location: &str, failure: &Failure) {
        let reason = match failure.reason {
            FailureReason::InvalidModel => ProblemReason::InvalidModel,
            FailureReason::InvalidDataset => ProblemReason::InvalidDataset,
            FailureReason::PermissionDenied => ProblemReason::PermissionDenied,
            FailureReason::InvalidConfiguration => ProblemReason::NotFound,
            _ => ProblemReason::Unavailable,
        };
        self.problem(reason, location, failure.message.clone());
    }

    fn judge_tokenizer(&mut self, largest_token: u32, vocab_size: u32) {
        if largest_token >= vocab_size {
            let message = format!(
                "the tokenizer gives token {largest_token}, but the model's embedding has only {vocab_size} rows: tokenizer and model do not belong together"
            );
            self.problem(ProblemReason::InvalidTokenizer, "spec.model.uri", message);
        }
    }

    fn remark_on_date(&mut self, printed: Option<&str>, is_given: bool) {
        if let Some(day) = printed.filter(|_| !is_given) {
            let message = format!(
                "the chat template prints the date, which is {day} for every row: set dataset.templateDate to train on the same text another day"
            );
            self.warning(ProblemReason::Servability, "spec.dataset", message);
        }
    }

    fn warn_of_overlap(&mut self, overlapping: u64, held_out: u64) {
        if overlapping > 0 {
            let message = format!(
                "{overlapping} of {held_out} validation rows are also training rows: the validation loss will look better than it is"
            );
            self.warning(ProblemReason::DuplicateRows, "spec.dataset.validation", message);
        }
    }
}

/// Opens one of the URIs of a run.
fn open(
    uri: &str,
    revision: Option<&str>,
    role: Role,
    environment: &Environment,
    location: &str,
    findings: &mut Findings,
) -> Option<Store> {
    let uri = match ObjectUri::parse(uri) {
        Ok(uri) => uri,
        Err(error) => {
            findings.problem(ProblemReason::InvalidSpec, location, error.to_string());
            return None;
        }
    };
    match Store::open(&uri, revision, role, environment) {
        Ok(store) => Some(store),
        Err(error) => {
            findings.store_problem(location, &error);
            None
        }
    }
}

struct SplitCheck<'a> {
    config: &'a PreflightConfig,
    environment: &'a Environment,
    facts: &'a ModelFacts,
    tokenizer: &'a Tokenizer,
}

impl SplitCheck<'_> {
    fn count(&self, split: Split, findings: &mut Findings) -> Option<census::Counted> {
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
                findings.failure(location, &failure);
                return None;
            }
        };
        self.judge(location, &counted, findings);
        Some(counted)
    }

    fn judge(&self, location: &str, counted: &census::Counted, findings: &mut Findings) {
        let DatasetCensus { rows, bad_rows, duplicate_rows, max_tokens, .. } = counted.census;
        self.judge_bad_rows(location, &counted.read, findings);
        if rows == 0 && bad_rows == 0 {
            let message = match self.config.dataset.validation_fraction {
                Some(fraction) if location == "spec.dataset.validationFraction" => {
                    format!("holds out none of the few rows there are: raise it above {fraction}")
                }
                _ => "the dataset has no rows".to_owned(),
            };
            findings.problem(ProblemReason::NothingToTrain, location, message);
        }
        if !counted.read.left_out.is_empty() {
            let names = &counted.read.left_out;
            let shown: Vec<&str> = names.iter().take(SHOWN_FILES).map(String::as_str).collect();
            let more = if names.len() > shown.len() { ", …" } else { "" };
            let message = format!(
                "{} files are named for another split and left out: {}{more}; name a file itself to use it",
                names.len(),
                shown.join(", ")
            );
            findings.warning(ProblemReason::InvalidDataset, location, message);
        }
        if duplicate_rows > 0 {
            let message = format!("{duplicate_rows} of {rows} rows repeat an earlier row");
            findings.warning(ProblemReason::DuplicateRows, location, message);
        }
        for remark in counted.rendered.remarks(self.tokenizer) {
            findings.warning(ProblemReason::Servability, location, remark);
        }
        self.judge_overflow(location, rows, max_tokens, counted, findings);
    }

    /// One problem for each kind of fault, or one warning if such rows are to be left out.
    fn judge_bad_rows(&self, location: &str, read: &Read, findings: &mut Findings) {
        let on_invalid_row = self.config.dataset.on_invalid_row;
        let refusal = read.refusal(on_invalid_row);
        if refusal.is_none() {
            for fault in &read.faults {
                let message = format!("left out: {}", fault.message());
                findings.warning(ProblemReason::InvalidDataset, &fault.places[0], message);
            }
            return;
        }
        let before = findings.problems_total;
        if let (Some(refusal), OnInvalidRow::Drop) = (refusal, on_invalid_row) {
            findings.problem(ProblemReason::InvalidDataset, location, refusal);
        }
        for fault in &read.faults {
            findings.problem(ProblemReason::InvalidDataset, &fault.places[0], fault.message());
        }
        findings.problems_total = findings.problems_total.max(before + read.bad_rows);
    }

    fn judge_overflow(
        &self,
        location: &str,
        rows: u64,
        max_tokens: u32,
        counted: &census::Counted,
        findings: &mut Findings,
    ) {
        let max = self.facts.max_position_embeddings;
        let context = match self.config.context_length {
            Some(context) if context > max => {
                let message = format!(
                    "contextLength is {context}, but the model was made for at most {max} positions: set it to {max} or less"
                );
                if counted.split == Split::Train {
                    findings.problem(
                        ProblemReason::InvalidSpec,
                        "spec.training.contextLength",
                        message,
                    );
                }
                return;
            }
            Some(context) => context,
            // Without a wish only what no plan can avoid is judged here.
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
                findings.problem(ProblemReason::Overflow, location, message);
            }
            OnOverflow::Truncate if point.over == rows && point.empty == rows => {
                let message = format!(
                    "{figures}, and no row would keep a token to train on: raise training.contextLength"
                );
                findings.problem(ProblemReason::NothingToTrain, location, message);
            }
            OnOverflow::Drop if point.over == rows => {
                let message = format!(
                    "{figures}, so every row would be dropped: raise training.contextLength"
                );
                findings.problem(ProblemReason::NothingToTrain, location, message);
            }
            OnOverflow::Truncate if point.empty > 0 => {
                let message = format!(
                    "{figures}, and {} of these rows would keep no token to train on and be left out",
                    point.empty
                );
                findings.warning(ProblemReason::Overflow, location, message);
            }
            OnOverflow::Truncate | OnOverflow::Drop => {
                findings.warning(ProblemReason::Overflow, location, figures);
            }
        }
    }
}

/// Checks that a result can be written, and what is there already.
fn check_output(
    config: &PreflightConfig,
    rows: Option<(&DatasetCensus, Option<&DatasetCensus>)>,
    environment: &Environment,
    findings: &mut Findings,
) -> (Option<OutputState>, Option<PublishedResult>) {
    let overlaps = inputs::overlaps(config);
    if !overlaps.is_empty() {
        // Nothing is written there, not even to try.
        for message in overlaps {
            findings.problem(ProblemReason::InvalidSpec, OUTPUT, message);
        }
        return (None, None);
    }
    let opened = open(&config.output.uri, None, Role::Output, environment, OUTPUT, findings);
    let Some(store) = opened else { return (None, None) };
    if let Err(error) = store.probe_write() {
        findings.store_problem(OUTPUT, &error);
        return (None, None);
    }
    match compare_output(config, &store, rows, environment) {
        Err(failure) => {
            findings.failure(OUTPUT, &failure);
            (None, None)
        }
        Ok(Found::Vacant) => (Some(OutputState::Vacant), None),
        Ok(Found::Same(published)) => {
            let result = result(*published);
            (Some(OutputState::SameInputs), result)
        }
        Ok(Found::Other(holds)) => {
            if !config.output.overwrite {
                let uri = config.output.uri.clone();
                findings.store_problem(OUTPUT, &store::Error::OutputExists { uri, holds });
            }
            (Some(OutputState::OtherInputs), None)
        }
    }
}

/// Compares a result that is at the output with what this run reads.
fn compare_output(
    config: &PreflightConfig,
    store: &Store,
    rows: Option<(&DatasetCensus, Option<&DatasetCensus>)>,
    environment: &Environment,
) -> Result<Found, Failure> {
    // Without rows there is nothing to compare, and why there are none is said already. Without a
    // result the inputs need not be read.
    let (Some((train, validation)), true) = (rows, publish::is_there(store)?) else {
        return Ok(Found::Vacant);
    };
    let validation = validation.map(|census| census.sha256.as_str());
    let here = inputs::digests(config.into(), &train.sha256, validation, environment)?;
    Ok(publish::find_of_inputs(store, &here)?)
}

fn result(published: Published) -> Option<PublishedResult> {
    let Published { manifest, manifest_sha256 } = published;
    Some(PublishedResult {
        run_id: manifest.run_id,
        kind: manifest.kind,
        manifest_sha256,
        settings_sha256: sha256_hex(settings_text(&manifest.settings?).as_bytes()),
        step: manifest.step,
    })
}
