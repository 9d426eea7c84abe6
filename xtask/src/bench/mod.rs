//! Our trainer beside transformers + PEFT: the same weights, tokens and settings, in turn.

mod kind;
mod limit;
mod losses;
mod memory;
mod operator;
pub(crate) mod plot;
mod rows;
mod table;

use std::{
    fmt,
    path::{Path, PathBuf},
    process::Command,
    str::FromStr,
};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Subcommand, ValueEnum};
use finetune_contract::process::environment::GOMP_SPINCOUNT;
use serde::Deserialize;

use crate::{
    bench::{limit::Limit, table::Measured},
    build::{self, Binaries},
    fixtures::{dataset, model},
    parity,
    tools::shell,
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
    Trainer(Settings),
    /// The memory of training steps; writes docs/memory.csv.
    Memory,
    /// How far bf16 leads losses away from fp32, beside the peer; writes docs/losses.csv.
    Losses(losses::Settings),
    /// Reading and tokenising chat rows, beside datasets and transformers.
    Rows(rows::Settings),
    /// Jobs of the operator, on a real apiserver whose pods never run.
    Operator {
        /// FineTuneJobs there are when it starts.
        #[arg(long, default_value_t = 1000)]
        jobs: usize,
    },
}

#[derive(Debug, Args)]
struct Settings {
    /// Also measure transformers + PEFT, round by round in turn.
    #[arg(long)]
    peer: bool,
    /// Rounds of each.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// What is trained; each with each shape.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "lora")]
    method: Vec<Method>,
    /// Rows and tokens of a step, such as 4x256,2x1024,4x50-1000 (rows of 50 to 1,000 tokens).
    #[arg(long, value_delimiter = ',', default_value = "4x256")]
    shape: Vec<Shape>,
    /// Dropout on the adapters' inputs.
    #[arg(long, default_value_t = 0.0)]
    dropout: f64,
    /// Element type of the weights.
    #[arg(long, value_enum, default_value = "bf16")]
    dtype: Dtype,
    /// Keep only the input of each block.
    #[arg(long)]
    recompute: bool,
    /// Have the peer's adapters in the element type of the weights too; PEFT's default is fp32, and
    /// so are ours.
    #[arg(long)]
    peer_narrow_adapters: bool,
    /// Compile the peer's model with torch.compile.
    #[arg(long)]
    peer_compile: bool,
    /// Tell where our steps' time goes, by operator.
    #[arg(long)]
    profile: bool,
    /// Put what is measured beside the peer into the table of this kind of CPU in docs/bench, in place of
    /// what was there of the same name, and draw it.
    #[arg(long, requires = "peer")]
    publish: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Method {
    Lora,
    Full,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Dtype {
    Bf16,
    Fp32,
}

/// Rows of one step and tokens of one row.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    /// Rows of one step.
    pub rows: usize,
    /// Tokens of the shortest row.
    pub shortest: usize,
    /// Tokens of the longest row.
    pub length: usize,
}

impl FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = text.split_once('x').and_then(|(rows, lengths)| {
            let (shortest, length) = lengths.split_once('-').unwrap_or((lengths, lengths));
            Some(Self {
                rows: rows.parse().ok()?,
                shortest: shortest.parse().ok()?,
                length: length.parse().ok()?,
            })
        });
        parsed.ok_or_else(|| "must be rows x tokens, such as 4x256 or 4x50-1000".to_owned())
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rows, shortest, length } = self;
        if shortest == length {
            write!(formatter, "{rows}x{length}")
        } else {
            write!(formatter, "{rows}x{shortest}-{length}")
        }
    }
}

/// What one process printed.
#[derive(Debug, Deserialize)]
pub(crate) struct Figures {
    step_seconds: Vec<f64>,
    step_tokens: Vec<f64>,
    /// Of every step, the first ones included.
    pub losses: Vec<f64>,
    /// The largest anonymous memory, in bytes.
    pub peak_anonymous_bytes: f64,
    #[serde(default)]
    profile: Vec<(String, f64, f64)>,
}

impl Figures {
    /// Returns tokens per second of the median step, which one disturbed step does not move.
    ///
    /// Padding does not count.
    fn tokens_per_second(&self) -> f64 {
        let speeds = self.step_tokens.iter().zip(&self.step_seconds);
        median(&speeds.map(|(tokens, seconds)| tokens / seconds).collect::<Vec<_>>())
    }
}

/// Measures.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let settings = match &arguments.what {
        What::Trainer(settings) => settings,
        What::Memory => return memory::run(),
        What::Losses(settings) => return losses::run(settings),
        What::Rows(settings) => return rows::run(settings),
        What::Operator { jobs } => return operator::run(*jobs),
    };
    ensure!(settings.rounds > 0, "--rounds is 0, must be at least 1");
    let binaries = build::run()?;
    let model = model::directory(&binaries)?;
    let python = if settings.peer { Some(parity::python()?) } else { None };
    let limit = limit::measure(&binaries, &model)?;
    println!("{}: {}", kind::here()?, limit.describe());
    let bench = Bench { settings, binaries, model, python, limit };
    for &method in &settings.method {
        for &shape in &settings.shape {
            bench.measure(method, shape)?;
        }
    }
    Ok(())
}

/// What every measurement needs.
struct Bench<'a> {
    settings: &'a Settings,
    binaries: Binaries,
    model: PathBuf,
    python: Option<PathBuf>,
    limit: Limit,
}

impl Bench<'_> {
    /// Measures one method on one shape, all rounds of it.
    fn measure(&self, method: Method, shape: Shape) -> Result<()> {
        let Self { settings, binaries, model, python, limit } = self;
        let rows = prepare_rows(binaries, model, shape)?;
        let mut flags = vec![
            format!("--model={}", model.display()),
            format!("--rows={}", rows.display()),
            format!("--batch={}", shape.rows),
            format!("--dropout={}", settings.dropout),
            format!("--dtype={}", word(settings.dtype)),
        ];
        flags.extend((method == Method::Full).then(|| "--full".to_owned()));
        flags.extend(settings.recompute.then(|| "--recompute".to_owned()));
        let mut name = format!("{}-{}-{shape}", word(method), word(settings.dtype));
        for (is_on, suffix) in [
            (settings.dropout > 0.0, "dropout"),
            (settings.recompute, "recompute"),
            (settings.peer_compile, "compiled"),
        ] {
            name += &if is_on { format!("-{suffix}") } else { String::new() };
        }
        println!("\n── {name}, dropout {}", settings.dropout);

        let mut csv = "round,trainer,step,seconds,loss,peak_anonymous_bytes\n".to_owned();
        let (mut ours_speeds, mut speeds, mut memories) = (Vec::new(), Vec::new(), Vec::new());
        for round in 1..=settings.rounds {
            let mut command = ours(&binaries.trainer);
            command.args(&flags).args(settings.profile.then_some("--profile"));
            let ours = figures(&mut command)?;
            record(&mut csv, round, "ours", &ours);
            ours_speeds.push(ours.tokens_per_second());
            if let Some(python) = python {
                let mut command = peer(python);
                command.args(&flags);
                command.args(settings.peer_narrow_adapters.then_some("--narrow-adapters"));
                command.args(settings.peer_compile.then_some("--compile"));
                let peer = figures(&mut command)?;
                record(&mut csv, round, "peer", &peer);
                require_same_work(&ours, &peer, settings.dtype)?;
                speeds.push(ours.tokens_per_second() / peer.tokens_per_second());
                memories.push(peer.peak_anonymous_bytes / ours.peak_anonymous_bytes);
            }
        }
        if python.is_some() {
            println!("speed, ours / peer:   {}", spread(&speeds));
            println!("memory, peer / ours:  {}", spread(&memories));
        }
        if settings.publish {
            table::publish(&Measured {
                name: name.clone(),
                rounds: settings.rounds,
                tokens_per_second: median(&ours_speeds),
                speed: median(&speeds),
                memory: median(&memories),
            })?;
        }
        let gflops = match settings.dtype {
            Dtype::Bf16 => limit.machine.bf16_gflops,
            Dtype::Fp32 => limit.machine.fp32_gflops,
        };
        let most = limit.tokens_per_second(gflops, method == Method::Lora, settings.recompute);
        if let Some(most) = most {
            let part = 100.0 * median(&ours_speeds) / most;
            println!("of bare matrix products: {part:.0} % ({most:.0} tok/s)");
        }
        let path = shell::root().join(format!("target/bench-{name}.csv"));
        std::fs::write(&path, csv)?;
        println!("every step: {}", path.display());
        Ok(())
    }
}

/// Returns the command that times steps of ours.
pub(crate) fn ours(trainer: &Path) -> Command {
    let mut command = Command::new(trainer);
    command.env(GOMP_SPINCOUNT.0, GOMP_SPINCOUNT.1);
    command.arg("bench");
    command
}

/// Returns the command that times steps of the peer; it takes the same arguments.
pub(crate) fn peer(python: &Path) -> Command {
    let mut command = Command::new(python);
    command.arg(shell::root().join("bench/peer.py"));
    command
}

/// Prints the figures of one process and adds them to the table.
fn record(csv: &mut String, round: usize, trainer: &str, figures: &Figures) {
    let first_timed = figures.losses.len().saturating_sub(figures.step_seconds.len());
    for (step, seconds) in figures.step_seconds.iter().enumerate() {
        let loss = figures.losses.get(first_timed + step).copied().unwrap_or(f64::NAN);
        *csv += &format!(
            "{round},{trainer},{step},{seconds},{loss},{}\n",
            figures.peak_anonymous_bytes
        );
    }
    let [first, last] = [figures.losses.first(), figures.losses.last()]
        .map(|loss| loss.copied().unwrap_or(f64::NAN));
    println!(
        "round {round}, {trainer} {:>7.0} tok/s  {:>6.0} MB anonymous  loss {first:.4} → {last:.4}",
        figures.tokens_per_second(),
        figures.peak_anonymous_bytes / 1e6
    );
    let whole: f64 = figures.step_seconds.iter().sum::<f64>() / figures.step_seconds.len() as f64;
    for (operator, seconds, calls) in &figures.profile {
        println!(
            "  {:>5.1} %  {:>8.1} ms  {calls:>5} calls  {operator}",
            100.0 * seconds / whole,
            1e3 * seconds
        );
    }
}

/// Fails if the first losses differ: then the weights, tokens or labels were not the same.
fn require_same_work(ours: &Figures, peer: &Figures, dtype: Dtype) -> Result<()> {
    let tolerance = match dtype {
        // The peer rounds its logits to bf16, to 2^-9 of them.
        Dtype::Bf16 => 2e-3,
        Dtype::Fp32 => 1e-5,
    };
    let (Some(ours), Some(peer)) = (ours.losses.first(), peer.losses.first()) else {
        bail!("no step was done");
    };
    ensure!(
        (ours - peer).abs() <= tolerance * peer,
        "the first losses differ by more than {tolerance} of them ({ours} and {peer}): this is not the same work"
    );
    Ok(())
}

/// Prepares rows of real tokens; every token is a target.
pub(crate) fn prepare_rows(binaries: &Binaries, model: &Path, shape: Shape) -> Result<PathBuf> {
    let Shape { shortest, length, .. } = shape;
    let rows = shell::root().join(format!("target/bench-rows-{shortest}-{length}.json"));
    let text = dataset::files()?.train;
    shell::run(
        Command::new(&binaries.trainer)
            .args(["bench", "--steps=0", "--warmup=0"])
            .arg(format!("--length={length}"))
            .arg(format!("--shortest={shortest}"))
            .arg("--text")
            .arg(text)
            .arg("--model")
            .arg(model)
            .arg("--rows")
            .arg(&rows)
            .stdout(std::process::Stdio::null()),
    )?;
    Ok(rows)
}

/// Runs one process with one thread per core, and reads its last line.
pub(crate) fn figures(command: &mut Command) -> Result<Figures> {
    let threads = std::thread::available_parallelism()?;
    let printed = shell::output(command.env("OMP_NUM_THREADS", threads.to_string()))?;
    let last = printed.lines().last().unwrap_or_default();
    serde_json::from_str(last).with_context(|| format!("no figures in {last:?}"))
}

fn word(value: impl ValueEnum) -> String {
    value.to_possible_value().map(|word| word.get_name().to_owned()).unwrap_or_default()
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        length => f64::midpoint(sorted[(length - 1) / 2], sorted[length / 2]),
    }
}

pub(crate) fn spread(ratios: &[f64]) -> String {
    let low = ratios.iter().copied().fold(f64::INFINITY, f64::min);
    let high = ratios.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    format!("{:.2}x (median of {}, {low:.2} to {high:.2})", median(ratios), ratios.len())
}
