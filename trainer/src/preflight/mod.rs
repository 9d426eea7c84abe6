//! Checks everything about a run that can be checked before it gets expensive hardware.
//!
//! A preflight never fails. Each mistake becomes a [`Problem`](finetune_contract::Problem), and the
//! checks that do not depend on it continue, so that the user sees all mistakes at once.

mod adapter;
mod findings;
mod lora;
mod machine;
mod model;
mod output;
mod rows;
#[cfg(test)]
mod tests;
mod weights;

use std::path::Path;

use finetune_contract::{CONTRACT_VERSION, PreflightConfig, PreflightReport, Split};

use crate::{
    data::{row_sources::RowSources, tokenizer::Tokenizer},
    failure::Failure,
    preflight::{
        findings::{Findings, open},
        rows::SplitCheck,
    },
    store::{Environment, Role},
};

/// Checks a run and returns the report.
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
            findings.warn_about_overlap(overlapping_rows, held_out.census.rows);
        }
        let largest_token =
            [&counted, &held_out].into_iter().flatten().map(|split| split.largest_token).max();
        findings.check_vocabulary(largest_token.unwrap_or(0), facts.vocab_size);
        train = counted.map(|counted| counted.census);
        validation = held_out.map(|counted| counted.census);
    }
    let template_date = model.as_ref().and_then(|checked| checked.tokenizer.printed_date());
    let is_date_set = config.dataset.rendering.template_date.is_some();
    findings.warn_about_date(template_date.as_deref(), is_date_set);
    let rows = train.as_ref().map(|train| (train, validation.as_ref()));
    let (output, published) = output::check(config, rows, environment, &mut findings);
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

/// Opens the tokenizer and the training rows without any other check.
///
/// # Errors
/// The first problem as a [`Failure`].
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
        _ => Err(findings.into_first_failure()),
    }
}
