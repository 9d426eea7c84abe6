//! The rows.

use finetune_contract::{DatasetFormat, OnInvalidRow, OnOverflow, Reasoning, TrainOn};
use kube::KubeSchema;
use serde::{Deserialize, Serialize};

use super::rules::{above_zero, object_uri};

use super::secret::SecretRef;

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
    #[x_kube(validation = object_uri("s3://bucket/train.jsonl"))]
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
    #[x_kube(validation = object_uri("s3://bucket/validation.jsonl"))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validation: Option<String>,
    /// The share of the training rows to hold out instead, from 0.0001 to 0.5, chosen by
    /// `training.seed`; equal rows are never in both. Default: none. Example: 0.05.
    #[schemars(range(min = 0.0001, max = 0.5))]
    #[x_kube(validation = above_zero())]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validation_fraction: Option<f64>,
    /// The shape of a row; `auto` decides by the keys of the first one. `prerendered` rows are a text,
    /// or a prompt and its completion, with a chat template's special tokens already in them. Default:
    /// `auto`. With `sources` each has its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<DatasetFormat>,
    /// Which turns of a conversation are trained on: `allTurns` of the assistant, or only its
    /// `lastTurn`; never those that a row itself marks with `"weight": 0` or the like. Default:
    /// `allTurns`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub train_on: Option<TrainOn>,
    /// Keys of rows and turns to ignore. A key that is neither known nor listed here is rejected.
    /// Default: none. Example: `[rationale, reward]`.
    #[schemars(length(max = 64), inner(length(min = 1, max = 128)))]
    #[schemars(extend("x-kubernetes-list-type" = "atomic"))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ignored_keys: Option<Vec<String>>,
    /// What happens to a row that cannot be used: `error` refuses the dataset, `drop` leaves such rows
    /// out, counts them and names the first; more than 10 % are refused all the same. Default: `error`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_invalid_row: Option<OnInvalidRow>,
    /// What happens to a row with more tokens than `training.contextLength`: `truncate` keeps its
    /// beginning, `drop` leaves it out, `error` refuses the dataset. Default: `truncate`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_overflow: Option<OnOverflow>,
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
    pub reasoning: Option<Reasoning>,
    /// The current date that chat templates see. Default: the day the job was created, or
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
    #[x_kube(validation = object_uri("s3://bucket/train.jsonl"))]
    pub uri: String,
    /// The shape of its rows. Default: `auto`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<DatasetFormat>,
    /// How often each of its rows occurs in an epoch, from 0.001 to 100: 3 is three times, 0.5 is half
    /// of the rows, chosen by `training.seed`. Default: 1.
    #[schemars(range(min = 0.001, max = 100.0))]
    #[x_kube(validation = above_zero())]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight: Option<f64>,
}
