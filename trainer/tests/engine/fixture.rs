//! Tiny random checkpoints on disk, and micro-batches with uneven masks.

use std::path::Path;

use finetune_contract::{Dtype, LoraSettings, TargetModules};
use finetune_trainer::{
    architecture::config::ModelConfig, data::sequences::Batch, lora::trainable::Trainable,
    model::Model, runtime::rng::RngKey,
};
use tch::{Device, Tensor};

/// Writes a checkpoint with random weights: norm weights near one, all others near zero.
pub fn checkpoint(directory: &Path, config_json: &str) -> ModelConfig {
    let config = ModelConfig::parse(config_json).unwrap();
    let seed = RngKey::from_seed(20);
    let tensors: Vec<(String, Tensor)> = config
        .tensors()
        .into_iter()
        .map(|spec| {
            let shape: Vec<i64> = spec.shape.iter().map(|&size| size as i64).collect();
            let values = seed.fold_in_name(&spec.name).normal_tensor(&shape, Device::Cpu) * 0.2;
            let is_norm = spec.name.contains("norm");
            (spec.name, if is_norm { values + 1.0 } else { values })
        })
        .collect();
    std::fs::write(directory.join("config.json"), config_json).unwrap();
    Tensor::write_safetensors(&tensors, directory.join("model.safetensors")).unwrap();
    config
}

pub fn load(directory: &Path, config: &ModelConfig, trainable: &Trainable) -> Model {
    let seed = RngKey::from_seed(3);
    let mut model =
        Model::load(directory, config.clone(), trainable.clone(), Dtype::Fp32, Device::Cpu, seed)
            .unwrap();
    randomize_adapters(&mut model, seed);
    model
}

/// Initialises both matrices of all adapters with random numbers.
///
/// A zero `lora_B` would hide the gradient of `lora_A`, or leave only rounding errors, which AdamW
/// turns into full steps.
pub fn randomize_adapters(model: &mut Model, seed: RngKey) {
    for name in model.trained().names().to_vec() {
        if name.contains("lora_") {
            let mut master = model.trained().master_of(&name).unwrap();
            let values = seed.fold_in_name(&name).normal_tensor(&master.size(), Device::Cpu) * 0.1;
            master.copy_(&values);
        }
    }
    model.trained_mut().refresh_compute();
}

pub fn lora(targets: &[&str], saved: &[&str]) -> LoraSettings {
    let owned = |list: &[&str]| list.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    LoraSettings {
        r: 4,
        lora_alpha: 6.0,
        lora_dropout: 0.0,
        target_modules: match targets {
            ["all-linear"] => TargetModules::AllLinear,
            _ => TargetModules::List(owned(targets)),
        },
        modules_to_save: owned(saved),
        exclude_modules: None,
        layers_to_transform: Vec::new(),
        use_rslora: false,
    }
}

/// Creates a micro-batch with segments of the given lengths; about a third of its tokens are
/// targets.
pub fn batch(lengths: &[usize], vocabulary: u64) -> Batch {
    let seed = RngKey::from_seed(9);
    let mut batch = Batch {
        tokens: Vec::new(),
        segment_lengths: lengths.to_vec(),
        target_positions: Vec::new(),
        labels: Vec::new(),
    };
    for (segment, &length) in lengths.iter().enumerate() {
        let seed = seed.fold_in(segment as u64);
        let start = batch.tokens.len();
        batch.tokens.extend((0..length as u64).map(|index| (seed.draw(index) % vocabulary) as i64));
        for index in 1..length {
            if index + 1 == length || seed.fold_in(1).uniform(index as u64) < 0.35 {
                batch.target_positions.push((start + index - 1) as i64);
                batch.labels.push(batch.tokens[start + index]);
            }
        }
    }
    batch
}

pub const LLAMA: &str = r#"{"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 61, "tie_word_embeddings": true}"#;

/// One config for each option of the architecture.
pub const FAMILIES: [(&str, &str); 7] = [
    ("llama, tied", LLAMA),
    (
        "llama 3, untied, stretched rope",
        r#"{"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 61, "rope_theta": 500.0,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16}}"#,
    ),
    (
        "llama, biases and head_dim",
        r#"{"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 61,
        "attention_bias": true, "mlp_bias": true}"#,
    ),
    (
        "mistral, full attention",
        r#"{"model_type": "mistral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 61, "sliding_window": null}"#,
    ),
    (
        "mistral, window of 5",
        r#"{"model_type": "mistral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 61, "sliding_window": 5}"#,
    ),
    (
        "qwen2, tied",
        r#"{"model_type": "qwen2", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 61, "tie_word_embeddings": true}"#,
    ),
    (
        "qwen3, head_dim",
        r#"{"model_type": "qwen3", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 61}"#,
    ),
];
