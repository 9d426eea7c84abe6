//! A published PEFT adapter, put back on its base model.

use std::path::{Path, PathBuf};

use finetune_contract::{Dtype, FailureReason, LoraSettings, TargetModules};
use serde_json::Value;
use tch::Device;

use super::{
    Model,
    attach::{self, Attachment},
    config::ModelConfig,
    names,
    weights::{self, Checkpoint},
};
use crate::{
    failure::Failure,
    seed::Counter,
    store::{Store, hash_file, publish},
};

/// What PEFT puts before every name.
pub const PREFIX: &str = "base_model.model.";
/// The adapter's settings.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The adapter's tensors.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// Why an adapter directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read.
    #[error("cannot read {path:?}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The settings are damaged or ask for something else than plain LoRA.
    #[error("{path:?}: {reason}")]
    Settings {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The settings do not fit the base model.
    #[error("{path:?} does not fit the base model")]
    Fit {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: attach::Error,
    },
    /// The tensors are damaged, missing, or of other shapes.
    #[error("the adapter's weights cannot be used")]
    Weights(#[source] weights::Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::from_chain(FailureReason::InvalidModel, &error)
    }
}

impl Model {
    /// Assembles a base model with a published adapter on it.
    ///
    /// # Errors
    /// A [`Failure`] if either directory is damaged or they do not fit each other.
    pub fn load_with_adapter(
        base: &Path,
        config: ModelConfig,
        adapter: &Path,
        dtype: Dtype,
        device: Device,
    ) -> Result<Self, Failure> {
        let settings = read_settings(adapter)?;
        let attachment = Attachment::lora(&config, &settings)
            .map_err(|source| Error::Fit { path: adapter.join(CONFIG_FILE), source })?;
        let mut model = Self::load(base, config, attachment, dtype, device, Counter::from_seed(0))?;
        model.take_adapter(adapter)?;
        Ok(model)
    }

    /// Gives the attached adapter the weights of a published one of the same shape.
    ///
    /// # Errors
    /// [`Error`] if its tensors are damaged, missing, or of other shapes.
    pub fn take_adapter(&mut self, adapter: &Path) -> Result<(), Error> {
        let weights = Checkpoint::open_file(&adapter.join(WEIGHTS_FILE)).map_err(Error::Weights)?;
        for name in self.trained().names() {
            let mut master =
                self.trained().master_of(name).expect("the name is from the same list");
            let shape: Vec<usize> = master.size().iter().map(|&size| size as usize).collect();
            let stored =
                weights.tensor_of(&format!("{PREFIX}{name}"), &shape).map_err(Error::Weights)?;
            master.copy_(&stored);
        }
        self.trained_mut().refresh_compute();
        Ok(())
    }
}

/// Brings the two files of a published adapter into a directory; what has a manifest must be what it
/// says.
///
/// # Errors
/// A [`Failure`] if the store fails or a file is not the one that was published.
pub fn fetch(store: &Store, to: &Path) -> Result<(), Failure> {
    let manifest = publish::read_manifest(store)?;
    for name in [CONFIG_FILE, WEIGHTS_FILE] {
        let path = to.join(name);
        store.fetch(name, &path)?;
        let published = manifest.iter().flat_map(|manifest| &manifest.files);
        let published = published.filter(|file| file.path == name).map(|file| &file.sha256);
        let found = hash_file(&path)?.1;
        if let Some(sha256) = published.into_iter().find(|sha256| **sha256 != found) {
            let message = format!(
                "{} is damaged: its manifest says SHA-256 {sha256}, it has {found}",
                store.uri().join(name)
            );
            return Err(Failure::new(FailureReason::InvalidModel, message));
        }
    }
    Ok(())
}

/// Lists where an adapter asked for is not of the shape of one that is there, by field of
/// `loraConfig`, with both values.
///
/// Dropout may differ: it is no part of what was trained.
///
/// # Errors
/// [`attach::Error`] if one of them does not fit the model.
pub fn differences(
    config: &ModelConfig,
    asked: &LoraSettings,
    published: &LoraSettings,
) -> Result<Vec<(&'static str, String)>, attach::Error> {
    let [asked_modules, published_modules] = [asked, published].map(|settings| {
        let Attachment::Lora(lora) = Attachment::lora(config, settings)? else {
            return Ok(Default::default());
        };
        Ok((lora.targets.into_keys().collect::<Vec<_>>(), lora.saved))
    });
    let ((asked_targets, asked_saved), (targets, saved)) = (asked_modules?, published_modules?);
    let leaves = |paths: &[String]| {
        let mut leaves: Vec<&str> = paths.iter().map(|path| names::leaf(path)).collect();
        leaves.sort_unstable();
        leaves.dedup();
        format!("[{}]", leaves.join(", "))
    };
    let mut found = Vec::new();
    let mut compare = |field, is_same: bool, asked: String, published: String| {
        if !is_same {
            let message = format!(
                "is {asked}, but what training starts from has {published}: set it to that"
            );
            found.push((field, message));
        }
    };
    compare("r", asked.r == published.r, asked.r.to_string(), published.r.to_string());
    let is_same = asked_targets == targets;
    compare("targetModules", is_same, leaves(&asked_targets), leaves(&targets));
    let is_same = asked_saved == saved;
    compare("modulesToSave", is_same, leaves(&asked_saved), leaves(&saved));
    let same_rank = LoraSettings { r: published.r, ..asked.clone() };
    if (same_rank.scaling() - published.scaling()).abs() > 1e-9 * published.scaling() {
        let both = [asked, published]
            .map(|lora| (lora.lora_alpha.to_string(), lora.use_rslora.to_string()));
        let [(asked_alpha, asked_kind), (alpha, kind)] = both;
        compare("useRslora", asked.use_rslora == published.use_rslora, asked_kind, kind);
        let is_same = (asked.lora_alpha - published.lora_alpha).abs() < 1e-9;
        compare("loraAlpha", is_same, asked_alpha, alpha);
    }
    Ok(found)
}

/// Reads the settings of a PEFT LoRA directory on disk.
///
/// # Errors
/// [`Error`] if the file is missing or asks for anything but plain LoRA or rsLoRA on named modules.
pub fn read_settings(directory: &Path) -> Result<LoraSettings, Error> {
    let path = directory.join(CONFIG_FILE);
    let text = std::fs::read_to_string(&path)
        .map_err(|source| Error::Read { path: path.clone(), source })?;
    parse_settings(&text).map_err(|reason| Error::Settings { path, reason })
}

/// Reads the text of an adapter's settings.
///
/// # Errors
/// What is wrong with it, for people.
pub fn parse_settings(text: &str) -> Result<LoraSettings, String> {
    let value: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
    match value.get("peft_type").and_then(Value::as_str) {
        Some("LORA") => {}
        other => {
            return Err(format!("peft_type is {other:?}, but only LORA adapters can be loaded"));
        }
    }
    let is_used = |key: &str| match value.get(key) {
        None | Some(Value::Null | Value::Bool(false)) => false,
        Some(Value::Array(items)) => !items.is_empty(),
        Some(Value::Object(items)) => !items.is_empty(),
        Some(Value::String(text)) => text != "none",
        Some(_) => true,
    };
    for key in [
        "use_dora",
        "rank_pattern",
        "alpha_pattern",
        "layers_to_transform",
        "bias",
        "fan_in_fan_out",
        "trainable_token_indices",
    ] {
        if is_used(key) {
            return Err(format!("{key} = {} is not supported", value[key]));
        }
    }
    let names = |key: &str| -> Result<Vec<String>, String> {
        match value.get(key) {
            None | Some(Value::Null) => Ok(Vec::new()),
            Some(list) => serde_json::from_value(list.clone())
                .map_err(|_| format!("{key} must be a list of names")),
        }
    };
    let target_modules = match value.get("target_modules").and_then(Value::as_str) {
        Some("all-linear") => TargetModules::AllLinear,
        Some(pattern) => {
            return Err(format!(
                "target_modules is the pattern {pattern:?}, but only lists can be read"
            ));
        }
        None => TargetModules::List(names("target_modules")?),
    };
    let r = value
        .get("r")
        .and_then(Value::as_u64)
        .filter(|r| (1..=65536).contains(r))
        .ok_or("r must be a positive whole number")?;
    Ok(LoraSettings {
        r: r as u32,
        lora_alpha: value
            .get("lora_alpha")
            .and_then(Value::as_f64)
            .ok_or("lora_alpha must be a number")?,
        lora_dropout: 0.0,
        target_modules,
        modules_to_save: names("modules_to_save")?,
        use_rslora: value.get("use_rslora").and_then(Value::as_bool).unwrap_or(false),
    })
}

#[cfg(test)]
mod tests {
    use super::parse_settings;

    #[test]
    fn reads_what_peft_writes() {
        let settings = parse_settings(
            r#"{"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "modules_to_save": null,
            "use_rslora": true, "bias": "none", "rank_pattern": {}, "use_dora": false, "some_future_key": 1}"#,
        )
        .unwrap();
        assert!((settings.scaling() - 16.0 / 8.0_f64.sqrt()).abs() < 1e-12);
    }

    #[test]
    fn refuses_what_would_compute_something_else() {
        let refusal = |rest: &str| {
            parse_settings(&format!(r#"{{"peft_type": "LORA", "r": 8, "lora_alpha": 16{rest}}}"#))
                .unwrap_err()
        };
        insta::assert_snapshot!(refusal(r#", "use_dora": true"#), @"use_dora = true is not supported");
        insta::assert_snapshot!(refusal(r#", "target_modules": ".*_proj""#), @r#"target_modules is the pattern ".*_proj", but only lists can be read"#);
        insta::assert_snapshot!(parse_settings(r#"{"peft_type": "IA3"}"#).unwrap_err(), @r#"peft_type is Some("IA3"), but only LORA adapters can be loaded"#);
    }
}
