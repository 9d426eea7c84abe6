//! Writes a PEFT LoRA directory.
//!
//! # Source
//! Keys, shapes and types as `peft` 0.21.2 saves them. The settings are those that every version since
//! 0.6 reads; PEFT warns about keys that it does not know.

use std::path::Path;

use finetune_contract::LoraSettings;
use serde_json::{Value, json};
use tch::Kind;

use crate::{
    architecture::{config::ModelConfig, names},
    export::{Error, Export, files},
    hf::{
        safetensors_writer::{self, Declared},
        weights::WeightFiles,
    },
    lora::{
        CONFIG_FILE, PREFIX, WEIGHTS_FILE, targets,
        trainable::{LoraAdapters, Trainable},
    },
};

/// Writes the adapter with all files that a server needs beside the base model.
pub(super) fn write(
    export: &Export<'_>,
    lora: &LoraSettings,
    directory: &Path,
) -> Result<(), Error> {
    let Trainable::Lora(attachment) = export.training.model.trainable() else {
        return Ok(());
    };
    let config = export.training.model.config();
    let settings = adapter_config(config, lora, attachment, &base_name(export));
    files::write_json(&directory.join(CONFIG_FILE), &settings)?;
    write_weights(export, &directory.join(WEIGHTS_FILE))?;
    files::copy_tokenizer(export.base, export.chat_template, directory)
}

/// Builds `adapter_config.json`.
///
/// Targets are listed, so that every reader finds the same modules: by leaf name, which is what servers
/// compare, where all modules of that name are targets, otherwise by full path.
pub fn adapter_config(
    config: &ModelConfig,
    lora: &LoraSettings,
    attachment: &LoraAdapters,
    base_name: &str,
) -> Value {
    let targets: Vec<String> = attachment.targets.keys().cloned().collect();
    let targets = targets::shortest_names(config, &targets, names::matches);
    // PEFT compares these names without a dot.
    let saved = targets::shortest_names(config, &attachment.modules_to_save, |name, path| {
        path.ends_with(name)
    });
    let saved = if saved.is_empty() { Value::Null } else { json!(saved) };
    // In PEFT the field is an integer: 16 must not become 16.0.
    let alpha = if lora.lora_alpha.fract() == 0.0 {
        json!(lora.lora_alpha as i64)
    } else {
        json!(lora.lora_alpha)
    };
    json!({
        "alpha_pattern": {},
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "layers_pattern": null,
        "layers_to_transform": null,
        "lora_alpha": alpha,
        "lora_dropout": lora.lora_dropout,
        "modules_to_save": saved,
        "peft_type": "LORA",
        "r": lora.r,
        "rank_pattern": {},
        "revision": null,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_dora": false,
        "use_rslora": lora.use_rslora,
    })
}

/// Returns the name of the base model, which servers compare with that of the model they serve.
pub(super) fn base_name(export: &Export<'_>) -> String {
    let config = export.config;
    config.output.base_model_name.clone().unwrap_or_else(|| {
        let uri = config.model.uri.to_string();
        let name = uri.split_once("://").map_or(uri.as_str(), |(_, name)| name);
        // The libraries of the hub omit the prefix `models/`.
        match config.model.uri.hub_repository() {
            (Some("models"), _) => name.trim_start_matches("models/").to_owned(),
            _ => name.to_owned(),
        }
    })
}

fn write_weights(export: &Export<'_>, path: &Path) -> Result<(), Error> {
    let trained = export.training.model.trained();
    let base = WeightFiles::open(export.base).map_err(Error::Base)?;
    let declared: Vec<Declared> = trained
        .names()
        .iter()
        .filter_map(|name| {
            let shape = trained.master_of(name)?.size();
            Some(Declared { name: format!("{PREFIX}{name}"), kind: kind(&base, name), shape })
        })
        .collect();
    safetensors_writer::write(path, &declared, |declared| {
        let name = declared.name.strip_prefix(PREFIX).unwrap_or(&declared.name);
        Ok(trained.master_of(name).expect("declared from the same names"))
    })
    .map_err(|source: std::io::Error| Error::Write { path: path.to_owned(), source })
    .map(|_| ())
}

/// Returns the element type of a tensor: adapters are fp32, and `modules_to_save` have the type of the
/// base model, as in PEFT.
fn kind(base: &WeightFiles, name: &str) -> Kind {
    if name.contains(".lora_") {
        return Kind::Float;
    }
    // A head that was tied has the type of the embedding.
    let stored =
        base.tensor(name).or_else(|_| base.tensor(&format!("{}.weight", names::EMBED_TOKENS)));
    stored.map_or(Kind::Float, |tensor| tensor.kind())
}

#[cfg(test)]
mod tests {
    use finetune_contract::TargetModules;

    use super::*;
    use crate::hf::read_config;

    fn check(settings: &LoraSettings) -> String {
        let family = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/data/llama");
        let config = read_config(&family).unwrap();
        let attachment = Trainable::lora(&config, settings).unwrap();
        let Trainable::Lora(lora) = attachment else { panic!("LoRA settings attach LoRA") };
        adapter_config(&config, settings, &lora, "someone/base").to_string()
    }

    #[test]
    fn writes_settings_that_every_peft_version_reads() {
        let settings = LoraSettings {
            r: 8,
            lora_alpha: 16.0,
            lora_dropout: 0.05,
            target_modules: TargetModules::AllLinear,
            modules_to_save: Vec::new(),
            exclude_modules: None,
            layers_to_transform: Vec::new(),
            use_rslora: false,
        };
        insta::assert_snapshot!(check(&settings), @r#"{"alpha_pattern":{},"base_model_name_or_path":"someone/base","bias":"none","fan_in_fan_out":false,"inference_mode":true,"init_lora_weights":true,"layers_pattern":null,"layers_to_transform":null,"lora_alpha":16,"lora_dropout":0.05,"modules_to_save":null,"peft_type":"LORA","r":8,"rank_pattern":{},"revision":null,"target_modules":["down_proj","gate_proj","k_proj","o_proj","q_proj","up_proj","v_proj"],"task_type":"CAUSAL_LM","use_dora":false,"use_rslora":false}"#);
        let list = ["v_proj", "embed_tokens", "layers.1.self_attn.q_proj"];
        let other = LoraSettings {
            lora_alpha: 12.5,
            target_modules: TargetModules::List(list.map(str::to_owned).to_vec()),
            modules_to_save: vec!["lm_head".to_owned()],
            use_rslora: true,
            ..settings
        };
        insta::assert_snapshot!(check(&other), @r#"{"alpha_pattern":{},"base_model_name_or_path":"someone/base","bias":"none","fan_in_fan_out":false,"inference_mode":true,"init_lora_weights":true,"layers_pattern":null,"layers_to_transform":null,"lora_alpha":12.5,"lora_dropout":0.05,"modules_to_save":["lm_head"],"peft_type":"LORA","r":8,"rank_pattern":{},"revision":null,"target_modules":["embed_tokens","model.layers.1.self_attn.q_proj","v_proj"],"task_type":"CAUSAL_LM","use_dora":false,"use_rslora":true}"#);
    }
}
