//! Our trainer beside transformers + PEFT: the same weights, tokens and settings, in turn.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use serde::Deserialize;

use crate::{
    build::{self, Binaries},
    dataset, model, parity, shell,
};

/// What to measure.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Training steps on SmolLM2-135M.
    Trainer {
        /// Also measure transformers + PEFT, round by round in turn.
        #[arg(long)]
        peer: bool,
        /// Rounds of each.
        #[arg(long, default_value_t = 5)]
        rounds: usize,
        /// Rows and tokens of a step, such as 4x256.
        #[arg(long, default_value = "4x256")]
        shape: String,
        /// Train everything instead of adapters.
        #[arg(long)]
        full: bool,
        /// Dropout on the adapters' inputs.
        #[arg(long, default_value_t = 0.0)]
        dropout: f64,
        /// Element type: bf16 or fp32.
        #[arg(long, default_value = "bf16")]
        dtype: String,
        /// Keep only the input of each block.
        #[arg(long)]
        recompute: bool,
    },
}

/// What one process printed.
#[derive(Debug, Deserialize)]
struct Figures {
    tokens_per_second: f64,
    losses: Vec<f64>,
    peak_anonymous_bytes: f64,
}

/// Measures.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let What::Trainer { peer, rounds, shape, full, dropout, dtype, recompute } = &arguments.what;
    let (batch, length) =
        shape.split_once('x').context("--shape is rows x tokens, such as 4x256")?;
    let binaries = build::run()?;
    let model = model::directory(&binaries)?;
    let rows = rows(&binaries, &model, length)?;
    let mut flags = vec![
        "--batch".to_owned(),
        batch.to_owned(),
        "--dropout".to_owned(),
        dropout.to_string(),
        "--dtype".to_owned(),
        dtype.clone(),
    ];
    flags.extend(full.then(|| "--full".to_owned()));
    flags.extend(recompute.then(|| "--recompute".to_owned()));
    let ours = || {
        let mut command = Command::new(&binaries.trainer);
        command.arg("bench").arg("--model").arg(&model).arg("--rows").arg(&rows).args(&flags);
        figures(&mut command)
    };
    if !peer {
        for round in 1..=*rounds {
            print_figures(&format!("round {round}"), &ours()?);
        }
        return Ok(());
    }
    let python = parity::python()?;
    let theirs = || {
        let mut command = Command::new(&python);
        command
            .arg(shell::root().join("bench/peer.py"))
            .arg("--model")
            .arg(&model)
            .arg("--rows")
            .arg(&rows)
            .args(&flags);
        figures(&mut command)
    };
    compare(*rounds, shape, ours, theirs)
}

fn compare(
    rounds: usize,
    shape: &str,
    ours: impl Fn() -> Result<Figures>,
    theirs: impl Fn() -> Result<Figures>,
) -> Result<()> {
    let (mut speeds, mut memories) = (Vec::new(), Vec::new());
    let mut csv =
        "round,ours_tokens_per_second,peer_tokens_per_second,ours_peak_bytes,peer_peak_bytes\n"
            .to_owned();
    for round in 1..=rounds {
        let (ours, theirs) = (ours()?, theirs()?);
        print_figures(&format!("round {round}, ours"), &ours);
        print_figures(&format!("round {round}, peer"), &theirs);
        let (first, expected) = (ours.losses[0], theirs.losses[0]);
        if (first - expected).abs() > 2e-3 * expected {
            bail!("the first losses differ ({first} and {expected}): this is not the same work");
        }
        speeds.push(ours.tokens_per_second / theirs.tokens_per_second);
        memories.push(theirs.peak_anonymous_bytes / ours.peak_anonymous_bytes);
        csv += &format!(
            "{round},{},{},{},{}\n",
            ours.tokens_per_second,
            theirs.tokens_per_second,
            ours.peak_anonymous_bytes,
            theirs.peak_anonymous_bytes
        );
    }
    let path = shell::root().join(format!("target/bench-{shape}.csv"));
    std::fs::write(&path, csv)?;
    println!("speed, ours / peer:   {}", spread(&mut speeds));
    println!("memory, peer / ours:  {}", spread(&mut memories));
    println!("every round: {}", path.display());
    Ok(())
}

/// Makes rows of real tokens, once.
fn rows(binaries: &Binaries, model: &Path, length: &str) -> Result<PathBuf> {
    let rows = shell::root().join(format!("target/bench-rows-{length}.json"));
    let text = dataset::files()?.train;
    shell::run(
        Command::new(&binaries.trainer)
            .args(["bench", "--length", length, "--steps", "0", "--warmup", "0", "--text"])
            .arg(text)
            .arg("--model")
            .arg(model)
            .arg("--rows")
            .arg(&rows),
    )?;
    Ok(rows)
}

fn figures(command: &mut Command) -> Result<Figures> {
    let printed = shell::output(command)?;
    let last = printed.lines().last().unwrap_or_default();
    serde_json::from_str(last).with_context(|| format!("no figures in {last:?}"))
}

fn print_figures(what: &str, figures: &Figures) {
    let [first, last] = [figures.losses.first(), figures.losses.last()]
        .map(|loss| loss.copied().unwrap_or(f64::NAN));
    println!(
        "{what:<16} {:>7.0} tok/s  {:>6.0} MB anonymous  loss {first:.4} → {last:.4}",
        figures.tokens_per_second,
        figures.peak_anonymous_bytes / 1e6
    );
}

fn spread(ratios: &mut [f64]) -> String {
    ratios.sort_by(f64::total_cmp);
    let median = ratios.get(ratios.len() / 2).copied().unwrap_or(f64::NAN);
    let [low, high] =
        [ratios.first(), ratios.last()].map(|ratio| ratio.copied().unwrap_or(f64::NAN));
    format!("{median:.2}x (median of {}, {low:.2} to {high:.2})", ratios.len())
}
