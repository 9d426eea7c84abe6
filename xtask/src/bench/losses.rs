//! How far bf16 leads a run away from fp32: ours, and transformers + PEFT's, on the same rows.
//!
//! Adapters start from other random numbers in each, so each is compared with itself.

use anyhow::Result;
use clap::Args;

use crate::{bench, build, fixtures::model, parity, tools::shell};

/// What to run.
#[derive(Debug, Args)]
pub(crate) struct Settings {
    /// Steps of each run, of 4 rows of 64 tokens.
    #[arg(long, default_value_t = 200)]
    steps: usize,
}

/// Runs both trainers in both types and writes every loss to docs/losses.csv.
pub(crate) fn run(settings: &Settings) -> Result<()> {
    let binaries = build::run()?;
    let model = model::directory(&binaries)?;
    let python = parity::python()?;
    let rows =
        bench::prepare_rows(&binaries, &model, bench::Shape { rows: 4, shortest: 64, length: 64 })?;
    let losses = |is_ours: bool, dtype: &str| -> Result<Vec<f64>> {
        let mut command =
            if is_ours { bench::ours(&binaries.trainer) } else { bench::peer(&python) };
        command.arg(format!("--model={}", model.display()));
        command.arg(format!("--rows={}", rows.display()));
        command.args(["--batch=4", "--dropout=0", "--warmup=0"]);
        command.arg(format!("--steps={}", settings.steps)).arg(format!("--dtype={dtype}"));
        Ok(bench::figures(&mut command)?.losses)
    };
    let mut columns = Vec::new();
    for is_ours in [true, false] {
        let [bf16, fp32] = [losses(is_ours, "bf16")?, losses(is_ours, "fp32")?];
        let apart: Vec<f64> = bf16.iter().zip(&fp32).map(|(one, other)| one - other).collect();
        let mean = apart.iter().sum::<f64>() / apart.len() as f64;
        let square = apart.iter().map(|apart| apart * apart).sum::<f64>() / apart.len() as f64;
        let largest = apart.iter().fold(0.0_f64, |largest, apart| largest.max(apart.abs()));
        let name = if is_ours { "ours" } else { "peer" };
        println!(
            "{name}: bf16 less fp32 over {} steps: mean {mean:+.5}, root mean square {:.5}, at most {largest:.4}",
            apart.len(),
            square.sqrt(),
        );
        columns.extend([bf16, fp32]);
    }
    let mut csv = "step,ours_bf16,ours_fp32,peer_bf16,peer_fp32\n".to_owned();
    for step in 0..settings.steps {
        let cells: Vec<String> =
            columns.iter().map(|column| format!("{:.6}", column[step])).collect();
        csv += &format!("{},{}\n", step + 1, cells.join(","));
    }
    let path = shell::root().join("docs/losses.csv");
    std::fs::write(&path, csv)?;
    println!("{}", path.display());
    Ok(())
}
