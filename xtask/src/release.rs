//! Releases a version: crates, chart and examples get its number, the changelog its section, and
//! git a commit and a tag. Nothing is pushed.

use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::tools::shell;

/// Files that contain the current version, and the text around each occurrence.
const NAMED_IN: [(&str, &[&str]); 6] = [
    ("Cargo.toml", &["version = \"{}\"\nedition"]),
    ("charts/finetune-operator/Chart.yaml", &["\nversion: {}\n", "\nappVersion: {}\n"]),
    ("charts/finetune-operator/README.md", &["finetune-trainer-cuda:{}"]),
    ("charts/finetune-operator/values.yaml", &["finetune-trainer-cuda:{}"]),
    ("docs/OPERATIONS.md", &["finetune-trainer-cuda:{}"]),
    ("tests/chart/everything.values.yaml", &["finetune/trainer-cuda:{}"]),
];
const CHANGELOG: &str = "CHANGELOG.md";
const UNRELEASED: &str = "## Unreleased\n";

/// What to release.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The new version, such as 0.2.0
    version: Version,
    /// Change the files, but leave the commit and the tag to you
    #[arg(long)]
    no_commit: bool,
}

/// A release's number; pre-releases are not made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Version(u64, u64, u64);

impl std::str::FromStr for Version {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts: Option<Vec<u64>> = text.split('.').map(|part| part.parse().ok()).collect();
        match parts.as_deref() {
            // Spelled in one way only: no leading zeros or signs.
            Some(&[major, minor, patch]) if format!("{major}.{minor}.{patch}") == text => {
                Ok(Self(major, minor, patch))
            }
            _ => Err("write MAJOR.MINOR.PATCH, such as 0.2.0".to_owned()),
        }
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{}.{}.{}", self.0, self.1, self.2)
    }
}

/// Writes the version everywhere, and commits and tags it.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let new = arguments.version;
    let old: Version = env!("CARGO_PKG_VERSION").parse().map_err(anyhow::Error::msg)?;
    ensure!(new > old, "{new} is not above the current version, {old}");
    if !arguments.no_commit {
        let changed = shell::output(git().args(["status", "--porcelain"]))?;
        ensure!(changed.is_empty(), "commit or stash your changes first:\n{changed}");
        let tag = format!("refs/tags/v{new}");
        let is_new =
            !git().args(["rev-parse", "--quiet", "--verify", &tag]).output()?.status.success();
        ensure!(is_new, "the tag v{new} exists already");
    }
    let read = |name: &str| {
        std::fs::read_to_string(shell::root().join(name))
            .with_context(|| format!("cannot read {name}"))
    };
    let date = shell::output(Command::new("date").args(["--utc", "+%Y-%m-%d"]))?;
    let (changelog, notes) = released(&read(CHANGELOG)?, new, date.trim())?;
    let mut files: Vec<(&str, String)> = vec![(CHANGELOG, changelog)];
    for (name, patterns) in NAMED_IN {
        let mut text = read(name)?;
        for pattern in patterns {
            text = renumbered(&text, pattern, old, new).with_context(|| format!("in {name}"))?;
        }
        files.push((name, text));
    }
    // Only now, so that a mistake changes nothing.
    for (name, text) in files {
        std::fs::write(shell::root().join(name), text)
            .with_context(|| format!("cannot write {name}"))?;
        println!("{name}: {new}");
    }
    shell::run(&mut shell::cargo(&["update", "--workspace", "--offline", "--quiet"]))?;
    if arguments.no_commit {
        println!("now look at the changes, commit them, and tag the commit v{new}");
        return Ok(());
    }
    let tag = format!("v{new}");
    shell::run(git().args([
        "commit",
        "--quiet",
        "--all",
        "--message",
        &format!("release: {tag}"),
    ]))?;
    let message = format!("{tag}\n\n{notes}");
    shell::run(git().args([
        "tag",
        "--annotate",
        "--cleanup=verbatim",
        &tag,
        "--message",
        &message,
    ]))?;
    println!(
        "committed and tagged {tag}; build the images from it, then push: git push origin HEAD {tag}"
    );
    Ok(())
}

fn git() -> Command {
    let mut command = Command::new("git");
    command.current_dir(shell::root());
    command
}

/// Gives the unreleased changes their version; returns the changelog and those changes.
fn released(changelog: &str, version: Version, date: &str) -> Result<(String, String)> {
    let (before, rest) = changelog
        .split_once(UNRELEASED)
        .with_context(|| format!("{CHANGELOG} has no section {:?}", UNRELEASED.trim()))?;
    let end = rest.find("\n## ").map_or(rest.len(), |end| end + 1);
    let (changes, older) = rest.split_at(end);
    if changes.trim().is_empty() {
        bail!("{CHANGELOG} lists no unreleased changes");
    }
    let heading = format!("## {version} ({date})\n");
    Ok((format!("{before}{UNRELEASED}\n{heading}{changes}{older}"), changes.trim().to_owned()))
}

/// Replaces the version in every place of a pattern.
fn renumbered(text: &str, pattern: &str, old: Version, new: Version) -> Result<String> {
    let with = |version: Version| pattern.replace("{}", &version.to_string());
    let (old, new) = (with(old), with(new));
    ensure!(text.contains(&old), "there is no {old:?} to replace");
    Ok(text.replace(&old, &new))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_has_three_numbers_in_order() {
        let version = |text: &str| text.parse::<Version>();
        assert!(version("0.10.0").unwrap() > version("0.9.9").unwrap());
        for text in ["1.0", "1.0.0.0", "v1.0.0", "1.0.0-rc.1", "01.0.0", "1.+0.0", ""] {
            assert!(version(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn unreleased_changes_get_a_version_and_a_date() {
        let before = "# Changelog\n\n## Unreleased\n\n### Added\n\n- A thing.\n\n## 0.1.0 (2026-01-01)\n\n- Old.\n";
        let (after, notes) = released(before, Version(0, 2, 0), "2026-02-03").unwrap();
        assert_eq!(notes, "### Added\n\n- A thing.");
        assert_eq!(
            after,
            "# Changelog\n\n## Unreleased\n\n## 0.2.0 (2026-02-03)\n\n### Added\n\n- A thing.\n\n## 0.1.0 (2026-01-01)\n\n- Old.\n"
        );
        let error = released(&after, Version(0, 3, 0), "2026-02-04").unwrap_err().to_string();
        assert_eq!(error, "CHANGELOG.md lists no unreleased changes");
    }

    #[test]
    fn every_named_place_has_the_current_version() {
        let current: Version = env!("CARGO_PKG_VERSION").parse().unwrap();
        let next = Version(current.0, current.1 + 1, 0);
        for (name, patterns) in NAMED_IN {
            let text = std::fs::read_to_string(shell::root().join(name)).unwrap();
            for pattern in patterns {
                let text = renumbered(&text, pattern, current, next).unwrap();
                assert!(text.contains(&pattern.replace("{}", &next.to_string())), "{name}");
            }
        }
    }
}
