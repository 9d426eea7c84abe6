//! Programs and libraries the tasks need: found, downloaded once, and run.

pub(crate) mod cache;
pub(crate) mod libtorch;
pub(crate) mod promtool;
pub(crate) mod python;
pub(crate) mod shell;
