//! The `FineTuneJob` API, from which the CRD is generated.
//!
//! The doc comments of fields are the CRD's descriptions and the reference documentation. Every
//! number, string and list is bounded, so that admission rejects nonsense and CEL costs stay small.

#![allow(unreachable_pub, reason = "KubeSchema repeats each struct inside a function")]

mod cluster;
mod names;
mod quantity;
pub mod schema;
mod status;

use finetune_contract::{overlap::overlaps_with_inputs, template_uri};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use cluster::{Approval, Effect, EnvVar, KeyRef, Operator, PodTemplate, Resources, Toleration};
pub use names::{Names, is_all_linear};
pub use quantity::GIB;
pub use status::{
    AttemptStatus, Fallback, FineTuneJobStatus, PlanStatus, PodStatus, ProgressStatus,
    ResultStatus, Step,
};

/// The longest `metadata.name`: names of pods and services add up to 11 characters, of 63.
pub const NAME_LIMIT: usize = 52;

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
    validation = Rule::new("has(self.loraConfig) == has(oldSelf.loraConfig) && (!has(self.loraConfig) || self.loraConfig == oldSelf.loraConfig)")
        .message("loraConfig is immutable: create a new FineTuneJob to change it"),
    validation = Rule::new("has(self.initialAdapter) == has(oldSelf.initialAdapter) && (!has(self.initialAdapter) || self.initialAdapter == oldSelf.initialAdapter)")
        .message("initialAdapter is immutable: create a new FineTuneJob to change it"),
    validation = Rule::new("has(self.loraConfig) || !has(self.initialAdapter)")
        .message("initialAdapter is a LoRA adapter to go on training, but loraConfig is not set: set it to the adapter's shape; to go on with a full-parameter result name it as model.uri instead"),
    validation = Rule::new("has(self.initialCheckpoint) == has(oldSelf.initialCheckpoint) && (!has(self.initialCheckpoint) || self.initialCheckpoint == oldSelf.initialCheckpoint)")
        .message("initialCheckpoint is immutable: create a new FineTuneJob to change it"),
    validation = Rule::new("!(has(self.initialAdapter) && has(self.initialCheckpoint))")
        .message("initialAdapter and initialCheckpoint both say what training starts from: keep one"),
    validation = Rule::new("has(self.training) == has(oldSelf.training) && (!has(self.training) || self.training == oldSelf.training)")
        .message("training is immutable: create a new FineTuneJob to change it"),
    validation = Rule::new("has(self.loraConfig) || !has(self.output.merge) || !self.output.merge")
        .message("output.merge merges a LoRA adapter, but loraConfig is not set, and a full-parameter run has none: remove merge, or set loraConfig: {}")
)]
#[serde(rename_all = "camelCase")]
pub struct FineTuneJobSpec {
    /// The base model. Cannot be changed after creation.
    #[x_kube(validation = Rule::new("self == oldSelf").message("model is immutable: create a new FineTuneJob to change it"))]
    pub model: Model,
    /// The rows to train on and the rows held out. Cannot be changed after creation.
    #[x_kube(validation = Rule::new("self == oldSelf").message("dataset is immutable: create a new FineTuneJob to change it"))]
    pub dataset: Dataset,
    /// Train a LoRA adapter of this shape; `{}` takes all defaults. Without it every parameter of
    /// the model is trained. Cannot be changed after creation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora_config: Option<LoraConfig>,
    /// A published adapter that training starts from, instead of one that changes nothing; of the
    /// shape in `loraConfig`. A full-parameter result is gone on from by naming it as `model.uri`.
    /// Default: none. Cannot be changed after creation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initial_adapter: Option<InitialAdapter>,
    /// A checkpoint of another run whose weights training starts from, such as one that diverged
    /// later; of the same model and `loraConfig`. Its moments, step and place in the data are left
    /// behind: this is a new run. Default: none. Cannot be changed after creation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initial_checkpoint: Option<InitialCheckpoint>,
    /// How to train; every field has a default, decided from the model and the data and explained
    /// by `finetune plan`. Cannot be changed after creation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub training: Option<Training>,
    /// Where the result goes and in which form. Cannot be changed after creation.
    #[x_kube(validation = Rule::new("self == oldSelf").message("output is immutable: create a new FineTuneJob to change it"))]
    pub output: Output,
    /// Stop the run after a checkpoint and give its machines back; set to false to go on. Default:
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

    /// Says for each URI that the output touches how it does: nothing is written over, into or around
    /// what it is made from.
    pub fn overlaps(&self) -> Vec<String> {
        let inputs = self.uris().filter(|(path, _)| *path != OUTPUT);
        overlaps_with_inputs(&self.output.uri, inputs, |uri| uri)
    }
}

/// The path of the output's URI.
pub const OUTPUT: &str = "spec.output.uri";

/// The base model.
#[derive(KubeSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[x_kube(validation = Rule::new("!has(self.revision) || self.uri.startsWith('hf://')").message("revision names a hub's branch, tag or commit, but uri is not hf://: remove revision"))]
#[serde(rename_all = "camelCase")]
pub struct Model {
    /// A directory in Hugging Face layout, a hub repository or one `.gguf` file, as an object URI
    /// of scheme hf, s3, gs, az, pvc or file. Examples: `hf://HuggingFaceTB/SmolLM2-135M-Instruct`,
    /// `s3://models/llama-3.1-8b`, `pvc://models/qwen3`.
    #[schemars(length(min = 1, max = 1024))]
    #[x_kube(validation = Rule::new("self.matches('^(hf|s3|gs|az|pvc|file)://')").message("must be an object URI of scheme hf, s3, gs, az, pvc or file, such as hf://owner/name"))]
    pub uri: String,
    /// The hub revision: a branch, tag or commit; pinned to a commit when the run is planned. Only
    /// for `hf://`. Default: the hub's default branch. Example: `main`.
    #[schemars(length(min = 1, max = 255))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// Special tokens that the model gets beside its own, such as the end of a turn in a template of
    /// yours. A new token starts as the mean of all others, so its rows must be trained: with
    /// `loraConfig`, name `embed_tokens` and `lm_head` in `modulesToSave`. Default: none. Example:
    /// `["<|call|>", "<|result|>"]`.
    #[schemars(length(min = 1, max = 256), inner(length(min = 1, max = 128)))]
    #[schemars(extend("x-kubernetes-list-type" = "set"))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub added_tokens: Option<Vec<String>>,
    /// The Secret with the keys to read the model (`HF_TOKEN`, `AWS_ACCESS_KEY_ID`, …). Only in a
    /// cluster; `finetune run` uses the environment.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<SecretRef>,
}

/// The rows.
#[derive(KubeSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[x_kube(validation = Rule::new("has(self.train) != has(self.sources)").message("needs the training rows: set train, or list several under sources, but not both"))]
#[x_kube(validation = Rule::new("!(has(self.validation) && has(self.validationFraction))").message("validation and validationFraction both say which rows are held out: keep one"))]
#[x_kube(validation = Rule::new("!has(self.sources) || !has(self.format)").message("format is set for each of sources: move it there"))]
#[serde(rename_all = "camelCase")]
pub struct Dataset {
    /// The training rows: one file, or a prefix that ends in `/` and stands for the files below it,
    /// but for hidden ones and those named for another split. Files are JSONL, JSON arrays, CSV or TSV
    /// (`.jsonl`, `.json`, `.csv`, `.tsv`, each also with `.gz` or `.zst`) or Parquet (`.parquet`).
    /// Not together with `sources`. Examples: `s3://data/tickets/train.jsonl`,
    /// `hf://datasets/owner/name`.
    #[schemars(length(min = 1, max = 1024))]
    #[x_kube(validation = Rule::new("self.matches('^(hf|s3|gs|az|pvc|file)://')").message("must be an object URI of scheme hf, s3, gs, az, pvc or file, such as s3://bucket/train.jsonl"))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub train: Option<String>,
    /// Several sources of training rows, read one after the other and shuffled together. Not together
    /// with `train`.
    #[schemars(length(min = 1, max = 16))]
    #[schemars(extend("x-kubernetes-list-type" = "atomic"))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sources: Option<Vec<DatasetPart>>,
    /// The rows held out to measure the loss on, in the same forms as `train`. Default: none, and no
    /// validation loss. Not together with `validationFraction`. Example:
    /// `s3://data/tickets/validation.jsonl`.
    #[schemars(length(min = 1, max = 1024))]
    #[x_kube(validation = Rule::new("self.matches('^(hf|s3|gs|az|pvc|file)://')").message("must be an object URI of scheme hf, s3, gs, az, pvc or file, such as s3://bucket/validation.jsonl"))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validation: Option<String>,
    /// The share of the training rows to hold out instead, from 0.0001 to 0.5, chosen by
    /// `training.seed`; equal rows are never in both. Default: none. Example: 0.05.
    #[schemars(range(min = 0.0001, max = 0.5))]
    // An apiserver compares whole numbers with the bound's whole part: 0 would pass.
    #[x_kube(validation = Rule::new("self > 0.0").message("must be above 0"))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validation_fraction: Option<f64>,
    /// The shape of a row; `auto` decides by the keys of the first one. `prerendered` rows are a text,
    /// or a prompt and its completion, with a chat template's special tokens already in them. Default:
    /// `auto`. With `sources` each has its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// Which turns of a conversation are trained on: `allTurns` of the assistant, or only its
    /// `lastTurn`; never those that a row itself marks with `"weight": 0` or the like. Default:
    /// `allTurns`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub train_on: Option<TrainedTurns>,
    /// Keys of rows and turns that say nothing to be trained on. A key that is neither known nor
    /// listed here is refused. Default: none. Example: `[rationale, reward]`.
    #[schemars(length(max = 64), inner(length(min = 1, max = 128)))]
    #[schemars(extend("x-kubernetes-list-type" = "atomic"))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ignored_keys: Option<Vec<String>>,
    /// What happens to a row that cannot be used: `error` refuses the dataset, `drop` leaves such rows
    /// out, counts them and names the first; more than 10 % are refused all the same. Default: `error`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_invalid_row: Option<InvalidRow>,
    /// What happens to a row with more tokens than `training.contextLength`: `truncate` keeps its
    /// beginning, `drop` leaves it out, `error` refuses the dataset. Default: `truncate`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_overflow: Option<Overflow>,
    /// The chat template that turns conversations into text, instead of the model's own: `chatml`,
    /// `alpaca` or `vicuna`, the text of a Jinja template, or its URI; published with the result.
    /// Default: the model's. Example: `s3://templates/support.jinja`.
    #[schemars(length(min = 1, max = 65_536))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chat_template: Option<String>,
    /// What becomes of the assistant's thoughts (`reasoning_content` and the like, or a `<think>` block
    /// at the start of its content): `keep` gives them to the template, `drop` leaves them out,
    /// `lastTurn` keeps those of the last assistant turn. Default: `keep`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning: Option<ReasoningKept>,
    /// The day it is for chat templates that print the date. Default: the day the job was created, or
    /// today where there is no cluster. Example: `2026-01-31`.
    #[x_kube(validation = Rule::new("self.matches('^[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])$')").message("must be a date such as 2026-01-31"))]
    #[schemars(length(min = 10, max = 10))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub template_date: Option<String>,
    /// The Secret with the keys to read the rows. Only in a cluster; `finetune run` uses the
    /// environment.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<SecretRef>,
}

/// One of several sources of training rows.
#[derive(KubeSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DatasetPart {
    /// A file or prefix, as `dataset.train`. Example: `s3://data/tickets/`.
    #[schemars(length(min = 1, max = 1024))]
    #[x_kube(validation = Rule::new("self.matches('^(hf|s3|gs|az|pvc|file)://')").message("must be an object URI of scheme hf, s3, gs, az, pvc or file, such as s3://bucket/train.jsonl"))]
    pub uri: String,
    /// The shape of its rows. Default: `auto`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// How often each of its rows occurs in an epoch, from 0.001 to 100: 3 is three times, 0.5 is half
    /// of the rows, chosen by `training.seed`. Default: 1.
    #[schemars(range(min = 0.001, max = 100.0))]
    // An apiserver compares whole numbers with the bound's whole part: 0 would pass.
    #[x_kube(validation = Rule::new("self > 0.0").message("must be above 0"))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight: Option<f64>,
}

/// A LoRA adapter's shape, in PEFT's words.
#[derive(KubeSchema, Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LoraConfig {
    /// The rank of the adapter's matrices, from 1 to 1024. Default: 8.
    #[schemars(range(min = 1, max = 1024))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub r: Option<i32>,
    /// The scale's numerator, from 0.01 to 10000: updates are scaled by `loraAlpha / r`. Default: 16.
    #[schemars(range(min = 0.01, max = 10_000.0))]
    // An apiserver compares whole numbers with the bound's whole part: 0 would pass.
    #[x_kube(validation = Rule::new("self > 0.0").message("must be above 0"))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora_alpha: Option<f64>,
    /// The probability of zeroing an input of the adapter while training, from 0 to 0.9. Default: 0.05.
    #[schemars(range(min = 0.0, max = 0.9))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora_dropout: Option<f64>,
    /// The modules that get an adapter, as PEFT takes them: `all-linear` for every linear layer but the
    /// output head; a list of names, each a whole path or its end at a dot, such as `q_proj` or
    /// `self_attn.q_proj`; or one text, a regular expression that matches whole paths. `embed_tokens`
    /// and `lm_head` are allowed, also where they are one tensor: each gets an adapter of its own.
    /// Default: `all-linear`. Example: `[q_proj, v_proj]`.
    #[schemars(schema_with = "schema::module_names")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_modules: Option<Names>,
    /// Modules that get no adapter though `targetModules` means them: a list of names or a regular
    /// expression, as there. Default: none. Example: `[down_proj]`.
    #[schemars(schema_with = "schema::module_names")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exclude_modules: Option<Names>,
    /// The layers whose modules get an adapter, counted from 0; not with a regular expression.
    /// Default: all. Example: `[14, 15]`.
    #[schemars(length(min = 1, max = 256), inner(range(min = 0, max = 1023)))]
    #[schemars(extend("x-kubernetes-list-type" = "atomic"))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_to_transform: Option<Vec<i32>>,
    /// Modules trained in full and saved whole beside the adapter, by name; they get no adapter.
    /// Default: none. Example: `[lm_head]`.
    #[schemars(length(max = 32), inner(length(min = 1, max = 128)))]
    #[schemars(extend("x-kubernetes-list-type" = "atomic"))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub modules_to_save: Option<Vec<String>>,
    /// Whether updates are scaled by `loraAlpha / √r` (rank-stabilised LoRA). Default: false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub use_rslora: Option<bool>,
}

/// A published adapter.
#[derive(KubeSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InitialAdapter {
    /// Its directory, as this product or PEFT publishes it: `adapter_config.json` and
    /// `adapter_model.safetensors`; of a merged result its `adapter/`. An object URI of scheme hf,
    /// s3, gs, az, pvc or file. Example: `s3://models/support-adapter`.
    #[schemars(length(min = 1, max = 1024))]
    #[x_kube(validation = Rule::new("self.matches('^(hf|s3|gs|az|pvc|file)://')").message("must be an object URI of scheme hf, s3, gs, az, pvc or file, such as s3://bucket/adapter"))]
    pub uri: String,
    /// The Secret with the keys to read it. Only in a cluster; `finetune run` uses the environment.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<SecretRef>,
}

/// A checkpoint of another run.
#[derive(KubeSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InitialCheckpoint {
    /// The directory of one step below the checkpoints of a run, which has
    /// `checkpoint-manifest.json`. An object URI of scheme s3, gs, az, pvc or file. Example:
    /// `s3://models/support.checkpoints/support-1a2b3c4d/step-00000600`.
    #[schemars(length(min = 1, max = 1024))]
    #[x_kube(validation = Rule::new("self.matches('^(s3|gs|az|pvc|file)://')").message("must be an object URI of scheme s3, gs, az, pvc or file, such as s3://bucket/output.checkpoints/run/step-00000600"))]
    pub uri: String,
    /// The Secret with the keys to read it. Only in a cluster; `finetune run` uses the environment.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<SecretRef>,
}

/// How to train.
#[derive(KubeSchema, Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[x_kube(validation = Rule::new("!(has(self.numEpochs) && has(self.maxSteps))").message("numEpochs and maxSteps both set the length of the run: keep one"))]
#[serde(rename_all = "camelCase")]
pub struct Training {
    /// Tokens of one sequence, from 16 to 1048576, at most what the model was made for. Default:
    /// enough for 95 % of the rows. Example: 2048.
    #[schemars(range(min = 16, max = 1_048_576))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context_length: Option<i32>,
    /// Passes over the training rows, from 0.001 to 1000; 0.5 is half of them. The last step has the
    /// rows that are left. Default: what gives about 100 steps, from 1 to 10. Not together with
    /// `maxSteps`. Example: 3.
    #[schemars(with = "Option<f64>", range(min = 0.001, max = 1000.0))]
    // An apiserver compares whole numbers with the bound's whole part: 0 would pass.
    #[x_kube(validation = Rule::new("self > 0.0").message("must be above 0"))]
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "quantity::as_written")]
    pub num_epochs: Option<f64>,
    /// Optimizer steps of the whole run, from 1 to 10000000. Default: from `numEpochs`. Not together
    /// with `numEpochs`.
    #[schemars(range(min = 1, max = 10_000_000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_steps: Option<i64>,
    /// The peak learning rate of AdamW, from 1e-9 to 1. Default: 1e-4 with LoRA, 1e-5 without.
    #[schemars(range(min = 1e-9, max = 1.0))]
    // An apiserver compares whole numbers with the bound's whole part: 0 would pass.
    #[x_kube(validation = Rule::new("self > 0.0").message("must be above 0"))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub learning_rate: Option<f64>,
    /// How the learning rate falls after the warm-up. Default: `cosine`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr_scheduler_type: Option<Scheduler>,
    /// Steps in which the learning rate rises from zero, from 0 to 1000000. Default: 10 % of all
    /// steps, at most 10.
    #[schemars(range(min = 0, max = 1_000_000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_warmup_steps: Option<i64>,
    /// AdamW's decoupled weight decay, from 0 to 1. Default: 0.
    #[schemars(range(min = 0.0, max = 1.0))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight_decay: Option<f64>,
    /// The gradient's 2-norm is scaled down to this, from 0 to 1000; 0 means never. Default: 1.
    #[schemars(range(min = 0.0, max = 1000.0))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_grad_norm: Option<f64>,
    /// Sequences computed at once on a device, from 1 to 1024. Default: up to 8, as many as fit
    /// the memory.
    #[schemars(range(min = 1, max = 1024))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub train_batch_size_per_device: Option<i32>,
    /// Micro-batches summed up in one optimizer step, from 1 to 4096. Default: what makes 16
    /// sequences a step, fewer for small data.
    #[schemars(range(min = 1, max = 4096))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gradient_accumulation_steps: Option<i32>,
    /// Whether several rows share a sequence, without seeing each other. Default: true.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub packing: Option<bool>,
    /// The element type of the computation; trained state is always fp32. Default: `auto`: bf16
    /// where the processor multiplies it natively, else fp32.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dtype: Option<Precision>,
    /// What takes the steps: `adamw`, or `adamw8bit`, whose moments take a byte each instead of four:
    /// of 16 bytes a trained parameter (18 in bf16) it saves 6, at some noise in the steps. Default:
    /// `adamw`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub optimizer: Option<OptimizerName>,
    /// What a block keeps for its backward pass: `none` computes nothing again, `block` keeps only
    /// its input and takes about a third longer. Default: `auto`: `none` if it fits the memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recompute: Option<Recomputation>,
    /// The seed of all randomness, from 0 to 9007199254740991. Default: 42.
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<i64>,
    /// Steps between measurements of the validation loss, from 1 to 1000000. Default: a tenth of
    /// all steps.
    #[schemars(range(min = 1, max = 1_000_000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub evaluation_steps: Option<i64>,
    /// Stop after this many measurements without a better validation loss, from 0 to 1000; 0 means
    /// never. Needs `dataset.validation`. Default: 0.
    #[schemars(range(min = 0, max = 1000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub early_stopping_patience: Option<i32>,
    /// Steps between checkpoints, from 1 to 1000000. Default: the trainer saves before 30 seconds of
    /// work would be lost, while that takes at most 1 % of the time.
    #[schemars(range(min = 1, max = 1_000_000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checkpoint_steps: Option<i64>,
    /// Checkpoints kept beside the best one, from 1 to 100. Default: 2.
    #[schemars(range(min = 1, max = 100))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_checkpoints_to_keep: Option<i32>,
    /// Seconds of training, over all tries, after which the run ends before its last step and
    /// publishes the best it has, from 1 to 31536000. The learning rate falls as if there were no
    /// limit. Default: none. Example: 28800.
    #[schemars(range(min = 1, max = 31_536_000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_time_seconds: Option<i64>,
}

/// Where the result goes.
#[derive(KubeSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Output {
    /// The directory or prefix that becomes the published result, of scheme s3, gs, az, pvc or
    /// file. Example: `s3://models/support-adapter`.
    #[schemars(length(min = 1, max = 1024))]
    #[x_kube(validation = Rule::new("self.matches('^(s3|gs|az|pvc|file)://')").message("must be an object URI of scheme s3, gs, az, pvc or file, such as s3://bucket/prefix"))]
    pub uri: String,
    /// Whether a LoRA run also publishes the merged model: it at `uri`, the adapter under
    /// `uri/adapter/`. Default: false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub merge: Option<bool>,
    /// Whether a result of other inputs at `uri` may be replaced. A result of the same rows, model and
    /// settings is never replaced: nothing is trained then. Default: false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overwrite: Option<bool>,
    /// The `base_model_name_or_path` written into the adapter. Default: the model's URI without
    /// its scheme. Example: `HuggingFaceTB/SmolLM2-135M-Instruct`.
    #[schemars(length(min = 1, max = 255))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base_model_name: Option<String>,
    /// The Secret with the keys to write the result. Only in a cluster; `finetune run` uses the
    /// environment.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<SecretRef>,
}

/// A Secret of the job's namespace.
#[derive(JsonSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SecretRef {
    /// The Secret's name. Example: `bucket-keys`.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

/// The shape of a row.
#[derive(JsonSchema, Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(missing_docs, reason = "the words are described at the field")]
pub enum Format {
    Auto,
    Messages,
    PromptCompletion,
    Text,
    Sharegpt,
    Alpaca,
    Prerendered,
}

/// Which turns of a conversation are trained on.
#[derive(JsonSchema, Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(missing_docs, reason = "the words are described at the field")]
pub enum TrainedTurns {
    AllTurns,
    LastTurn,
}

/// What happens to a row that cannot be used.
#[derive(JsonSchema, Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(missing_docs, reason = "the words are described at the field")]
pub enum InvalidRow {
    Error,
    Drop,
}

/// What happens to a row longer than the context.
#[derive(JsonSchema, Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(missing_docs, reason = "the words are described at the field")]
pub enum Overflow {
    Truncate,
    Drop,
    Error,
}

/// What becomes of the assistant's thoughts.
#[derive(JsonSchema, Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(missing_docs, reason = "the words are described at the field")]
pub enum ReasoningKept {
    Keep,
    Drop,
    LastTurn,
}

/// How the learning rate falls after the warm-up.
#[derive(JsonSchema, Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(missing_docs, reason = "the words are described at the field")]
pub enum Scheduler {
    Cosine,
    Linear,
    Constant,
}

/// The element type of the computation.
#[derive(JsonSchema, Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(missing_docs, reason = "the words are described at the field")]
pub enum Precision {
    Auto,
    Bf16,
    Fp32,
}

/// What takes the steps.
#[derive(JsonSchema, Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(missing_docs, reason = "the words are described at the field")]
pub enum OptimizerName {
    Adamw,
    Adamw8bit,
}

/// What a block keeps for its backward pass.
#[derive(JsonSchema, Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(missing_docs, reason = "the words are described at the field")]
pub enum Recomputation {
    Auto,
    None,
    Block,
}
