//! Reading and tokenising chat rows, beside `datasets` and `apply_chat_template` on the same file.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde::Deserialize;
use serde_json::json;

use crate::{
    bench, build,
    fixtures::{dataset, model},
    parity,
    tools::{cache, shell},
};

/// The peer's packages, beside those of the parity environment.
const PACKAGES: [&str; 9] = [
    "datasets==5.2.0",
    "dill==0.4.1",
    "multiprocess==0.70.19",
    "pandas==3.1.1",
    "pyarrow==26.0.1",
    "python-dateutil==4.0.0",
    "six==1.17.0",
    "tzdata==2026.6",
    "xxhash==4.1.0",
];
/// How often memory is looked at.
const POLL: Duration = Duration::from_millis(20);

/// How much is read.
#[derive(Debug, Args)]
pub(crate) struct Settings {
    /// Rows, of about 1 KB each.
    #[arg(long, default_value_t = 100_000)]
    rows: usize,
    /// Rounds of each, in turn.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
}

/// What one process did.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Figures {
    rows: usize,
    tokens: u64,
    seconds: f64,
    peak_bytes: f64,
}

/// Measures.
pub(crate) fn run(settings: &Settings) -> Result<()> {
    let binaries = build::run()?;
    let model = model::directory(&binaries)?;
    let python = parity::python()?;
    let packages = packages(&python)?;
    let script = shell::root().join("bench/rows.py");
    let rows = shell::root().join(format!("target/bench-rows-{}.jsonl", settings.rows));
    if !rows.exists() {
        let mut write = Command::new(&python);
        write.arg(&script).arg("write").arg(&rows).args(["--rows", &settings.rows.to_string()]);
        shell::run(write.arg("--text").arg(dataset::files()?.train))?;
    }
    let bytes = rows.metadata()?.len() as f64;
    let processes = thread::available_parallelism()?.to_string();
    println!("{} rows, {:.0} MB, {processes} cores", settings.rows, bytes / 1e6);
    let (mut speeds, mut memories) = (Vec::new(), Vec::new());
    for round in 1..=settings.rounds {
        let ours = ours(&binaries.trainer, &model, &rows)?;
        show(round, "ours", &ours);
        let mut peer = Command::new(&python);
        peer.env("PYTHONPATH", &packages).env("HF_HUB_OFFLINE", "1");
        peer.arg(&script).arg("read").arg(&rows).arg("--model").arg(&model);
        let text = shell::output(peer.args(["--processes", &processes]))?;
        let line = text.lines().last().context("the peer printed nothing")?;
        let peer: Figures = serde_json::from_str(line).context("the peer's figures")?;
        show(round, "peer", &peer);
        ensure!(
            (ours.rows, ours.tokens) == (peer.rows, peer.tokens),
            "rows or tokens differ: this is not the same work"
        );
        speeds.push(peer.seconds / ours.seconds);
        memories.push(peer.peak_bytes / ours.peak_bytes);
    }
    println!("speed, ours / peer:   {}", bench::spread(&speeds));
    println!("memory, peer / ours:  {}", bench::spread(&memories));
    Ok(())
}

fn show(round: usize, name: &str, figures: &Figures) {
    let Figures { rows, tokens, seconds, peak_bytes } = figures;
    println!(
        "round {round}, {name} {:>7.0} rows/s  {:>9.0} tok/s  {seconds:>6.1} s  {:>5.0} MB anonymous",
        *rows as f64 / seconds,
        *tokens as f64 / seconds,
        peak_bytes / 1e6
    );
}

/// Installs the peer's packages on the first call.
fn packages(python: &Path) -> Result<PathBuf> {
    let directory = cache::directory().join(PACKAGES[0].replace("==", "-"));
    if !directory.exists() {
        let partial = directory.with_extension("partial");
        let mut pip = Command::new(python);
        pip.args(["-m", "pip", "install", "--quiet", "--no-deps", "--target"]).arg(&partial);
        shell::run(pip.args(PACKAGES))?;
        std::fs::rename(&partial, &directory)?;
    }
    Ok(directory)
}

/// Runs our trainer's check of rows, which reads them as training does.
fn ours(trainer: &Path, model: &Path, rows: &Path) -> Result<Figures> {
    let work_dir = shell::root().join("target/tmp/bench-rows");
    std::fs::create_dir_all(&work_dir)?;
    let config = json!({
        "version": finetune_contract::CONTRACT_VERSION, "runId": "bench",
        "model": {"uri": format!("file://{}", model.display())},
        "dataset": {"train": format!("file://{}", rows.display()), "format": "auto", "onOverflow": "truncate"},
        "output": {"uri": "file:///nothing-is-written", "merge": false, "overwrite": false, "baseModelName": null},
        "measureMachine": false,
    });
    let path = work_dir.join("config.json");
    std::fs::write(&path, config.to_string())?;
    let started = Instant::now();
    let mut child = Command::new(trainer)
        .args(["data-check", "--rows=0", "--config"])
        .arg(&path)
        .arg("--work-dir")
        .arg(&work_dir)
        .stdout(Stdio::piped())
        .spawn()?;
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0.0_f64;
    while child.try_wait()?.is_none() {
        peak = peak.max(anonymous_bytes(&std::fs::read_to_string(&status).unwrap_or_default()));
        thread::sleep(POLL);
    }
    let seconds = started.elapsed().as_secs_f64();
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "finetune-trainer data-check failed");
    let text = String::from_utf8(output.stdout)?;
    let (rows, tokens) = counts(&text).with_context(|| format!("no counts in {text:?}"))?;
    Ok(Figures { rows, tokens, seconds, peak_bytes: peak })
}

fn anonymous_bytes(status: &str) -> f64 {
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let kilobytes = line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok());
    kilobytes.unwrap_or(0.0) * 1024.0
}

/// Reads "FILE: 220 rows, 2674 of 10492 tokens trained on".
fn counts(text: &str) -> Option<(usize, u64)> {
    let (_, counts) = text.lines().last()?.rsplit_once(": ")?;
    let mut words = counts.split_whitespace();
    let rows = words.next()?.parse().ok()?;
    let tokens = words.nth(3)?.parse().ok()?;
    Some((rows, tokens))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_read_from_the_last_line() {
        let text = "a.jsonl:1: 4 tokens\n\na.jsonl: 220 rows, 2674 of 10492 tokens trained on\n";
        assert_eq!(counts(text), Some((220, 10492)));
        assert!((anonymous_bytes("RssFile: 1 kB\nRssAnon:\t   2 kB\n") - 2048.0).abs() < 0.5);
    }
}
