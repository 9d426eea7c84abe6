//! What a result was made from: digests of what was read, and the settings that decide the weights.
//!
//! Two runs with equal inputs publish the same result; a run whose inputs differ must never be told
//! that its result is there.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    run_config::{RunConfig, TrainingSettings},
    settings::{DatasetSource, OutputTarget},
};

/// Digests of everything a run reads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct InputDigests {
    /// [`crate::DatasetCensus::sha256`] of the training rows.
    pub train_sha256: String,
    /// The same of the validation rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation_sha256: Option<String>,
    /// SHA-256 of what identifies the base model: the commit of a hub, else the content of each file,
    /// or for weights in a bucket the tag that its store gives them.
    pub model_sha256: String,
    /// The same of the adapter or checkpoint that training started from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initial_sha256: Option<String>,
    /// SHA-256 of the chat template that `dataset.chatTemplate` names by its URI.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chat_template_sha256: Option<String>,
}

impl InputDigests {
    /// Lists what differs, in the manifest's words.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let Self {
            train_sha256,
            validation_sha256,
            model_sha256,
            initial_sha256,
            chat_template_sha256,
        } = self;
        [
            ("the rows of dataset.train", *train_sha256 != other.train_sha256),
            ("the rows of dataset.validation", *validation_sha256 != other.validation_sha256),
            ("the files of model.uri", *model_sha256 != other.model_sha256),
            (
                "what training starts from (initialAdapter or initialCheckpoint)",
                *initial_sha256 != other.initial_sha256,
            ),
            (
                "the template at dataset.chatTemplate",
                *chat_template_sha256 != other.chat_template_sha256,
            ),
        ]
        .into_iter()
        .filter(|(_, differs)| *differs)
        .map(|(name, _)| name.to_owned())
        .collect()
    }
}

/// The settings that decide a result, by name.
pub type DecisiveSettings = BTreeMap<String, Value>;

/// Returns the settings of a run that decide its result.
///
/// Left out is what does not change the weights: where rows and results lie (rows are known by
/// their digests), the attempt, the device and the number of ranks, how a step's sequences are
/// divided, what is recomputed, and how often checkpoints are saved.
pub fn decisive_settings(config: &RunConfig) -> DecisiveSettings {
    // Every field is named, so that a new one has to be sorted in here.
    let RunConfig {
        version: _,
        run_id: _,
        attempt: _,
        model,
        dataset,
        lora,
        initial_adapter: _,
        initial_checkpoint: _,
        training,
        device: _,
        parallelism: _,
        output,
        checkpoints_uri: _,
        expected: _,
        predicted_peak_bytes: _,
        predicted_sent_bytes: _,
    } = config;
    let TrainingSettings {
        context_length,
        total_steps,
        total_sequences,
        learning_rate,
        lr_scheduler_type,
        min_learning_rate_ratio,
        num_warmup_steps,
        weight_decay,
        max_grad_norm,
        micro_batch_size: _,
        gradient_accumulation_steps: _,
        packing,
        optimizer,
        dtype,
        recompute: _,
        seed,
        evaluation_steps,
        early_stopping_patience,
        checkpoint_steps: _,
        num_checkpoints_to_keep: _,
        max_time_seconds,
    } = training;
    let OutputTarget { uri: _, merge, overwrite: _, base_model_name } = output;

    let mut settings = DecisiveSettings::new();
    let mut insert = |section: &str, value: Value| match value {
        Value::Null => {}
        Value::Object(fields) => {
            for (field, value) in fields {
                settings.insert(format!("{section}.{field}"), value);
            }
        }
        value => {
            settings.insert(section.to_owned(), value);
        }
    };
    insert("model", serde_json::json!(model));
    insert("dataset", without_places(dataset));
    insert("loraConfig", serde_json::json!(lora));
    insert(
        "training",
        serde_json::json!({
            "contextLength": context_length,
            "steps": total_steps,
            "learningRate": learning_rate,
            "lrSchedulerType": lr_scheduler_type,
            "numWarmupSteps": num_warmup_steps,
            "weightDecay": weight_decay,
            "maxGradNorm": max_grad_norm,
            "globalBatchSize": config.global_batch_size(),
            "packing": packing,
            "optimizer": optimizer,
            "dtype": dtype,
            "seed": seed,
        }),
    );
    insert("training.minLearningRateRatio", serde_json::json!(min_learning_rate_ratio));
    // Absent where each step has as many, as in what was published before there were short ones.
    insert("training.sequences", serde_json::json!(total_sequences));
    let has_validation =
        config.dataset.validation.is_some() || config.dataset.validation_fraction.is_some();
    if has_validation {
        // Which of the evaluated weights are published.
        insert("training.evaluationSteps", serde_json::json!(evaluation_steps));
        insert("training.earlyStoppingPatience", serde_json::json!(early_stopping_patience));
    }
    insert("training.maxTimeSeconds", serde_json::json!(max_time_seconds));
    insert("output.merge", serde_json::json!(merge));
    insert("output.baseModelName", serde_json::json!(base_model_name));
    settings
}

/// Returns how rows are read, without where they lie.
fn without_places(dataset: &DatasetSource) -> Value {
    let mut value = serde_json::json!(dataset);
    if let Some(fields) = value.as_object_mut() {
        fields.retain(|field, _| field != "train" && field != "validation");
        let sources = fields.get_mut("sources").and_then(Value::as_array_mut);
        for source in sources.into_iter().flatten().filter_map(Value::as_object_mut) {
            source.retain(|field, _| field != "uri");
        }
    }
    value
}

/// Returns the one text that equal settings have.
pub fn settings_text(settings: &DecisiveSettings) -> String {
    let mut value = serde_json::json!(settings);
    value.sort_all_objects();
    value.to_string()
}

/// Lists the settings that differ, each with both values.
pub fn settings_differences(there: &DecisiveSettings, here: &DecisiveSettings) -> Vec<String> {
    let show = |value: Option<&Value>| value.map_or("unset".to_owned(), Value::to_string);
    let names: std::collections::BTreeSet<&String> = there.keys().chain(here.keys()).collect();
    names
        .into_iter()
        .filter(|name| there.get(*name) != here.get(*name))
        .map(|name| {
            format!("{name} ({} there, {} here)", show(there.get(name)), show(here.get(name)))
        })
        .collect()
}
