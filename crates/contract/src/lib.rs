//! The narrow waist: every word the operator, the command line and the trainer exchange.
//!
//! Pure data. This crate knows neither Kubernetes nor libtorch, does no I/O and reads no clock;
//! both sides depend on it and on nothing of each other. Each document that crosses the waist
//! starts with `version`; a reader refuses a version it does not know ([`parse`]). Within a version a
//! field may be added that is absent where it says nothing new: what was written before is still
//! read and written as it was, and a reader that does not know the field refuses it by name.
//!
//! In reading order: [`uri`] and [`settings`] are the words shared by the documents;
//! [`PreflightConfig`] goes out and [`PreflightReport`] comes back; then [`RunConfig`] goes out,
//! [`Progress`] is served while running, and [`RunReport`] with an [`ExitCode`] is the last word.
//! [`Reason`] is why a condition of a job has its value; problems and failures are subsets of it.
//! [`process`] and [`Role`] are how a trainer is started, reached and given its Secrets, [`cost`] what
//! the plan knows of its memory, and [`artifact`] names what is left in the bucket.
#![forbid(unsafe_code)]

pub mod artifact;
pub mod cost;
mod document;
mod exit_code;
mod inputs;
pub mod overlap;
pub mod parallelism;
mod preflight_config;
mod preflight_report;
pub mod process;
mod progress;
mod reason;
mod rendering;
mod role;
mod run_config;
mod run_report;
#[cfg(feature = "schema")]
mod schema;
pub mod settings;
#[cfg(feature = "testing")]
pub mod testing;
pub mod uri;

pub use artifact::{ArtifactKind, Comparison, Manifest, ManifestFile, PublishedResult};
pub use document::{
    CONTRACT_VERSION, Document, ParseDocumentError, TERMINATION_MESSAGE_LIMIT, parse, render,
};
pub use exit_code::ExitCode;
pub use inputs::{
    DecisiveSettings, InputDigests, decisive_settings, settings_differences, settings_text,
};
pub use parallelism::{Parallelism, Strategy};
pub use preflight_config::PreflightConfig;
pub use preflight_report::{
    DatasetCensus, LengthPoint, LoraFacts, MachineFacts, ModelFacts, ModuleShape, OutputState,
    PreflightReport, Problem, ProblemReason, Split,
};
pub use process::{TrainerArgs, TrainerCommand};
pub use progress::{Progress, Stage};
pub use reason::{Reason, ReasonPhase, UnknownReason};
pub use rendering::{Reasoning, RenderingSettings, is_template_text, template_uri};
pub use role::Role;
pub use run_config::{ExpectedData, RunConfig, TrainingSettings};
pub use run_report::{FailureReason, Outcome, Proof, RunReport, StoppedEarly};
pub use settings::{
    DatasetFormat, DatasetSource, Device, Dtype, LoraSettings, LrScheduler, MAX_INVALID_SHARE,
    ModelSource, ModuleNames, OnInvalidRow, OnOverflow, Optimizer, OutputTarget, Recompute,
    RowSource, RunId, TargetModules, TrainOn,
};
pub use uri::{ObjectUri, ParseUriError, Scheme};
