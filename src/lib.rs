//! The operator's and the command line's library: the API, the manifest reader and the plan.
//!
//! In reading order: [`api`] holds the words of a `FineTuneJob`; [`manifest`] reads one from a
//! file and reports everything wrong with it; [`plan`] decides a run from it and the preflight's
//! facts, without I/O; [`cli`] carries it out here, without a cluster, and [`operator`] in one.
#![forbid(unsafe_code)]

pub mod api;
pub mod cli;
pub mod manifest;
pub mod operator;
pub mod plan;
