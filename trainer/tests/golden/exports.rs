//! What real runs publish: loaded here, and kept for `parity.py` to load with transformers and PEFT.
//!
//! Each case is one run of the trainer's binary, from preflight to proof, over the JSON contract.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use finetune_contract::{
    CONTRACT_VERSION, DatasetFormat, DatasetSource, Document, Dtype, ExpectedData, LoraSettings,
    LrScheduler, ModelSource, OnOverflow, Optimizer, OutputTarget, Parallelism, PreflightConfig,
    PreflightReport, Recompute, RunConfig, RunId, TrainingSettings, parse, render,
};
use finetune_trainer::{
    model::{Model, attach::Attachment, config::ModelConfig},
    seed::Counter,
};
use serde_json::json;
use tch::{Device, Tensor};

use crate::golden::{FAMILIES, Golden, distance};

/// Where `parity.py` finds the cases; nothing of an earlier build may stay.
fn cases() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("parity")
}

#[test]
fn published_results_give_the_logits_that_were_trained() {
    let _ = fs::remove_dir_all(cases());
    let mut published = 0;
    for family in FAMILIES {
        let golden = Golden::open(family);
        publish_full(&Case::new(&golden, &format!("{family}-full"), None));
        published += 1;
        for (name, lora) in &golden.facts.lora {
            let settings = Some(lora.settings.clone());
            publish_adapter(&Case::new(&golden, &format!("{family}-{name}"), settings));
            published += 1;
        }
    }
    assert_eq!(published, 22);
}

fn publish_full(case: &Case<'_>) {
    let output = case.run();
    let tokens = &case.golden.facts.rows[0].tokens;
    case.record("full", &output, None, &load(&output).logits(tokens));
}

fn publish_adapter(case: &Case<'_>) {
    let output = case.run();
    let adapter = output.join("adapter");
    let tokens = &case.golden.facts.rows[0].tokens;
    let base = &case.golden.directory;
    let adapted =
        Model::load_with_adapter(base, case.golden.config(), &adapter, Dtype::Fp32, Device::Cpu)
            .unwrap()
            .logits(tokens);
    let found = distance(&load(&output).logits(tokens), &adapted);
    assert!(found <= 1e-5, "{}: the merged model's logits differ by {found:e}", case.name);
    case.record("merged", &output, Some(&adapter), &adapted);
}

/// One run.
struct Case<'a> {
    golden: &'a Golden,
    name: String,
    lora: Option<LoraSettings>,
    directory: PathBuf,
}

impl<'a> Case<'a> {
    fn new(golden: &'a Golden, name: &str, lora: Option<LoraSettings>) -> Self {
        Self { golden, name: name.to_owned(), lora, directory: cases().join(name) }
    }

    /// Preflights, trains and publishes; returns the published directory.
    fn run(&self) -> PathBuf {
        fs::create_dir_all(&self.directory).unwrap();
        let rows = self.golden.facts.rows.iter().map(|row| {
            let words: Vec<String> = row.tokens.iter().map(|token| format!("t{token}")).collect();
            format!("{}\n", json!({ "text": words.join(" ") }))
        });
        fs::write(self.directory.join("train.jsonl"), rows.collect::<String>()).unwrap();

        let output = self.directory.join("output");
        let run_id = RunId(self.name.clone());
        let model = ModelSource { uri: uri(&self.golden.directory), revision: None };
        let dataset = DatasetSource {
            format: DatasetFormat::Text,
            on_overflow: OnOverflow::Error,
            ..DatasetSource::of(uri(&self.directory.join("train.jsonl")))
        };
        let target = OutputTarget {
            uri: uri(&output),
            merge: self.lora.is_some(),
            overwrite: false,
            base_model_name: None,
        };
        let report: PreflightReport = self.trainer(
            "preflight",
            &PreflightConfig {
                version: CONTRACT_VERSION,
                run_id: run_id.clone(),
                model: model.clone(),
                dataset: dataset.clone(),
                lora: self.lora.clone(),
                initial_adapter: None,
                initial_checkpoint: None,
                context_length: Some(CONTEXT_LENGTH),
                output: target.clone(),
                measure_machine: false,
            },
        );
        let _: finetune_contract::RunReport = self.trainer(
            "train",
            &RunConfig {
                version: CONTRACT_VERSION,
                run_id,
                attempt: 0,
                model,
                dataset,
                lora: self.lora.clone(),
                initial_adapter: None,
                initial_checkpoint: None,
                training: training(),
                device: finetune_contract::Device::Cpu,
                parallelism: Parallelism::SINGLE,
                output: target,
                checkpoints_uri: uri(&self.directory.join("checkpoints")),
                expected: ExpectedData {
                    train_sha256: report.train.expect("preflight read the rows").sha256,
                    validation_sha256: None,
                    sequences: self.golden.facts.rows.len() as u64,
                },
                predicted_peak_bytes: 0,
                predicted_sent_bytes: None,
            },
        );
        output
    }

    /// Runs one command of the trainer and reads its report.
    fn trainer<D: Document, R: Document>(&self, command: &str, document: &D) -> R {
        let path = |suffix: &str| self.directory.join(format!("{command}.{suffix}"));
        fs::write(path("json"), render(document)).unwrap();
        let run = Command::new(env!("CARGO_BIN_EXE_finetune-trainer"))
            // On models this small a second thread only waits.
            .env("OMP_NUM_THREADS", "1")
            .arg(command)
            .arg("--config")
            .arg(path("json"))
            .arg("--report")
            .arg(path("report.json"))
            .arg("--work-dir")
            .arg(self.directory.join("work"))
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&run.stderr);
        assert!(
            run.status.success(),
            "{}: {command} ended with {}:\n{said}",
            self.name,
            run.status
        );
        parse(&fs::read_to_string(path("report.json")).unwrap()).unwrap()
    }

    /// Leaves what `parity.py` needs.
    fn record(&self, model: &str, output: &Path, adapter: Option<&Path>, trained: &Tensor) {
        let tokens = &self.golden.facts.rows[0].tokens;
        let case = json!({ "base": self.golden.directory, "tokens": tokens, model: output, "adapter": adapter });
        fs::write(self.directory.join("case.json"), case.to_string()).unwrap();
        let base = self.golden.load(Attachment::Frozen).logits(tokens);
        let logits = [("trained", trained), ("base", &base)];
        Tensor::write_safetensors(&logits, self.directory.join("logits.safetensors")).unwrap();
    }
}

const CONTEXT_LENGTH: u32 = 64;

/// A few steps with a rate high enough that the logits clearly move.
fn training() -> TrainingSettings {
    TrainingSettings {
        context_length: CONTEXT_LENGTH,
        total_steps: 5,
        total_sequences: None,
        learning_rate: 1e-2,
        lr_scheduler_type: LrScheduler::Constant,
        num_warmup_steps: 0,
        weight_decay: 0.01,
        max_grad_norm: 1.0,
        micro_batch_size: 2,
        gradient_accumulation_steps: 1,
        packing: false,
        optimizer: Optimizer::Adamw,
        dtype: Dtype::Fp32,
        recompute: Recompute::None,
        seed: 7,
        evaluation_steps: 0,
        early_stopping_patience: 0,
        checkpoint_steps: Some(100),
        num_checkpoints_to_keep: 1,
        max_time_seconds: None,
    }
}

fn load(directory: &Path) -> Model {
    let text = fs::read_to_string(directory.join("config.json")).unwrap();
    let config = ModelConfig::parse(&text).unwrap();
    let seed = Counter::from_seed(0);
    Model::load(directory, config, Attachment::Frozen, Dtype::Fp32, Device::Cpu, seed).unwrap()
}

fn uri(path: &Path) -> String {
    format!("file://{}", path.display())
}
