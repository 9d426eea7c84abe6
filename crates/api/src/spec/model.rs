//! The base model, and the weights that training starts from.

use kube::KubeSchema;
use serde::{Deserialize, Serialize};

use super::rules::{object_uri, writable_uri};

use super::secret::SecretRef;

/// The base model.
#[derive(KubeSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[x_kube(validation = Rule::new("!has(self.revision) || self.uri.startsWith('hf://')").message("revision names a hub's branch, tag or commit, but uri is not hf://: remove revision"))]
#[serde(rename_all = "camelCase")]
pub struct Model {
    /// A directory in Hugging Face layout, a hub repository or one `.gguf` file, as an object URI
    /// of scheme hf, s3, gs, az, pvc or file. Examples: `hf://HuggingFaceTB/SmolLM2-135M-Instruct`,
    /// `s3://models/llama-3.1-8b`, `pvc://models/qwen3`.
    #[schemars(length(min = 1, max = 1024))]
    #[x_kube(validation = object_uri("hf://owner/name"))]
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

/// A published adapter.
#[derive(KubeSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InitialAdapter {
    /// Its directory, as this product or PEFT publishes it: `adapter_config.json` and
    /// `adapter_model.safetensors`; of a merged result its `adapter/`. An object URI of scheme hf,
    /// s3, gs, az, pvc or file. Example: `s3://models/support-adapter`.
    #[schemars(length(min = 1, max = 1024))]
    #[x_kube(validation = object_uri("s3://bucket/adapter"))]
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
    #[x_kube(validation = writable_uri("s3://bucket/output.checkpoints/run/step-00000600"))]
    pub uri: String,
    /// The Secret with the keys to read it. Only in a cluster; `finetune run` uses the environment.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<SecretRef>,
}
