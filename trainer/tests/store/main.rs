//! The store: one suite on memory, disk and S3; faults at every write; a hub that misbehaves.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]
#![allow(clippy::print_stderr, reason = "what is skipped is said")]
#![allow(unreachable_pub, reason = "modules of a test binary share items by `pub`")]

mod conformance;
mod faults;
mod hub;

use finetune_contract::{ArtifactKind, CONTRACT_VERSION, Manifest, ModelSource, ObjectUri, RunId};

fn uri(text: &str) -> ObjectUri {
    ObjectUri::parse(text).unwrap()
}

fn manifest(run: &str) -> Manifest {
    Manifest {
        version: CONTRACT_VERSION,
        run_id: RunId(run.to_owned()),
        kind: ArtifactKind::Adapter,
        generator: "test".to_owned(),
        base_model: ModelSource { uri: "hf://o/n".to_owned(), revision: None },
        train_sha256: "0".repeat(64),
        step: 1,
        files: Vec::new(),
    }
}
