//! What the operator reports of a FineTuneJob.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::schema;

/// What is known of the run.
#[derive(JsonSchema, Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FineTuneJobStatus {
    /// The `metadata.generation` this status describes.
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// The run's conditions; `Succeeded` is the summary.
    #[schemars(schema_with = "schema::conditions")]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
    /// What was decided, once the preflight is done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plan: Option<PlanStatus>,
    /// How far the run is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress: Option<ProgressStatus>,
    /// What was published.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub result: Option<ResultStatus>,
}

/// What was decided.
#[derive(JsonSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PlanStatus {
    /// Names the run in the bucket.
    #[schemars(length(max = 128))]
    pub run_id: String,
    /// The method and the values that matter, one line each.
    #[schemars(length(max = 16384))]
    pub summary: String,
    /// Predicted peak memory, in bytes.
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    pub predicted_peak_bytes: i64,
}

/// How far the run is.
#[derive(JsonSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProgressStatus {
    /// What the trainer is doing.
    #[schemars(length(max = 32))]
    pub stage: String,
    /// Optimizer steps done.
    #[schemars(range(min = 0, max = 10_000_000))]
    pub step: i64,
    /// Optimizer steps of the whole run.
    #[schemars(range(min = 0, max = 10_000_000))]
    pub total_steps: i64,
    /// Mean loss per target token of the last step.
    #[schemars(range(min = 0.0, max = 1e9))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    /// Mean loss per target token of the validation set, last measured.
    #[schemars(range(min = 0.0, max = 1e9))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_loss: Option<f64>,
    /// Tokens per second over the last steps.
    #[schemars(range(min = 0.0, max = 1e12))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens_per_second: Option<f64>,
    /// Seconds until the last step, estimated.
    #[schemars(range(min = 0, max = 9_007_199_254_740_991_i64))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eta_seconds: Option<i64>,
}

/// What was published.
#[derive(JsonSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ResultStatus {
    /// Where it is.
    #[schemars(length(max = 1024))]
    pub uri: String,
    /// `Adapter`, `FullModel` or `MergedModel`.
    #[schemars(length(max = 32))]
    pub kind: String,
    /// SHA-256 of the manifest's bytes, in hexadecimal.
    #[schemars(length(min = 64, max = 64))]
    pub manifest_sha256: String,
    /// Validation loss of what was published.
    #[schemars(range(min = 0.0, max = 1e9))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_loss: Option<f64>,
}
