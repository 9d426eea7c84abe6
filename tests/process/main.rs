//! The `finetune` command, the manifest reader, the chart, alerts and documents, seen from outside.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::print_stderr, reason = "a test")]

mod alerts;
mod chart;
mod command;
mod manifest;
mod needs;
mod operations;
#[path = "../support/promql.rs"]
mod promql;
