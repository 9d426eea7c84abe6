//! The `finetune` command and the manifest reader, seen from outside.
#![allow(missing_docs, reason = "a test")]

mod command;
mod manifest;
