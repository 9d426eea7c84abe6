//! The preflight's configuration: the run's inputs and options, before anything is planned.

use serde::{Deserialize, Serialize};

use crate::{
    document::Document,
    settings::{DatasetSource, LoraSettings, ModelSource, OutputTarget, RunId},
    uri::ObjectUri,
};

/// The whole input of `finetune-trainer preflight`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PreflightConfig {
    /// [`crate::CONTRACT_VERSION`].
    pub version: u32,
    /// The run this belongs to.
    pub run_id: RunId,
    /// The base model.
    pub model: ModelSource,
    /// The rows.
    pub dataset: DatasetSource,
    /// The adapter asked for; absent for full-parameter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraSettings>,
    /// The directory of a published adapter to start from, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initial_adapter: Option<ObjectUri>,
    /// A checkpoint of another run to take the weights of, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initial_checkpoint: Option<ObjectUri>,
    /// The context length the user set, so that its truncation is counted exactly.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context_length: Option<u32>,
    /// Where the result will go.
    pub output: OutputTarget,
    /// Whether to measure this machine's speed: only when training runs on the same machine.
    pub measure_machine: bool,
}

impl PreflightConfig {
    /// Creates the preflight of a full-parameter run from the model as it is, which does not measure
    /// the machine.
    pub fn of(
        run_id: RunId,
        model: ModelSource,
        dataset: DatasetSource,
        output: OutputTarget,
    ) -> Self {
        Self {
            version: crate::CONTRACT_VERSION,
            run_id,
            model,
            dataset,
            lora: None,
            initial_adapter: None,
            initial_checkpoint: None,
            context_length: None,
            output,
            measure_machine: false,
        }
    }
}

impl Document for PreflightConfig {
    const NAME: &'static str = "preflight config";
}
