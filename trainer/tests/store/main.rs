//! Tests of the store: one suite on memory, disk and S3; failures at every write; a misbehaving hub.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]
#![allow(clippy::print_stderr, reason = "what is skipped is said")]
#![allow(unreachable_pub, reason = "modules of a test binary share items by `pub`")]

mod conformance;
mod failing;
mod faults;
mod hub;
mod messages;
mod reading;

use finetune_contract::{
    ArtifactKind, CONTRACT_VERSION, DecisiveSettings, InputDigests, Manifest, ModelSource,
    ObjectUri, RunId,
};
use finetune_trainer::store::{Environment, Role, Store};

/// The S3 server that `cargo xtask test` starts.
struct Server(Environment);

impl Server {
    /// Finds the server in the environment; without one prints that the test is skipped, or fails in CI.
    fn find() -> Option<Self> {
        let server = Self(Environment::from_process());
        if server.0.plain("FINETUNE_TEST_S3_ENDPOINT").is_some() {
            return Some(server);
        }
        let missing = "FINETUNE_TEST_S3_ENDPOINT is not set";
        let test = std::thread::current().name().unwrap_or_default().to_owned();
        assert!(server.0.plain("CI") != Some("true"), "{test}: {missing}");
        eprintln!("SKIPPED {test}: {missing}");
        None
    }

    fn get(&self, key: &str) -> &str {
        self.0.plain(key).unwrap()
    }

    fn bucket(&self) -> &str {
        self.get("FINETUNE_TEST_S3_BUCKET")
    }

    fn secret(&self) -> &str {
        self.get("AWS_SECRET_ACCESS_KEY")
    }

    fn open(&self, uri: &str, secret: &str) -> Store {
        self.open_as(uri, self.get("AWS_ACCESS_KEY_ID"), secret)
    }

    /// Opens a store with the variables of its role; the unprefixed ones are of another account.
    fn open_as(&self, uri: &str, id: &str, secret: &str) -> Store {
        let environment = Environment::from_pairs([
            ("AWS_ENDPOINT_URL", self.get("FINETUNE_TEST_S3_ENDPOINT")),
            ("FINETUNE_OUTPUT_AWS_ACCESS_KEY_ID", id),
            ("FINETUNE_OUTPUT_AWS_SECRET_ACCESS_KEY", secret),
            ("AWS_SECRET_ACCESS_KEY", "of another account"),
            ("FINETUNE_STORE_RETRIES", "1"),
        ]);
        Store::open(&self::uri(uri), None, Role::Output, &environment).unwrap()
    }
}

fn uri(text: &str) -> ObjectUri {
    ObjectUri::parse(text).unwrap()
}

/// Returns the manifest of a run; each run has different inputs.
fn manifest(run: &str) -> Manifest {
    Manifest {
        version: CONTRACT_VERSION,
        run_id: RunId(run.to_owned()),
        kind: ArtifactKind::Adapter,
        generator: "test".to_owned(),
        base_model: ModelSource::of("hf://o/n".parse().unwrap()),
        train_sha256: "0".repeat(64),
        inputs: Some(InputDigests {
            train_sha256: "0".repeat(64),
            validation_sha256: None,
            model_sha256: "0".repeat(64),
            initial_sha256: None,
            chat_template_sha256: None,
        }),
        settings: Some(DecisiveSettings::from([("training.seed".to_owned(), run.into())])),
        step: 1,
        files: Vec::new(),
    }
}
