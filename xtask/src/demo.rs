//! The README's first command: a real model, real data, one manifest, and what changed.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use clap::Args;
use finetune_contract::{Progress, Stage};

use crate::{
    bench::plot::{self, Curve},
    build::{self, Binaries},
    fixtures::{dataset, model},
    tools::shell,
};

/// Held-out questions asked before and after.
const QUESTIONS: usize = 4;

/// How to show it.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Train everything instead of an adapter.
    #[arg(long)]
    full: bool,
    /// Throw away what an earlier demo left and start again.
    #[arg(long)]
    fresh: bool,
}

/// Runs the demo.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let binaries = build::run()?;
    let model = model::directory(&binaries)?;
    let data = dataset::files()?;
    let name = if arguments.full { "demo-full" } else { "demo-lora" };
    let directory = shell::root().join("target").join(name);
    if arguments.fresh && directory.exists() {
        std::fs::remove_dir_all(&directory)?;
    }
    std::fs::create_dir_all(&directory)?;

    let manifest = manifest(name, arguments.full, &model, &data, &directory);
    let job = directory.join("job.yaml");
    std::fs::write(&job, &manifest)?;
    heading(&format!("The manifest ({})", job.display()));
    print!("{manifest}");

    let work_dir = directory.join("work");
    heading("finetune run: preflight, plan, train, export, publish, prove");
    println!("{} plan -f … shows what would run, and stops there.\n", relative(&binaries.finetune));
    shell::run(
        Command::new(&binaries.finetune)
            .arg("run")
            .arg("-f")
            .arg(&job)
            .arg("--work-dir")
            .arg(&work_dir),
    )
    .context("the same command goes on where it stopped; with --fresh it starts again")?;
    let output = directory.join("output");
    heading("finetune verify: the published files, read back");
    shell::run(Command::new(&binaries.finetune).arg("verify").arg(uri(&output)))?;

    let curves = curves(&work_dir)?;
    let picture = directory.join("loss.svg");
    let title = format!(
        "SmolLM2-135M-Instruct on chatterbot-corpus, {}",
        if arguments.full { "full-parameter" } else { "LoRA r 8" }
    );
    std::fs::write(&picture, plot::svg(&title, &curves))?;
    heading("Loss");
    for curve in &curves {
        let values: Vec<f64> = curve.points.iter().map(|point| point.1).collect();
        if let (Some(first), Some(last)) = (values.first(), values.last()) {
            println!("{:<16} {first:.3} {} {last:.3}", curve.name, plot::sparkline(&values));
        }
    }
    println!("as a picture: {}", picture.display());

    heading("Questions it was not trained on, before and after");
    for question in dataset::questions(&data, QUESTIONS)? {
        println!("\n  {question}");
        let before = generate(&binaries, &model, None, &question)?;
        let after = if arguments.full {
            generate(&binaries, &output, None, &question)?
        } else {
            generate(&binaries, &model, Some(&output), &question)?
        };
        println!("    before: {}", shortened(&before));
        println!("    after:  {}", shortened(&after));
    }

    heading("What next");
    println!(
        "The result is in {}: load it with PEFT, transformers or vLLM (its README.md says how).",
        output.display()
    );
    println!(
        "Ask it yourself:\n  {} generate --model {} {}--prompt \"what is a wavelength\"",
        relative(&binaries.finetune),
        if arguments.full { output.display() } else { model.display() },
        if arguments.full { String::new() } else { format!("--adapter {} ", output.display()) }
    );
    println!(
        "Change {} (another rank, your own JSONL) and run it:\n  {} run -f {}",
        relative(&job),
        relative(&binaries.finetune),
        relative(&job)
    );
    if !arguments.full {
        println!("Train every parameter instead of an adapter:\n  cargo xtask demo --full");
    }
    Ok(())
}

fn manifest(
    name: &str,
    full: bool,
    model: &Path,
    data: &dataset::Files,
    directory: &Path,
) -> String {
    let method = if full {
        ""
    } else {
        "  loraConfig: { r: 8, loraAlpha: 16, loraDropout: 0.05 }   # leave the block out: full-parameter\n"
    };
    let (rate, steps) = if full { ("3.0e-5", 40) } else { ("5.0e-4", 60) };
    format!(
        "apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata: {{ name: {name} }}
spec:
  model:   {{ uri: \"{}\" }}
  dataset: {{ train: \"{}\", validation: \"{}\" }}
{method}  training: {{ learningRate: {rate}, maxSteps: {steps} }}
  output:  {{ uri: \"{}\", baseModelName: HuggingFaceTB/SmolLM2-135M-Instruct }}
",
        uri(model),
        uri(&data.train),
        uri(&data.validation),
        uri(&directory.join("output")),
    )
}

fn uri(path: &Path) -> String {
    format!("file://{}", path.display())
}

fn generate(
    binaries: &Binaries,
    model: &Path,
    adapter: Option<&Path>,
    question: &str,
) -> Result<String> {
    let mut command = Command::new(&binaries.finetune);
    command.arg("generate").arg("--model").arg(model);
    if let Some(adapter) = adapter {
        command.arg("--adapter").arg(adapter);
    }
    command.args(["--max-new-tokens", "48", "--prompt", question]);
    shell::output(&mut command)
}

/// Reads the history the trainer wrote.
///
/// A run that was killed did some steps twice; what was said last of a step counts.
fn curves(work_dir: &Path) -> Result<Vec<Curve>> {
    let path = work_dir.join("metrics.jsonl");
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("cannot read {}", path.display()))?;
    let (mut training, mut validation) = (BTreeMap::new(), BTreeMap::new());
    // The last line of a killed run may be half written.
    for progress in text.lines().filter_map(|line| finetune_contract::parse::<Progress>(line).ok())
    {
        match (progress.stage, progress.loss, progress.eval_loss) {
            (Stage::Training, Some(loss), _) => training.insert(progress.step, loss),
            (Stage::Evaluating, _, Some(loss)) => validation.insert(progress.step, loss),
            _ => None,
        };
    }
    let curve = |name, points: BTreeMap<u64, f64>| Curve {
        name,
        points: points.into_iter().map(|(step, loss)| (step as f64, loss)).collect(),
    };
    Ok(vec![curve("training loss", training), curve("validation loss", validation)])
}

fn heading(text: &str) {
    println!("\n── {text}");
}

fn shortened(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if line.chars().count() <= 150 { line } else { line.chars().take(149).chain(['…']).collect() }
}

fn relative(path: &Path) -> String {
    let here = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/"));
    path.strip_prefix(&here).unwrap_or(path).display().to_string()
}
