//! What a user asks for, one file for each object of the spec.

pub mod cluster;
pub mod dataset;
pub mod lora;
pub mod model;
pub mod names;
pub mod output;
mod rules;
pub mod secret;
pub mod training;

use finetune_contract::{overlap::overlaps_with_inputs, template_uri};
use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

use rules::{immutable, immutable_option};

use super::{quantity, status::FineTuneJobStatus};
use cluster::{Approval, PodTemplate, Resources};
use dataset::Dataset;
use lora::LoraConfig;
use model::{InitialAdapter, InitialCheckpoint, Model};
use output::Output;
use training::Training;

/// The longest `metadata.name`: names of pods and services add up to 11 characters, of 63.
pub const NAME_LIMIT: usize = 52;

/// The path of the output's URI.
pub const OUTPUT: &str = "spec.output.uri";

/// What to fine-tune, on what, how, and where the result goes.
#[derive(CustomResource, KubeSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "finetune.dev",
    version = "v1alpha1",
    kind = "FineTuneJob",
    doc = "Fine-tunes one language model on one dataset and publishes the weights.",
    namespaced,
    status = "FineTuneJobStatus",
    derive = "PartialEq",
    shortname = "ftj",
    category = "all",
    printcolumn(name = "Method", type_ = "string", json_path = ".status.plan.method"),
    printcolumn(name = "Model", type_ = "string", json_path = ".spec.model.uri"),
    printcolumn(
        name = "Succeeded",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Succeeded\")].status"
    ),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Succeeded\")].reason"
    ),
    printcolumn(name = "Step", type_ = "integer", json_path = ".status.progress.step"),
    printcolumn(name = "Steps", type_ = "integer", json_path = ".status.progress.totalSteps"),
    printcolumn(name = "Loss", type_ = "number", json_path = ".status.progress.loss"),
    printcolumn(name = "ETA", type_ = "string", json_path = ".status.progress.eta"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    validation = Rule::new(
        "self.metadata.name.size() <= 52 && self.metadata.name.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')"
    )
    .message("metadata.name must have at most 52 characters, only a-z, 0-9 and '-', and start and end with a letter or digit: it becomes part of the names of pods and objects")
)]
#[x_kube(
    validation = immutable_option("loraConfig"),
    validation = immutable_option("initialAdapter"),
    validation = Rule::new("has(self.loraConfig) || !has(self.initialAdapter)")
        .message("initialAdapter continues training a LoRA adapter, but loraConfig is not set: set it to the adapter's shape; to continue from a full-parameter result, use it as model.uri"),
    validation = immutable_option("initialCheckpoint"),
    validation = Rule::new("!(has(self.initialAdapter) && has(self.initialCheckpoint))")
        .message("initialAdapter and initialCheckpoint both say what training starts from: keep one"),
    validation = immutable_option("training"),
    validation = Rule::new("has(self.loraConfig) || !has(self.output.merge) || !self.output.merge")
        .message("output.merge merges a LoRA adapter, but loraConfig is not set, and a full-parameter run has none: remove merge, or set loraConfig: {}")
)]
#[serde(rename_all = "camelCase")]
pub struct FineTuneJobSpec {
    /// The base model. Cannot be changed after creation.
    #[x_kube(validation = immutable("model"))]
    pub model: Model,
    /// The rows to train on and the rows held out. Cannot be changed after creation.
    #[x_kube(validation = immutable("dataset"))]
    pub dataset: Dataset,
    /// Train a LoRA adapter of this shape; `{}` takes all defaults. Without it every parameter of
    /// the model is trained. Cannot be changed after creation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora_config: Option<LoraConfig>,
    /// A published adapter that training starts from, instead of a newly initialized one; it must match
    /// `loraConfig`. To continue from a full-parameter result, use it as `model.uri`.
    /// Default: none. Cannot be changed after creation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initial_adapter: Option<InitialAdapter>,
    /// A checkpoint of another run whose weights training starts from, such as one that diverged
    /// later; of the same model and `loraConfig`. Only its weights are loaded, not the optimizer state,
    /// the step or the position in the data: this is a new run. Default: none. Cannot be changed after
    /// creation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initial_checkpoint: Option<InitialCheckpoint>,
    /// How to train; every field has a default, decided from the model and the data and explained
    /// by `finetune plan`. Cannot be changed after creation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub training: Option<Training>,
    /// Where the result goes and in which form. Cannot be changed after creation.
    #[x_kube(validation = immutable("output"))]
    pub output: Output,
    /// Stop the run after a checkpoint and free its nodes; set to false to resume. Default:
    /// false. Only in a cluster.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub suspend: Option<bool>,
    /// Whether the run starts as soon as its plan is made (`Auto`) or waits until the plan is
    /// approved (`Manual`). Default: `Auto`. Only in a cluster.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub approval: Option<Approval>,
    /// Seconds a run may take over all attempts before it is failed, from 1 to 31536000;
    /// `training.maxTimeSeconds` ends it with a result instead. Default: no limit. Example: 86400.
    /// Only in a cluster.
    #[schemars(range(min = 1, max = 31_536_000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub active_deadline_seconds: Option<i64>,
    /// Seconds after its end at which the FineTuneJob is deleted, from 0 to 31536000; the published
    /// result stays. Default: never. Only in a cluster.
    #[schemars(range(min = 0, max = 31_536_000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttl_seconds_after_finished: Option<i64>,
    /// What the trainer's pod asks of its node. Default: from the plan. Only in a cluster.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resources: Option<Resources>,
    /// Adjustments of the pods that do the work. Only in a cluster.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod_template: Option<PodTemplate>,
}

impl FineTuneJobSpec {
    /// Returns every URI of the spec with its field's path.
    pub fn uris(&self) -> impl Iterator<Item = (String, &str)> {
        let sources = self.dataset.sources.iter().flatten().enumerate().map(|(index, source)| {
            (format!("spec.dataset.sources[{index}].uri"), source.uri.as_str())
        });
        let template = self.dataset.chat_template.as_deref().and_then(template_uri);
        [
            ("spec.model.uri", Some(&self.model.uri)),
            ("spec.initialAdapter.uri", self.initial_adapter.as_ref().map(|adapter| &adapter.uri)),
            (
                "spec.initialCheckpoint.uri",
                self.initial_checkpoint.as_ref().map(|checkpoint| &checkpoint.uri),
            ),
            ("spec.dataset.train", self.dataset.train.as_ref()),
            ("spec.dataset.validation", self.dataset.validation.as_ref()),
            (OUTPUT, Some(&self.output.uri)),
        ]
        .into_iter()
        .filter_map(|(path, uri)| Some((path.to_owned(), uri?.as_str())))
        .chain(sources)
        .chain(template.map(|uri| ("spec.dataset.chatTemplate".to_owned(), uri)))
    }

    /// Describes each overlap of the output with an input: nothing is written over, into or around what
    /// it is made from.
    pub fn overlaps(&self) -> Vec<String> {
        // What cannot be parsed is another check's to report.
        let Ok(output) = self.output.uri.parse() else { return Vec::new() };
        let inputs = self.uris().filter(|(path, _)| *path != OUTPUT);
        let inputs = inputs.filter_map(|(path, uri)| Some((path, uri.parse().ok()?)));
        overlaps_with_inputs(&output, inputs, |uri| uri)
    }

    /// Returns the user's limit of a training pod's memory, in bytes, if there is one that can be read.
    pub fn memory_limit(&self) -> Option<u64> {
        quantity::bytes(self.resources.as_ref()?.limits.as_ref()?.get("memory")?)
    }
}
