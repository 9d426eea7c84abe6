//! The shape of a LoRA adapter.

use kube::KubeSchema;
use serde::{Deserialize, Serialize};

use super::rules::above_zero;

use super::super::schema;
use super::names::Names;

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
    #[x_kube(validation = above_zero())]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora_alpha: Option<f64>,
    /// The probability of zeroing an input of the adapter while training, from 0 to 0.9. Default: 0.05.
    #[schemars(range(min = 0.0, max = 0.9))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora_dropout: Option<f64>,
    /// The modules that get an adapter, as PEFT takes them: `all-linear` for every linear layer but the
    /// output head; a list of names, each a full path or a suffix that starts after a dot, such as
    /// `q_proj` or `self_attn.q_proj`; or a string, a regular expression that matches full paths.
    /// `embed_tokens` and `lm_head` are allowed, also where they are one tensor: each gets an adapter of
    /// its own.
    /// Default: `all-linear`. Example: `[q_proj, v_proj]`.
    #[schemars(schema_with = "schema::module_names")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_modules: Option<Names>,
    /// Modules that get no adapter although `targetModules` matches them: a list of names or a regular
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
