//! Jobs on a real Kubernetes, with a real kubelet, real pods and a real S3 server.
//!
//! `cargo xtask e2e` brings up the cluster, installs the chart and runs these inside its network.
//! Without it (`FINETUNE_TEST_CLUSTER` is not set) each says `SKIPPED`.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on has failed"
)]
#![allow(clippy::print_stderr, reason = "what is skipped is said")]
#![allow(unreachable_pub, reason = "modules of a test binary share items by `pub`")]

mod admission;
mod again;
mod crashes;
mod devices;
mod disruptions;
mod faults;
mod gangs;
mod helm;
mod monitoring;
mod names;
mod namespaces;
mod policies;
mod prometheus;
#[path = "../support/promql.rs"]
mod promql;
mod ranks;
mod refusals;
mod runs;
mod sockets;
mod tenants;
mod test_namespace;
#[path = "../support/tiny_model.rs"]
mod tiny_model;
