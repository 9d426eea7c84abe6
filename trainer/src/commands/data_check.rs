//! `finetune data check`: what of the rows is trained on and what is not, for a person to read.
//!
//! It shows the tokens that training reads, turned back into text; nothing is rendered for show.

use std::{
    io::{IsTerminal, Write},
    path::{Path, PathBuf},
};

use clap::Args;
use finetune_contract::{FailureReason, PreflightConfig};

use crate::{
    data::{
        Tokenizer,
        formats::RowError,
        rows::{Read, SplitRow, for_each_row},
        tokenizer::{TokenRow, Tokenized},
    },
    failure::Failure,
    preflight,
    store::Environment,
};

/// What is shown.
#[derive(Debug, Args)]
pub struct Arguments {
    /// The preflight configuration that names model and rows.
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

impl Arguments {
    /// Returns where the preflight configuration is.
    pub fn config(&self) -> &Path {
        &self.config
    }
}

/// Shows rows, then what all of them add up to.
///
/// # Errors
/// A [`Failure`] if model or rows cannot be read, a row cannot be used, or a line is not there.
pub fn run(
    config: &PreflightConfig,
    arguments: &Arguments,
    environment: &Environment,
) -> Result<(), Failure> {
    let mut out = std::io::stdout();
    let no_color = environment.plain("NO_COLOR").is_some_and(|value| !value.is_empty());
    let in_color = out.is_terminal() && !no_color;
    let mut write = |text: &str| {
        // Nobody looking is no failure of ours.
        let _ = out.write_all(text.as_bytes());
    };
    check(config, arguments, environment, in_color, &mut write)
}

fn check(
    config: &PreflightConfig,
    arguments: &Arguments,
    environment: &Environment,
    in_color: bool,
    write: &mut dyn FnMut(&str),
) -> Result<(), Failure> {
    let (tokenizer, sources) = preflight::training_rows(config, environment, &arguments.work_dir)?;
    let show = Show { config, tokenizer: &tokenizer, in_color, with_ids: arguments.ids };
    let mut unseen: Vec<&String> = arguments.line.iter().collect();
    let (mut shown, mut sums) = (0, Sums::default());
    let read = for_each_row(&sources, &tokenizer, &mut |row| {
        if let Ok(tokenized) = &row.outcome {
            sums.add(config, tokenized);
        }
        let is_asked = if arguments.line.is_empty() {
            shown < arguments.rows
        } else {
            let before = unseen.len();
            unseen.retain(|line| !is_line(&row.location, line));
            unseen.len() < before
        };
        if is_asked {
            shown += 1;
            write(&show.row(&row));
        }
        Ok(())
    })?;
    write(&sums.summary(&read));
    for fault in &read.faults {
        write(&format!("{}: {}\n", fault.places[0], fault.message()));
    }
    let invalid = |message: String| Err(Failure::new(FailureReason::InvalidDataset, message));
    if !unseen.is_empty() {
        let lines: Vec<&str> = unseen.into_iter().map(String::as_str).collect();
        return invalid(format!(
            "there is no row at {}: rows have the numbers of their lines, from 1",
            lines.join(", ")
        ));
    }
    match read.refusal(sources.on_invalid_row) {
        Some(refusal) => invalid(refusal),
        None => Ok(()),
    }
}

/// Tells whether a row at `location` is the one that a user calls `line`.
fn is_line(location: &str, line: &str) -> bool {
    location == line
        || location
            .strip_suffix(line)
            .is_some_and(|rest| rest.ends_with(':') || rest.ends_with('/'))
}

/// What all rows add up to.
#[derive(Default)]
struct Sums {
    rows: u64,
    tokens: u64,
    targets: u64,
    left_out: u64,
}

impl Sums {
    fn add(&mut self, config: &PreflightConfig, tokenized: &Tokenized) {
        for row in &tokenized.rows {
            match trained_length(config, row) {
                None => self.left_out += 1,
                Some(length) => {
                    self.rows += 1;
                    self.tokens += length as u64;
                    self.targets += count(&row.targets[..length]);
                }
            }
        }
    }

    fn summary(&self, read: &Read) -> String {
        let Self { rows, tokens, targets, left_out } = self;
        let files = read.file_names.join(", ");
        let more = if read.files > read.file_names.len() as u64 { ", …" } else { "" };
        let mut text =
            format!("{files}{more}: {rows} rows, {targets} of {tokens} tokens trained on\n");
        if *left_out > 0 {
            text.push_str(&format!("{left_out} rows are too long and left out\n"));
        }
        text
    }
}

/// Returns how many of a row's tokens training reads; without a context length the plan chooses one
/// that takes what the manifest says about long rows.
fn trained_length(config: &PreflightConfig, row: &TokenRow) -> Option<usize> {
    let context_length = config.context_length.unwrap_or(u32::MAX);
    row.trained_length(context_length, config.dataset.on_overflow)
}

fn count(targets: &[bool]) -> u64 {
    targets.iter().filter(|&&is_target| is_target).count() as u64
}

/// How rows are shown.
struct Show<'a> {
    config: &'a PreflightConfig,
    tokenizer: &'a Tokenizer,
    in_color: bool,
    with_ids: bool,
}

impl Show<'_> {
    fn row(&self, SplitRow { location, outcome, .. }: &SplitRow) -> String {
        match outcome {
            Ok(Tokenized { rows, .. }) => {
                let number = rows.len();
                let rows = rows.iter().enumerate().map(|(index, row)| {
                    let of = match number {
                        1 => String::new(),
                        _ => format!(", row {} of {number}", index + 1),
                    };
                    self.one(&format!("{location}{of}"), row)
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

    fn one(&self, name: &str, row: &TokenRow) -> String {
        let all = row.tokens.len();
        let (length, how) = match trained_length(self.config, row) {
            None => (all, format!("{all} tokens, left out: too long")),
            Some(length) => {
                let cut =
                    if length < all { format!(" (the first of {all})") } else { String::new() };
                let targets = count(&row.targets[..length]);
                (length, format!("{length} tokens{cut}, {targets} trained on"))
            }
        };
        let (tokens, targets) = (&row.tokens[..length], &row.targets[..length]);
        let body =
            if self.with_ids { self.tokens(tokens, targets) } else { self.text(tokens, targets) };
        let heading = self.heading(&format!("{name}: {how}"));
        format!("{heading}\n{}\n\n", body.strip_suffix('\n').unwrap_or(&body))
    }

    fn heading(&self, text: &str) -> String {
        if self.in_color { format!("\x1b[1m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// The text, as runs of tokens that are trained on and runs that are not.
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

    /// A token a line: its id, and itself.
    fn tokens(&self, tokens: &[u32], targets: &[bool]) -> String {
        let lines = tokens.iter().zip(targets).map(|(&token, &is_target)| {
            let text = format!("{:?}", self.tokenizer.decode(&[token], false));
            format!("{token:>7}  {}", self.mark(&text, is_target))
        });
        lines.collect::<Vec<_>>().join("\n")
    }

    /// Shows what is trained on in green or, without colour, between `⟦` and `⟧`.
    fn mark(&self, text: &str, is_target: bool) -> String {
        match (is_target, self.in_color) {
            (true, true) => format!("\x1b[32m{text}\x1b[0m"),
            (true, false) => format!("⟦{text}⟧"),
            (false, true) => format!("\x1b[2m{text}\x1b[0m"),
            (false, false) => text.to_owned(),
        }
    }
}
