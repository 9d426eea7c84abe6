//! Describes which rows a run has, where that is not plain from the manifest.

use finetune_contract::{DatasetCensus, DatasetSource, OnInvalidRow, PreflightReport, TrainOn};

use super::{choices::Choices, units::word};

/// Adds what was read, held out and left out.
pub(super) fn explain(source: &DatasetSource, report: &PreflightReport, decisions: &mut Choices) {
    if let Some(census) = report.train.as_ref().filter(|census| census.files > 1) {
        decisions.add("train", format!("{} files", census.files), names(census));
    }
    if let Some(census) = report.validation.as_ref().filter(|census| census.files > 1)
        && source.validation.is_some()
    {
        decisions.add("validation", format!("{} files", census.files), names(census));
    }
    if let (Some(fraction), Some(census)) = (source.validation_fraction, &report.validation) {
        let train = report.train.as_ref().map_or(0, |census| census.rows);
        let reason = format!("holds out {} rows and trains on {train}", census.rows);
        decisions.add("validationFraction", fraction, reason);
    }
    if source.train_on == TrainOn::LastTurn {
        let reason = "set in the manifest; earlier answers are context only";
        decisions.add("trainOn", word(&source.train_on), reason);
    }
    if source.on_invalid_row == OnInvalidRow::Drop {
        let splits = [&report.train, &report.validation].into_iter().flatten();
        let bad: u64 = splits.map(|census| census.bad_rows).sum();
        let reason = match bad {
            0 => "set in the manifest; every row can be used".to_owned(),
            bad => format!("set in the manifest; leaves out {bad} rows that cannot be used"),
        };
        decisions.add("onInvalidRow", word(&source.on_invalid_row), reason);
    }
}

fn names(census: &DatasetCensus) -> String {
    let more = if census.files > census.file_names.len() as u64 { ", …" } else { "" };
    format!("{}{more}", census.file_names.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    fn check(change: impl FnOnce(&mut DatasetSource, &mut PreflightReport)) -> String {
        let mut source = DatasetSource::of("s3://a/train/".parse().unwrap());
        let mut report = testing::report(testing::smollm2(), 1 << 33);
        change(&mut source, &mut report);
        let mut decisions = Choices::default();
        explain(&source, &report, &mut decisions);
        let lines = decisions.0.iter();
        lines
            .map(|line| format!("{} {}: {}", line.field, line.value, line.reason))
            .collect::<Vec<_>>()
            .join("\n")
    }

    #[test]
    fn tells_what_the_manifest_does_not() {
        assert_eq!(check(|_, _| {}), "");
        insta::assert_snapshot!(check(|source, report| {
            source.train_on = TrainOn::LastTurn;
            source.on_invalid_row = OnInvalidRow::Drop;
            source.validation_fraction = Some(0.1);
            let census = report.train.as_mut().unwrap();
            census.files = 3;
            census.file_names = vec!["a.jsonl".to_owned(), "b.parquet".to_owned()];
            census.bad_rows = 2;
            report.validation = Some(DatasetCensus { rows: 100, bad_rows: 1, ..census.clone() });
        }), @"
        train 3 files: a.jsonl, b.parquet, …
        validationFraction 0.1: holds out 100 rows and trains on 1000
        trainOn lastTurn: set in the manifest; earlier answers are context only
        onInvalidRow drop: set in the manifest; leaves out 3 rows that cannot be used
        ");
    }
}
