//! A Secret that a job names.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A Secret of the job's namespace.
#[derive(JsonSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SecretRef {
    /// The Secret's name. Example: `bucket-keys`.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}
