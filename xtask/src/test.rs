//! The README's second command: everything that proves the product.
//!
//! One run of the test runner over the workspace, with what the tests need prepared before: libtorch,
//! a real model, a real S3 server. A need that is missing is said by name; in CI it is a failure.

use std::{
    io::{BufRead, BufReader},
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use crate::{build, libtorch, model, s3::Server, shell};

/// What one test binary came to.
struct Part {
    name: String,
    passed: u64,
    failed: u64,
    seconds: f64,
}

/// Prepares what the tests need and runs them.
pub(crate) fn run() -> Result<()> {
    let started = Instant::now();
    let mut command = shell::cargo(&[
        "test",
        "--release",
        "--workspace",
        "--no-fail-fast",
        "--",
        "--show-output",
    ]);
    command.env("LIBTORCH", libtorch::directory()?).env("INSTA_UPDATE", "no");
    // Doubles of what tests need must not come from the user's own shell.
    for name in ["FINETUNE_TEST_S3_ENDPOINT", "FINETUNE_TEST_S3_BUCKET", "FINETUNE_TEST_MODEL"] {
        command.env_remove(name);
    }
    let binaries = build::run()?;
    let mut missing = Vec::new();
    match model::directory(&binaries) {
        Ok(model) => {
            command.env("FINETUNE_TEST_MODEL", model);
        }
        Err(error) => missing.push(format!("SKIPPED runs on a real model: {error:#}")),
    }
    let server = match Server::start() {
        Ok(server) => {
            command.envs(server.environment());
            Some(server)
        }
        Err(error) => {
            missing.push(format!("SKIPPED tests on a real S3 server: {error:#}"));
            None
        }
    };
    for line in &missing {
        println!("{line}");
    }
    println!("prepared in {:.0} s; testing", started.elapsed().as_secs_f64());
    let (parts, skipped) = run_tests(command)?;
    drop(server);
    report(&parts, skipped, &missing, started.elapsed())
}

fn run_tests(mut command: std::process::Command) -> Result<(Vec<Part>, u64)> {
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot start cargo")?;
    let messages = child.stderr.take().context("cargo has no standard error")?;
    let names = std::thread::spawn(move || {
        let mut names = Vec::new();
        for line in BufReader::new(messages).lines().map_while(Result::ok) {
            if let Some(rest) = line.trim_start().strip_prefix("Running ") {
                names.push(rest.split(" (").next().unwrap_or(rest).to_owned());
            } else if let Some(rest) = line.trim_start().strip_prefix("Doc-tests ") {
                names.push(format!("documentation of {rest}"));
            } else {
                eprintln_line(&line);
            }
        }
        names
    });
    let (mut results, mut skipped) = (Vec::new(), 0);
    let lines = child.stdout.take().context("cargo has no standard output")?;
    let mut is_failure_text = false;
    for line in BufReader::new(lines).lines().map_while(Result::ok) {
        if let Some(result) = parse_result(&line) {
            results.push(result);
            is_failure_text = false;
        }
        is_failure_text |= line == "failures:";
        let is_skip = line.starts_with("SKIPPED");
        skipped += u64::from(is_skip);
        // Output of tests that passed would bury what matters.
        if is_failure_text || is_skip || line.starts_with("test ") {
            println!("{line}");
        }
    }
    child.wait()?;
    let names = names.join().unwrap_or_default();
    let parts = results.into_iter().enumerate().map(|(index, (passed, failed, seconds))| Part {
        name: names.get(index).cloned().unwrap_or_else(|| "?".to_owned()),
        passed,
        failed,
        seconds,
    });
    Ok((parts.collect(), skipped))
}

/// Reads `test result: ok. 3 passed; 0 failed; 0 ignored; …; finished in 0.01s`.
fn parse_result(line: &str) -> Option<(u64, u64, f64)> {
    let rest = line.strip_prefix("test result: ")?;
    let number = |word: &str| {
        let before = rest.split(word).next()?;
        before.trim_end().rsplit([' ', ';']).next()?.parse().ok()
    };
    let seconds = rest.rsplit("finished in ").next()?.trim_end_matches('s').parse().ok()?;
    Some((number(" passed")?, number(" failed")?, seconds))
}

fn report(parts: &[Part], skipped: u64, missing: &[String], elapsed: Duration) -> Result<()> {
    println!("\n{:<52} {:>7} {:>7} {:>9}", "part", "passed", "failed", "seconds");
    for part in parts.iter().filter(|part| part.passed + part.failed > 0) {
        println!("{:<52} {:>7} {:>7} {:>9.1}", part.name, part.passed, part.failed, part.seconds);
    }
    for line in missing {
        println!("{line}");
    }
    println!("all in {:.0} s", elapsed.as_secs_f64());
    let passed: u64 = parts.iter().map(|part| part.passed).sum();
    let failed: u64 = parts.iter().map(|part| part.failed).sum();
    let skipped = skipped + missing.len() as u64;
    println!("{passed} passed, {failed} failed, {skipped} skipped");
    if passed == 0 || failed > 0 {
        bail!("the tests failed");
    }
    if shell::is_ci() && skipped > 0 {
        bail!("in CI nothing may be skipped");
    }
    Ok(())
}

#[expect(clippy::print_stderr, reason = "cargo's own messages belong there")]
fn eprintln_line(line: &str) {
    eprintln!("{line}");
}

#[cfg(test)]
mod tests {
    use super::parse_result;

    #[test]
    fn reads_the_runners_closing_line() {
        let line = "test result: FAILED. 12 passed; 3 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.25s";
        assert_eq!(parse_result(line), Some((12, 3, 1.25)));
        assert_eq!(parse_result("test a::b ... ok"), None);
    }
}
