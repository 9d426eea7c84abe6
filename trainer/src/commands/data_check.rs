//! `finetune data check`: shows which parts of the rows are trained on.
//!
//! The text is decoded from the very tokens that training reads.

use std::{
    io::{IsTerminal, Write},
    path::PathBuf,
};

use clap::Args;
use finetune_contract::{FailureReason, PreflightConfig};

use crate::{
    commands::documents,
    data::{
        formats::RowError,
        rows::{ReadSummary, RowOutcome, for_each_row},
        tokenizer::{Tokenizer, targets::TokenRow, tokenize::Tokenized},
    },
    failure::Failure,
    preflight,
    store::Environment,
};

/// The rows to show, and how.
#[derive(Debug, Args)]
pub struct Arguments {
    /// The preflight configuration with the model and the rows.
    #[arg(long)]
    config: PathBuf,
    /// Scratch space.
    #[arg(long)]
    work_dir: PathBuf,
    /// How many rows to show from the first.
    #[arg(long, default_value_t = 3)]
    rows: usize,
    /// Show these rows instead, each as `17` or `file.jsonl:17`.
    #[arg(long, value_name = "LINE")]
    line: Vec<String>,
    /// Show each token with its id.
    #[arg(long)]
    ids: bool,
}

/// Shows rows, then totals over all rows.
///
/// # Errors
/// A [`Failure`] if the model or the rows cannot be read, a row cannot be used, or a requested line
/// does not exist.
pub fn run(arguments: &Arguments, environment: &Environment) -> Result<(), Failure> {
    let config: PreflightConfig = documents::read(&arguments.config)?;
    let mut out = std::io::stdout();
    let no_color = environment.plain("NO_COLOR").is_some_and(|value| !value.is_empty());
    let in_color = out.is_terminal() && !no_color;
    let mut write = |text: &str| {
        // A closed pipe is not an error.
        let _ = out.write_all(text.as_bytes());
    };
    check(&config, arguments, environment, in_color, &mut write)
}

fn check(
    config: &PreflightConfig,
    arguments: &Arguments,
    environment: &Environment,
    in_color: bool,
    write: &mut dyn FnMut(&str),
) -> Result<(), Failure> {
    let (tokenizer, sources) = preflight::training_rows(config, environment, &arguments.work_dir)?;
    let formatter = Formatter { config, tokenizer: &tokenizer, in_color, with_ids: arguments.ids };
    let mut missing_lines: Vec<&String> = arguments.line.iter().collect();
    let (mut shown, mut totals) = (0, Totals::default());
    let summary = for_each_row(&sources, &tokenizer, &mut |row| {
        if let Ok(tokenized) = &row.result {
            totals.add(config, tokenized);
        }
        let is_requested = if arguments.line.is_empty() {
            shown < arguments.rows
        } else {
            let before = missing_lines.len();
            missing_lines.retain(|line| !is_line(&row.location, line));
            missing_lines.len() < before
        };
        if is_requested {
            shown += 1;
            write(&formatter.row(&row));
        }
        Ok(())
    })?;
    write(&totals.text(&summary));
    for group in &summary.error_groups {
        write(&format!("{}: {}\n", group.locations[0], group.message()));
    }
    let invalid = |message: String| Err(Failure::new(FailureReason::InvalidDataset, message));
    if !missing_lines.is_empty() {
        let lines: Vec<&str> = missing_lines.into_iter().map(String::as_str).collect();
        return invalid(format!(
            "there is no row at {}: a row has the number of its line, counted from 1",
            lines.join(", ")
        ));
    }
    match summary.refusal(sources.on_invalid_row) {
        Some(refusal) => invalid(refusal),
        None => Ok(()),
    }
}

/// Returns whether `line`, as given by the user, names the row at `location`.
fn is_line(location: &str, line: &str) -> bool {
    location == line
        || location
            .strip_suffix(line)
            .is_some_and(|rest| rest.ends_with(':') || rest.ends_with('/'))
}

/// Totals over all rows.
#[derive(Default)]
struct Totals {
    rows: u64,
    tokens: u64,
    targets: u64,
    skipped: u64,
}

impl Totals {
    fn add(&mut self, config: &PreflightConfig, tokenized: &Tokenized) {
        for row in &tokenized.rows {
            match trained_length(config, row) {
                None => self.skipped += 1,
                Some(length) => {
                    self.rows += 1;
                    self.tokens += length as u64;
                    self.targets += count(&row.targets[..length]);
                }
            }
        }
    }

    fn text(&self, summary: &ReadSummary) -> String {
        let Self { rows, tokens, targets, skipped } = self;
        let files = summary.file_names.join(", ");
        let more = if summary.files > summary.file_names.len() as u64 { ", …" } else { "" };
        let mut text =
            format!("{files}{more}: {rows} rows, {targets} of {tokens} tokens trained on\n");
        if *skipped > 0 {
            text.push_str(&format!("{skipped} rows are too long and left out\n"));
        }
        text
    }
}

/// Returns how many tokens of a row training reads; `None` if it skips the row. Without a context
/// length in the configuration, the plan chooses one, so the row is taken as it is.
fn trained_length(config: &PreflightConfig, row: &TokenRow) -> Option<usize> {
    let context_length = config.context_length.unwrap_or(u32::MAX);
    row.trained_length(context_length, config.dataset.on_overflow)
}

fn count(targets: &[bool]) -> u64 {
    targets.iter().filter(|&&is_target| is_target).count() as u64
}

/// Formats rows as text.
struct Formatter<'a> {
    config: &'a PreflightConfig,
    tokenizer: &'a Tokenizer,
    in_color: bool,
    with_ids: bool,
}

impl Formatter<'_> {
    fn row(&self, RowOutcome { location, result, .. }: &RowOutcome) -> String {
        match result {
            Ok(Tokenized { rows, .. }) => {
                let count = rows.len();
                let rows = rows.iter().enumerate().map(|(index, row)| {
                    let position = match count {
                        1 => String::new(),
                        _ => format!(", row {} of {count}", index + 1),
                    };
                    self.token_row(&format!("{location}{position}"), row)
                });
                rows.collect()
            }
            Err(errors) => {
                let errors: Vec<String> = errors.iter().map(RowError::to_string).collect();
                let heading = self.heading(&format!("{location}: cannot be used"));
                format!("{heading}\n{}\n\n", errors.join("\n"))
            }
        }
    }

    fn token_row(&self, name: &str, row: &TokenRow) -> String {
        let all = row.tokens.len();
        let (length, description) = match trained_length(self.config, row) {
            None => (all, format!("{all} tokens, left out: too long")),
            Some(length) => {
                let truncation =
                    if length < all { format!(" (the first of {all})") } else { String::new() };
                let targets = count(&row.targets[..length]);
                (length, format!("{length} tokens{truncation}, {targets} trained on"))
            }
        };
        let (tokens, targets) = (&row.tokens[..length], &row.targets[..length]);
        let body =
            if self.with_ids { self.tokens(tokens, targets) } else { self.text(tokens, targets) };
        let heading = self.heading(&format!("{name}: {description}"));
        format!("{heading}\n{}\n\n", body.strip_suffix('\n').unwrap_or(&body))
    }

    fn heading(&self, text: &str) -> String {
        if self.in_color { format!("\x1b[1m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// Decodes the tokens and marks the runs that are trained on.
    fn text(&self, tokens: &[u32], targets: &[bool]) -> String {
        let mut text = String::new();
        let mut start = 0;
        for run in targets.chunk_by(|one, next| one == next) {
            let tokens = &tokens[start..start + run.len()];
            text.push_str(&self.mark(&self.tokenizer.decode(tokens, false), run[0]));
            start += run.len();
        }
        text
    }

    /// Lists the tokens, one per line: the id and the text of each.
    fn tokens(&self, tokens: &[u32], targets: &[bool]) -> String {
        let lines = tokens.iter().zip(targets).map(|(&token, &is_target)| {
            let text = format!("{:?}", self.tokenizer.decode(&[token], false));
            format!("{token:>7}  {}", self.mark(&text, is_target))
        });
        lines.collect::<Vec<_>>().join("\n")
    }

    /// Shows text that is trained on in green or, without color, between `⟦` and `⟧`.
    fn mark(&self, text: &str, is_target: bool) -> String {
        match (is_target, self.in_color) {
            (true, true) => format!("\x1b[32m{text}\x1b[0m"),
            (true, false) => format!("⟦{text}⟧"),
            (false, true) => format!("\x1b[2m{text}\x1b[0m"),
            (false, false) => text.to_owned(),
        }
    }
}
