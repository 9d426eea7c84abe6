//! The `finetune` command and the manifest reader, seen from outside.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

mod command;
mod manifest;
