//! docs/reference/reasons.md: every reason of a condition, from the contract.

use std::fmt::Write as _;

use finetune_contract::{Reason, ReasonPhase};

/// What stands above each table of reasons.
const SECTIONS: [(ReasonPhase, &str, &str); 4] = [
    (ReasonPhase::InProgress, "In progress", "`Succeeded` is Unknown."),
    (
        ReasonPhase::Startup,
        "While a pod cannot start",
        "`Succeeded` is Unknown, and False once the pod has not started for `startupDeadlineSeconds`.",
    ),
    (ReasonPhase::Terminal, "At the end", "`Succeeded` is True or False, for good."),
    (
        ReasonPhase::OtherCondition,
        "Of other conditions",
        "`Accepted`, `Planned`, `Published` and `Suspended` have these reasons, or that of `Succeeded`.",
    ),
];

/// Renders `docs/reference/reasons.md`.
pub(crate) fn page() -> String {
    let mut page = String::from(
        "<!-- Generated from crates/contract/src/reason.rs by `cargo xtask generate`. -->\n# Reasons\n\nWhy a condition of a FineTuneJob has its value. The condition `Succeeded` is the summary; its message has the particulars.\n",
    );
    for (phase, title, text) in SECTIONS {
        let _ = write!(
            page,
            "\n## {title}\n\n{text}\n\n| reason | meaning | what to do |\n|---|---|---|\n"
        );
        for reason in Reason::ALL.iter().filter(|reason| reason.phase() == phase) {
            let remedy = if reason.remedy() == "nothing" { "" } else { reason.remedy() };
            let _ = writeln!(page, "| `{reason}` | {} | {remedy} |", reason.meaning());
        }
    }
    page
}

#[cfg(test)]
mod tests {
    use super::page;
    use crate::tools::shell;

    #[test]
    fn the_committed_page_of_reasons_is_the_generated_one() {
        let committed = std::fs::read_to_string(shell::root().join("docs/reference/reasons.md"));
        assert_eq!(committed.unwrap(), page(), "run `cargo xtask generate`");
    }
}
