//! What can be checked without running the product.

use anyhow::Result;

use crate::{
    generate,
    tools::{libtorch, shell},
};

/// Checks formatting, lints, documentation, generated files and licences.
pub(crate) fn run() -> Result<()> {
    let libtorch = libtorch::directory()?;
    shell::run(&mut shell::cargo(&["fmt", "--all", "--check"]))?;
    // The cluster's tests have `test = false`, so they are no part of all targets.
    for targets in [&["--all-targets"][..], &["--test", "cluster"]] {
        let mut clippy = shell::cargo(&["clippy", "--release", "--workspace"]);
        clippy.args(targets).args(["--", "-D", "warnings"]).env("LIBTORCH", &libtorch);
        shell::run(&mut clippy)?;
    }
    shell::run(
        shell::cargo(&["doc", "--release", "--workspace", "--no-deps", "--quiet"])
            .env("LIBTORCH", &libtorch)
            .env("RUSTDOCFLAGS", "-D warnings"),
    )?;
    generate::run(true)?;
    if shell::has("cargo-deny", "--version") {
        shell::run(&mut shell::cargo(&[
            "deny",
            "--workspace",
            "check",
            "licenses",
            "bans",
            "sources",
        ]))?;
    } else {
        println!(
            "SKIPPED licences, bans and sources: cargo-deny is not installed (cargo install cargo-deny --locked)"
        );
    }
    println!("checked");
    Ok(())
}
