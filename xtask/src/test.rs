//! The README's second command: everything that proves the product.
//!
//! One run of the test runner over the workspace, with what the tests need prepared before: libtorch,
//! a real model, a real S3 server, helm and promtool; then the tests on a real Kubernetes. A need that
//! is missing is said by name; in CI it is a failure.

use std::{
    io::{BufRead, BufReader},
    process::{Command, ExitCode},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

use crate::{
    build, cluster,
    e2e::{self, Phase},
    fixtures::{model, s3::Server},
    runner::{Part, Reader},
    tools::{libtorch, promtool, shell},
};

/// What was prepared, and what could not be.
#[derive(Default)]
struct Preparation {
    seconds: Vec<(&'static str, f64)>,
    missing: Vec<String>,
}

impl Preparation {
    fn step<T>(&mut self, name: &'static str, make: impl FnOnce() -> Result<T>) -> Result<T> {
        let started = Instant::now();
        let made = make();
        self.seconds.push((name, started.elapsed().as_secs_f64()));
        made
    }

    /// Prepares what tests can do without: they are skipped, loudly.
    fn need<T>(&mut self, name: &'static str, make: impl FnOnce() -> Result<T>) -> Option<T> {
        let made = self.step(name, make);
        made.map_err(|error| self.missing.push(format!("SKIPPED tests with {name}: {error:#}")))
            .ok()
    }
}

/// Prepares what the tests need and runs them.
pub(crate) fn run() -> Result<ExitCode> {
    let started = Instant::now();
    let mut preparation = Preparation::default();
    let libtorch = preparation.step("libtorch", libtorch::directory)?;
    let binaries = preparation.step("both binaries", build::run)?;
    let model = preparation.need("a real model", || model::directory(&binaries));
    let cluster_model = model.clone();
    let server = preparation.need("a real S3 server", Server::start);
    let helm = preparation.need("helm", cluster::binaries::helm);
    let promtool = preparation.need("promtool", promtool::find);
    for line in &preparation.missing {
        println!("{line}");
    }

    let mut command = shell::cargo(&["test", "--release", "--workspace", "--no-fail-fast"]);
    command.args(["--", "--show-output"]).env("LIBTORCH", libtorch).env("INSTA_UPDATE", "no");
    // What the user's own shell says of these is about something else.
    for name in [
        "FINETUNE_TEST_S3_ENDPOINT",
        "FINETUNE_TEST_S3_BUCKET",
        "FINETUNE_TEST_MODEL",
        "FINETUNE_TEST_HELM",
        "FINETUNE_TEST_PROMTOOL",
    ] {
        command.env_remove(name);
    }
    command.envs(model.map(|model| ("FINETUNE_TEST_MODEL", model)));
    command.envs(helm.map(|helm| ("FINETUNE_TEST_HELM", helm)));
    command.envs(promtool.map(|promtool| ("FINETUNE_TEST_PROMTOOL", promtool)));
    command.envs(server.iter().flat_map(Server::environment));
    let mut tests = Reader::default();
    let mut is_success = run_tests(command, &mut tests)?;
    drop(server);
    let cluster = cluster_model.and_then(|model| {
        preparation.need("a real Kubernetes", || e2e::prepare(&binaries, &model))
    });
    if let Some(line) = preparation.missing.last().filter(|_| cluster.is_none()) {
        println!("{line}");
    }
    for phase in [Phase::WithoutChart, Phase::WithChart] {
        let Some(cluster) = &cluster else { continue };
        match cluster.command(phase, &[]) {
            Ok(command) => is_success &= run_tests(command, &mut tests)?,
            Err(error) => {
                println!("FAILED: the cluster could not be made ready: {error:#}");
                is_success = false;
            }
        }
    }
    preparation.step("the cluster's end", || {
        drop(cluster);
        Ok(())
    })?;
    Ok(report(&preparation, &tests, is_success, started.elapsed()))
}

/// Runs tests, adds what they came to, and returns whether the runner was content.
fn run_tests(mut command: Command, reader: &mut Reader) -> Result<bool> {
    // One pipe for both, so that cargo's lines stay between those of the tests it names.
    let (lines, to_lines) = std::io::pipe()?;
    command.stdout(to_lines.try_clone()?).stderr(to_lines);
    let mut child = command.spawn().context("cannot start cargo")?;
    // The command holds the pipe's other end, which must be closed for the lines to end.
    drop(command);
    for line in BufReader::new(lines).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).into_owned();
        if reader.read(&line) {
            println!("{line}");
        }
    }
    reader.finish();
    Ok(child.wait()?.success())
}

/// Prints the tables and, last and alone on its line, the sum.
fn report(
    preparation: &Preparation,
    tests: &Reader,
    is_success: bool,
    elapsed: Duration,
) -> ExitCode {
    println!("\n{:<52} {:>7} {:>7} {:>9}", "part", "passed", "failed", "seconds");
    for (name, seconds) in &preparation.seconds {
        println!("{:<52} {:>7} {:>7} {seconds:>9.1}", format!("preparing {name}"), "", "");
    }
    for Part { name, passed, failed, seconds } in tests.parts.iter().filter(|part| !part.is_empty())
    {
        println!("{name:<52} {passed:>7} {failed:>7} {seconds:>9.1}");
    }
    println!("{:<52} {:>7} {:>7} {:>9.1}\n", "all", "", "", elapsed.as_secs_f64());
    for line in preparation.missing.iter().chain(&tests.skipped) {
        println!("{line}");
    }
    let passed: u64 = tests.parts.iter().map(|part| part.passed).sum();
    let failed: u64 = tests.parts.iter().map(|part| part.failed).sum();
    let skipped = preparation.missing.len() + tests.skipped.len();
    let is_incomplete = shell::is_ci() && skipped > 0;
    if is_incomplete {
        println!("FAILED: in CI nothing may be skipped");
    }
    if failed == 0 && !is_success {
        println!("FAILED: cargo test ended with an error, see above");
    }
    println!("{passed} passed, {failed} failed, {skipped} skipped");
    if is_success && passed > 0 && failed == 0 && !is_incomplete {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
