//! What a test needs of this machine, and what happens without it.

use std::path::PathBuf;

/// Finds a program that `cargo xtask test` prepares, or `fallback` on PATH; without one says so
/// loudly, or fails in CI.
pub(crate) fn program(part: &str, variable: &str, fallback: Option<&str>) -> Option<PathBuf> {
    if let Some(path) = std::env::var_os(variable).filter(|value| !value.is_empty()) {
        return Some(path.into());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut candidates =
        std::env::split_paths(&path).filter_map(|directory| Some(directory.join(fallback?)));
    if let Some(program) = candidates.find(|program| program.is_file()) {
        return Some(program);
    }
    let test = std::thread::current().name().unwrap_or_default().to_owned();
    let missing = format!("{variable} is not set");
    assert!(!std::env::var("CI").is_ok_and(|value| value == "true"), "{test}: {missing}");
    eprintln!("SKIPPED {part}: {test}: {missing}");
    None
}
