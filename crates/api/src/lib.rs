//! The `FineTuneJob` API, from which the CRD is generated, and how one is read from a file.
//!
//! The doc comments of fields are the CRD's descriptions and the reference documentation. Every
//! number, string and list is bounded, so that admission rejects nonsense and CEL costs stay small.

#![forbid(unsafe_code)]
#![allow(unreachable_pub, reason = "KubeSchema repeats each struct inside a function")]

pub mod crd;
pub mod manifest;
mod quantity;
mod schema;
mod spec;
mod status;

pub use quantity::GIB;
pub use spec::{
    FineTuneJob, FineTuneJobSpec, NAME_LIMIT, OUTPUT,
    cluster::{Approval, Effect, EnvVar, KeyRef, Operator, PodTemplate, Resources, Toleration},
    dataset::{Dataset, DatasetPart},
    lora::LoraConfig,
    model::{InitialAdapter, InitialCheckpoint, Model},
    names::{Names, is_all_linear},
    output::Output,
    secret::SecretRef,
    training::{Precision, Recomputation, Training},
};
pub use status::{
    AttemptStatus, Fallback, FineTuneJobStatus, MAX_LOSS, MAX_NUMBER, MAX_RATE, MAX_STEPS,
    PlanStatus, PodStatus, ProgressStatus, ResultStatus, Step,
};
