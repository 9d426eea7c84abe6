//! Real dialogues with a clear licence: the English part of chatterbot-corpus (BSD-3-Clause).

use std::{
    fmt::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::{cache, python};

/// The package and its version.
const PACKAGE: &str = "chatterbot-corpus==1.3.3";
/// Topics whose answers are facts or opinions in the corpus's own short voice.
const TOPICS: [&str; 9] = [
    "ai",
    "computers",
    "food",
    "history",
    "literature",
    "money",
    "movies",
    "psychology",
    "science",
];
/// Every so many-th conversation is held out.
const HELD_OUT: usize = 10;

/// Files of the dataset.
pub(crate) struct Files {
    /// Rows to train on.
    pub train: PathBuf,
    /// Rows held out.
    pub validation: PathBuf,
}

#[derive(Debug, Deserialize)]
struct Topic {
    conversations: Vec<Vec<String>>,
}

/// Returns the dataset as chat JSONL.
pub(crate) fn files() -> Result<Files> {
    let directory = cache::entry("chatterbot-corpus-1.3.3-chat-1", |to| {
        let unpacked = to.join("unpacked");
        python::unpack(PACKAGE, &unpacked)?;
        convert(&unpacked, to)?;
        Ok(std::fs::remove_dir_all(unpacked)?)
    })?;
    Ok(Files {
        train: directory.join("train.jsonl"),
        validation: directory.join("validation.jsonl"),
    })
}

/// Returns some held-out questions.
pub(crate) fn questions(files: &Files, count: usize) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(&files.validation)?;
    let rows: Vec<serde_json::Value> =
        text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let step = (rows.len() / count).max(1);
    let question =
        |row: &serde_json::Value| row["messages"][0]["content"].as_str().map(str::to_owned);
    Ok(rows.iter().step_by(step).filter_map(question).take(count).collect())
}

fn convert(unpacked: &Path, to: &Path) -> Result<()> {
    let (mut train, mut validation) = (String::new(), String::new());
    let mut number = 0;
    let mut seen = std::collections::BTreeSet::new();
    for topic in TOPICS {
        let path = unpacked.join(format!("chatterbot_corpus/data/english/{topic}.yml"));
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        let topic: Topic = serde_saphyr::from_str(&text)
            .with_context(|| format!("cannot read {}", path.display()))?;
        for conversation in topic.conversations {
            // One question, one answer; the same question twice would leak into the held-out rows.
            let [question, answer, ..] = conversation.as_slice() else { continue };
            if !seen.insert(question.to_lowercase()) {
                continue;
            }
            let row = serde_json::json!({"messages": [
                {"role": "user", "content": question.trim()},
                {"role": "assistant", "content": answer.trim()},
            ]});
            let split = if number % HELD_OUT == 0 { &mut validation } else { &mut train };
            // Writing to a String cannot fail.
            let _ = writeln!(split, "{row}");
            number += 1;
        }
    }
    std::fs::write(to.join("train.jsonl"), train)?;
    std::fs::write(to.join("validation.jsonl"), validation)?;
    Ok(())
}
