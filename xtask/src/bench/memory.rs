//! The memory of training steps, measured: the table that the plan's predictions are held against.
//!
//! Writes docs/memory.csv. A unit test of the plan reads it and fails if a prediction is more than
//! 5 % over or 2 % under.

use std::{path::Path, process::Command};

use anyhow::Result;

use crate::{
    bench::{self, Shape},
    build,
    fixtures::model,
    tools::shell,
};

/// Rows and tokens of a step.
const SHAPES: [&str; 5] = ["1x64", "8x64", "4x256", "1x1024", "2x1024"];

/// Measures every method, type and policy at every shape.
pub(crate) fn run() -> Result<()> {
    let binaries = build::run()?;
    let model = model::directory(&binaries)?;
    let mut csv = "method,dtype,recompute,rows,tokens,peak_anonymous_bytes\n".to_owned();
    for shape in SHAPES {
        let shape: Shape = shape.parse().map_err(anyhow::Error::msg)?;
        let rows = bench::prepare_rows(&binaries, &model, shape)?;
        for (method, is_full) in [("lora", false), ("full", true)] {
            for dtype in ["bf16", "fp32"] {
                for (recompute, is_on) in [("none", false), ("block", true)] {
                    let mut command = steps(&binaries.trainer, &model, &rows);
                    command.arg(format!("--batch={}", shape.rows)).arg(format!("--dtype={dtype}"));
                    command.args(is_full.then_some("--full"));
                    command.args(is_on.then_some("--recompute"));
                    let bytes = bench::figures(&mut command)?.peak_anonymous_bytes;
                    let line = format!(
                        "{method},{dtype},{recompute},{},{},{bytes}",
                        shape.rows, shape.length
                    );
                    println!("{line}");
                    csv += &line;
                    csv.push('\n');
                }
            }
        }
    }
    let path = shell::root().join("docs/memory.csv");
    std::fs::write(&path, csv)?;
    println!("{}", path.display());
    Ok(())
}

/// Three steps: later ones meet what the first left.
fn steps(trainer: &Path, model: &Path, rows: &Path) -> Command {
    let mut command = bench::ours(trainer);
    command.args(["--warmup=1", "--steps=2", "--model"]).arg(model);
    command.arg("--rows").arg(rows);
    command
}
