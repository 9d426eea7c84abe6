//! `cargo xtask`: the project's automation. It needs cargo and Python 3 with pip, nothing else.
#![expect(clippy::print_stdout, reason = "this is a command people read")]

mod bench;
mod build;
mod cache;
mod check;
mod dataset;
mod demo;
mod generate;
mod libtorch;
mod model;
mod parity;
mod plot;
mod python;
mod s3;
mod shell;
mod test;

use clap::{Parser, Subcommand};

/// The project's automation.
#[derive(Debug, Parser)]
#[command(bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Fetches a real model and dataset, fine-tunes, and shows what changed.
    Demo(demo::Arguments),
    /// Builds both binaries into target/release.
    Build,
    /// Runs everything that proves the product.
    Test,
    /// Formatting, lints, documentation, licences, generated files.
    Check,
    /// Writes the files that are generated from the code.
    Generate {
        /// Fail if a file would change, and change none.
        #[arg(long)]
        check: bool,
    },
    /// Compares exports with transformers and PEFT, in an environment of its own.
    Parity,
    /// Measures.
    Bench(bench::Arguments),
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Demo(arguments) => demo::run(&arguments),
        Command::Build => build::run().map(|_| ()),
        Command::Test => test::run(),
        Command::Check => check::run(),
        Command::Generate { check } => generate::run(check),
        Command::Parity => parity::run(),
        Command::Bench(arguments) => bench::run(&arguments),
    }
}
