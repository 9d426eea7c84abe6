//! Where the result goes.

use kube::KubeSchema;
use serde::{Deserialize, Serialize};

use super::rules::writable_uri;

use super::secret::SecretRef;

/// Where the result goes.
#[derive(KubeSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Output {
    /// The directory or prefix that becomes the published result, of scheme s3, gs, az, pvc or
    /// file. Example: `s3://models/support-adapter`.
    #[schemars(length(min = 1, max = 1024))]
    #[x_kube(validation = writable_uri("s3://bucket/prefix"))]
    pub uri: String,
    /// Whether a LoRA run also publishes the merged model: it at `uri`, the adapter under
    /// `uri/adapter/`. Default: false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub merge: Option<bool>,
    /// Whether a result of different inputs at `uri` may be replaced. A result of the same rows, model and
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
