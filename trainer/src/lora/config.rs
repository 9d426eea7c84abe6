//! Parses `adapter_config.json` strictly: every key is used, known to have no effect, or refused by
//! name.
//!
//! # Source
//! The fields of `LoraConfig` and `PeftConfig` of `peft` 0.21.2, and how its layers use them.

use finetune_contract::{LoraSettings, ModuleNames, TargetModules};
use serde_json::{Map, Value};

/// Keys whose values are used.
const USED: [&str; 13] = [
    "bias",
    "ensure_weight_tying",
    "exclude_modules",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "modules_to_save",
    "peft_type",
    "r",
    "target_modules",
    "task_type",
    "use_rslora",
];

/// Keys that do not change what a loaded adapter computes on these models.
const WITHOUT_EFFECT: [&str; 15] = [
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    // Linear layers of these models are torch's own: PEFT resets it to false.
    "fan_in_fan_out",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    // Earlier releases of this product wrote it, for Ray Serve.
    "max_length",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
];

/// Keys that ask for an unsupported computation when they are set, with its description.
const REFUSED: [(&str, &str); 15] = [
    ("alora_invocation_tokens", "the adapter would act only after certain tokens (aLoRA)"),
    ("alpha_pattern", "some modules would have another lora_alpha"),
    ("arrow_config", "several adapters would be mixed for each token (Arrow)"),
    ("kasa_config", "the base model's weights would be changed, too (KaSA)"),
    ("layer_replication", "layers of the base model would be repeated"),
    ("lora_bias", "lora_B would have a bias"),
    ("megatron_config", "the layers would be Megatron's"),
    ("monteclora_config", "the adapter would be sampled (MonteCLoRA)"),
    ("rank_pattern", "some modules would have another rank"),
    ("target_parameters", "parameters outside of layers would be adapted"),
    ("trainable_token_indices", "rows of the embedding would be replaced"),
    ("use_bdlora", "lora_A and lora_B would be block-diagonal (BD-LoRA)"),
    ("use_dora", "weights would also have trained magnitudes (DoRA)"),
    ("use_qalora", "the adapter's input would be pooled (QA-LoRA)"),
    ("velora_config", "the layers would be VeLoRA's"),
];

/// The parsed configuration of an adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig {
    /// The LoRA settings.
    pub lora: LoraSettings,
    /// Whether tied embeddings share one adapter.
    pub ties_adapters: bool,
}

/// Parses the configuration of an adapter.
///
/// # Errors
/// A message for the user.
pub fn parse(text: &str) -> Result<AdapterConfig, String> {
    let value: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let Value::Object(config) = value else { return Err("it is not a JSON object".to_owned()) };
    check_kind(&config)?;
    check_keys(&config)?;
    check_initialisation(config.get("init_lora_weights"))?;
    let reader = Reader(&config);
    let layers_to_transform = reader.layers()?;
    let target_modules = match reader.names("target_modules")? {
        Some(ModuleNames::Pattern(word)) if word.eq_ignore_ascii_case("all-linear") => {
            TargetModules::AllLinear
        }
        Some(ModuleNames::Pattern(pattern)) => TargetModules::Pattern(pattern),
        Some(ModuleNames::List(list)) => TargetModules::List(list),
        None => TargetModules::List(Vec::new()),
    };
    let modules_to_save = match reader.names("modules_to_save")? {
        None => Vec::new(),
        Some(ModuleNames::List(list)) => list,
        Some(ModuleNames::Pattern(_)) => return Err("modules_to_save must be a list".to_owned()),
    };
    let r = config.get("r").and_then(Value::as_u64).filter(|r| (1..=65536).contains(r));
    let lora_alpha = config.get("lora_alpha").and_then(Value::as_f64);
    Ok(AdapterConfig {
        lora: LoraSettings {
            r: r.ok_or("r must be a positive integer")? as u32,
            lora_alpha: lora_alpha.ok_or("lora_alpha must be a number")?,
            lora_dropout: 0.0,
            target_modules,
            modules_to_save,
            exclude_modules: reader.names("exclude_modules")?,
            layers_to_transform,
            use_rslora: reader.flag("use_rslora")?,
        },
        ties_adapters: reader.flag("ensure_weight_tying")?,
    })
}

fn check_kind(config: &Map<String, Value>) -> Result<(), String> {
    match config.get("peft_type").and_then(Value::as_str) {
        Some("LORA") => {}
        Some(other) => {
            return Err(format!("peft_type is {other:?}, but only LORA adapters can be loaded"));
        }
        None => {
            return Err(
                "it has no peft_type: it is not the configuration of a PEFT adapter".to_owned()
            );
        }
    }
    match config.get("task_type") {
        None | Some(Value::Null) => Ok(()),
        Some(Value::String(task)) if task == "CAUSAL_LM" => Ok(()),
        Some(other) => Err(format!(
            "task_type is {other}, but only adapters of language models (CAUSAL_LM) can be loaded"
        )),
    }
}

fn check_keys(config: &Map<String, Value>) -> Result<(), String> {
    for (key, value) in config.iter().filter(|(_, value)| is_set(value)) {
        let key = key.as_str();
        if let Some((_, reason)) = REFUSED.iter().find(|(refused, _)| *refused == key) {
            return Err(format!(
                "{key} = {value} cannot be loaded: {reason}; merge the adapter into its base model with PEFT, and start from the merged model"
            ));
        }
        if key == "bias" && value.as_str() != Some("none") {
            return Err(format!(
                "bias = {value} cannot be loaded: biases of the base model would be replaced; merge the adapter into its base model with PEFT, and start from the merged model"
            ));
        }
        if !USED.contains(&key) && !WITHOUT_EFFECT.contains(&key) {
            return Err(format!(
                "{key} = {value} is not a key of LoRA adapters in PEFT 0.21: its effect is unknown, so the adapter is refused; remove the key if it is harmless"
            ));
        }
    }
    Ok(())
}

/// Refuses initialisations that also change the base model, each time the adapter is loaded.
fn check_initialisation(value: Option<&Value>) -> Result<(), String> {
    let word = match value {
        None | Some(Value::Null | Value::Bool(_)) => return Ok(()),
        Some(Value::String(word)) => word.to_lowercase(),
        Some(other) => {
            return Err(format!("init_lora_weights = {other} is not a supported initialisation"));
        }
    };
    if ["gaussian", "eva", "orthogonal"].contains(&word.as_str()) {
        return Ok(());
    }
    let changes_base = ["pissa", "olora", "corda", "loftq", "lora_ga"];
    let reason = if changes_base.iter().any(|method| word.starts_with(method)) {
        "this method also changes the weights of the base model; save the adapter with PEFT's path_initial_model_for_weight_conversion, which converts it to a plain one, or merge it with PEFT"
    } else {
        "only true, false, gaussian, eva and orthogonal do not change the base model"
    };
    Err(format!("init_lora_weights = {word:?} cannot be loaded: {reason}"))
}

/// Reports whether a value is set: not null, false or empty.
fn is_set(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(items) => !items.is_empty(),
        Value::Object(items) => !items.is_empty(),
        Value::Bool(true) | Value::Number(_) | Value::String(_) => true,
    }
}

struct Reader<'a>(&'a Map<String, Value>);

impl Reader<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    fn flag(&self, key: &str) -> Result<bool, String> {
        match self.get(key) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(format!("{key} = {other}, but it must be true or false")),
        }
    }

    fn names(&self, key: &str) -> Result<Option<ModuleNames>, String> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(pattern)) => Ok(Some(ModuleNames::Pattern(pattern.clone()))),
            Some(Value::Array(list)) if list.is_empty() => Ok(None),
            Some(list) => serde_json::from_value(list.clone())
                .map(|list| Some(ModuleNames::List(list)))
                .map_err(|_| format!("{key} = {list}, but it must be a list of names")),
        }
    }

    fn layers(&self) -> Result<Vec<u32>, String> {
        let patterns = match self.names("layers_pattern")? {
            None => Vec::new(),
            Some(ModuleNames::List(list)) => list,
            Some(ModuleNames::Pattern(one)) => vec![one],
        };
        if let Some(other) =
            patterns.iter().find(|pattern| !["", "layers"].contains(&pattern.as_str()))
        {
            return Err(format!(
                "layers_pattern = {other:?} cannot be loaded: the blocks of these models are called layers"
            ));
        }
        let Some(value) = self.get("layers_to_transform") else { return Ok(Vec::new()) };
        let one_or_more =
            if value.is_array() { value.clone() } else { Value::Array(vec![value.clone()]) };
        serde_json::from_value(one_or_more)
            .map_err(|_| format!("layers_to_transform = {value}, but it must be a list of layers"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(rest: &str) -> Result<AdapterConfig, String> {
        parse(&format!(
            r#"{{"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]{rest}}}"#
        ))
    }

    fn refusal(rest: &str) -> String {
        read(rest).unwrap_err()
    }

    #[test]
    fn reads_what_peft_writes() {
        // All keys that PEFT 0.21.2 writes for a plain adapter.
        let settings = read(
            r#", "alora_invocation_tokens": null, "alpha_pattern": {}, "arrow_config": null, "auto_mapping": null,
            "base_model_name_or_path": "acme/base", "bias": "none", "corda_config": null, "ensure_weight_tying": false,
            "eva_config": null, "exclude_modules": null, "fan_in_fan_out": false, "inference_mode": true,
            "init_lora_weights": true, "kasa_config": null, "layer_replication": null, "layers_pattern": null,
            "layers_to_transform": null, "loftq_config": {}, "lora_bias": false, "lora_dropout": 0.1,
            "lora_ga_config": null, "megatron_config": null, "megatron_core": "megatron.core", "modules_to_save": null,
            "monteclora_config": null, "peft_version": "0.21.2", "qalora_group_size": 16, "rank_pattern": {},
            "revision": null, "target_parameters": null, "task_type": "CAUSAL_LM", "trainable_token_indices": null,
            "use_bdlora": null, "use_dora": false, "use_qalora": false, "use_rslora": true, "velora_config": null"#,
        );
        assert!((settings.unwrap().lora.scaling() - 16.0 / 8.0_f64.sqrt()).abs() < 1e-12);
    }

    #[test]
    fn reads_every_form_of_module_names() {
        let lora = |rest: &str| {
            parse(&format!(r#"{{"peft_type": "LORA", "r": 8, "lora_alpha": 16, {rest}}}"#))
                .unwrap()
                .lora
        };
        let pattern = lora(r#""target_modules": ".*_proj", "exclude_modules": ["lm_head"]"#);
        assert_eq!(pattern.target_modules, TargetModules::Pattern(".*_proj".to_owned()));
        assert_eq!(pattern.exclude_modules, Some(ModuleNames::List(vec!["lm_head".to_owned()])));
        let all = lora(r#""target_modules": "all-linear", "exclude_modules": ".*0.*""#);
        assert_eq!(all.target_modules, TargetModules::AllLinear);
        assert_eq!(all.exclude_modules, Some(ModuleNames::Pattern(".*0.*".to_owned())));
        let layers = lora(
            r#""target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers""#,
        );
        assert_eq!(layers.layers_to_transform, [1]);
        assert_eq!(
            lora(r#""target_modules": ["q_proj"], "layers_to_transform": [0, 3]"#)
                .layers_to_transform,
            [0, 3]
        );
    }

    #[test]
    fn keys_without_effect_are_accepted() {
        for rest in [
            r#""max_length": 1024"#,
            r#""fan_in_fan_out": true"#,
            r#""init_lora_weights": "gaussian""#,
            r#""init_lora_weights": "eva", "eva_config": {"rho": 2.0}"#,
            r#""auto_mapping": {"unsloth_fixed": true}"#,
            r#""a_future_switch": false, "another": null"#,
        ] {
            assert!(read(&format!(", {rest}")).is_ok(), "{rest}");
        }
    }

    #[test]
    fn refuses_keys_that_change_the_computation() {
        let messages = [
            r#", "use_dora": true"#,
            r#", "lora_bias": true"#,
            r#", "rank_pattern": {"q_proj": 4}"#,
            r#", "alpha_pattern": {"q_proj": 4}"#,
            r#", "bias": "lora_only""#,
            r#", "trainable_token_indices": [1, 2]"#,
            r#", "target_parameters": ["mlp.experts.gate_up_proj"]"#,
            r#", "layer_replication": [[0, 2], [1, 3]]"#,
            r#", "arrow_config": {"top_k": 3}"#,
            r#", "init_lora_weights": "pissa_niter_16""#,
            r#", "init_lora_weights": "olora""#,
            r#", "init_lora_weights": "mica""#,
            r#", "task_type": "SEQ_CLS""#,
            r#", "layers_to_transform": [0], "layers_pattern": "h""#,
            r#", "exclude_modules": 3"#,
            r#", "some_future_key": 1"#,
        ]
        .map(refusal);
        insta::assert_snapshot!(messages.join("\n"), @r#"
use_dora = true cannot be loaded: weights would also have trained magnitudes (DoRA); merge the adapter into its base model with PEFT, and start from the merged model
lora_bias = true cannot be loaded: lora_B would have a bias; merge the adapter into its base model with PEFT, and start from the merged model
rank_pattern = {"q_proj":4} cannot be loaded: some modules would have another rank; merge the adapter into its base model with PEFT, and start from the merged model
alpha_pattern = {"q_proj":4} cannot be loaded: some modules would have another lora_alpha; merge the adapter into its base model with PEFT, and start from the merged model
bias = "lora_only" cannot be loaded: biases of the base model would be replaced; merge the adapter into its base model with PEFT, and start from the merged model
trainable_token_indices = [1,2] cannot be loaded: rows of the embedding would be replaced; merge the adapter into its base model with PEFT, and start from the merged model
target_parameters = ["mlp.experts.gate_up_proj"] cannot be loaded: parameters outside of layers would be adapted; merge the adapter into its base model with PEFT, and start from the merged model
layer_replication = [[0,2],[1,3]] cannot be loaded: layers of the base model would be repeated; merge the adapter into its base model with PEFT, and start from the merged model
arrow_config = {"top_k":3} cannot be loaded: several adapters would be mixed for each token (Arrow); merge the adapter into its base model with PEFT, and start from the merged model
init_lora_weights = "pissa_niter_16" cannot be loaded: this method also changes the weights of the base model; save the adapter with PEFT's path_initial_model_for_weight_conversion, which converts it to a plain one, or merge it with PEFT
init_lora_weights = "olora" cannot be loaded: this method also changes the weights of the base model; save the adapter with PEFT's path_initial_model_for_weight_conversion, which converts it to a plain one, or merge it with PEFT
init_lora_weights = "mica" cannot be loaded: only true, false, gaussian, eva and orthogonal do not change the base model
task_type is "SEQ_CLS", but only adapters of language models (CAUSAL_LM) can be loaded
layers_pattern = "h" cannot be loaded: the blocks of these models are called layers
exclude_modules = 3, but it must be a list of names
some_future_key = 1 is not a key of LoRA adapters in PEFT 0.21: its effect is unknown, so the adapter is refused; remove the key if it is harmless
"#);
        insta::assert_snapshot!(parse(r#"{"peft_type": "IA3"}"#).unwrap_err(), @r#"peft_type is "IA3", but only LORA adapters can be loaded"#);
        insta::assert_snapshot!(parse("[]").unwrap_err(), @"it is not a JSON object");
    }
}
