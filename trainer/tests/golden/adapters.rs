//! Each kind of adapter, on a tied and on an untied model: ten AdamW steps, and PEFT's own files.

use finetune_contract::Dtype;
use finetune_trainer::{
    lora::{CONFIG_FILE, PREFIX, WEIGHTS_FILE, trainable::Trainable},
    model::Model,
};
use tch::{Device, Tensor};

use crate::golden::{Golden, distance, families};

#[test]
fn ten_steps_of_each_adapter_equal_peft() {
    let mut trained = Vec::new();
    for family in families() {
        let golden = Golden::open(family);
        for (case, lora) in &golden.facts.lora {
            let trainable = Trainable::lora(&golden.config(), &lora.settings).unwrap();
            let mut model = golden.load(trainable);
            for (name, start) in golden.tensors_below(&format!("{case}.start.")) {
                model.trained().master_of(name).unwrap().copy_(start);
            }
            model.trained_mut().refresh_compute();
            golden.train(&mut model, &lora.trajectory, &format!("{family}, {case}"));
            let expected = golden.tensors_below(&format!("{case}.end."));
            assert_eq!(model.trained().names().len(), expected.len(), "{family}, {case}");
            for (name, expected) in expected {
                let found = distance(&model.trained().master_of(name).unwrap(), expected);
                assert!(
                    found <= 1e-4,
                    "{family}, {case}: {name} differs by {found:e} after training"
                );
            }
        }
        trained.push((family, golden.facts.lora.len()));
    }
    trained.retain(|&(_, cases)| cases > 0);
    assert_eq!(trained, [("llama", 14), ("llama3", 14)]);
}

/// Names that PEFT ignores and we refuse: a name that matches no module is a mistake.
const STRICTER: [&str; 1] = ["W_pack"];

#[test]
fn settings_select_the_same_modules_as_in_peft() {
    let mut compared = 0;
    for family in families() {
        let golden = Golden::open(family);
        let config = golden.config();
        for case in &golden.facts.targets {
            let found = match Trainable::lora(&config, &case.settings) {
                Ok(Trainable::Lora(lora)) => Some(lora.targets.into_keys().collect::<Vec<_>>()),
                Ok(_) => panic!("LoRA settings train adapters"),
                Err(_) => None,
            };
            let settings = format!("{:?}", case.settings);
            if STRICTER.iter().any(|name| settings.contains(name)) {
                assert!(found.is_none() && case.modules.is_some(), "{family}: {settings}");
                continue;
            }
            assert_eq!(found, case.modules, "{family}: {settings}");
            compared += 1;
        }
    }
    assert_eq!(compared, 48);
}

#[test]
fn an_adapter_that_peft_wrote_gives_the_logits_peft_gives() {
    for family in families() {
        let golden = Golden::open(family);
        for (case, lora) in &golden.facts.lora {
            let directory = tempfile::tempdir().unwrap();
            let written: Vec<(String, &Tensor)> = golden
                .tensors_below(&format!("{case}.end."))
                .into_iter()
                .map(|(name, tensor)| (format!("{PREFIX}{name}"), tensor))
                .collect();
            Tensor::write_safetensors(&written, directory.path().join(WEIGHTS_FILE)).unwrap();
            let settings = lora.adapter_config.to_string();
            std::fs::write(directory.path().join(CONFIG_FILE), settings).unwrap();
            let model = Model::load_with_adapter(
                &golden.directory,
                golden.config(),
                directory.path(),
                Dtype::Fp32,
                Device::Cpu,
            )
            .unwrap();
            let logits = model.logits(&golden.facts.rows[0].tokens);
            let found = distance(&logits, golden.tensor(&format!("{case}.logits")));
            assert!(found <= 1e-5, "{family}, {case}: logits differ by {found:e}");
        }
    }
}
