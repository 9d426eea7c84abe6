//! `cargo xtask`: the project's automation. It needs cargo, Python 3 with pip and a C++ compiler.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "this is a command people read")]

mod bench;
mod build;
mod check;
mod cluster;
mod demo;
mod e2e;
mod fixtures;
mod generate;
mod images;
mod parity;
mod reference;
mod release;
mod runner;
mod test;
mod tools;

use std::process::ExitCode;

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
    Build {
        /// Build the trainer that computes on GPUs, into target/cuda/release.
        #[arg(long)]
        cuda: bool,
    },
    /// Builds the images of operator and trainer as OCI archives in target/images.
    Images {
        /// Build the image of the trainer that computes on GPUs instead; it has some gigabytes.
        #[arg(long)]
        cuda: bool,
    },
    /// Runs everything that proves the product.
    Test,
    /// Runs the tests that need a cluster, on a cluster of their own.
    E2e {
        /// Only the tests whose names contain one of these; name the module first, such as `ranks::`.
        tests: Vec<String>,
    },
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
    /// A real Kubernetes on this machine, built from source; needs root and Go.
    #[command(subcommand)]
    Cluster(cluster::Action),
    /// Gives crates, chart and changelog a new version, commits and tags it; pushes nothing.
    Release(release::Arguments),
    /// Measures.
    Bench(bench::Arguments),
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Demo(arguments) => demo::run(&arguments).map(|()| ExitCode::SUCCESS),
        Command::Build { cuda: true } => build::run_cuda().map(|_| ExitCode::SUCCESS),
        Command::Build { cuda: false } => build::run().map(|_| ExitCode::SUCCESS),
        Command::Images { cuda: true } => images::run_cuda().map(|()| ExitCode::SUCCESS),
        Command::Images { cuda: false } => images::run().map(|_| ExitCode::SUCCESS),
        Command::Test => test::run(),
        Command::E2e { tests } => e2e::run(&tests),
        Command::Check => check::run().map(|()| ExitCode::SUCCESS),
        Command::Generate { check } => generate::run(check).map(|()| ExitCode::SUCCESS),
        Command::Parity => parity::run().map(|()| ExitCode::SUCCESS),
        Command::Cluster(action) => cluster::run(action),
        Command::Release(arguments) => release::run(&arguments).map(|()| ExitCode::SUCCESS),
        Command::Bench(arguments) => bench::run(&arguments).map(|()| ExitCode::SUCCESS),
    };
    done.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
