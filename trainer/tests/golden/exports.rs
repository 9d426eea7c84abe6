//! The published results of real runs, loaded here and left for `parity.py` to load with
//! transformers and PEFT.
//!
//! Each case is one run of the trainer's binary over the JSON contract, from the preflight to the
//! verification.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use finetune_contract::{
    DatasetFormat, DatasetSource, Document, Dtype, ExpectedData, LoraSettings, ModelSource,
    OnOverflow, OutputTarget, PreflightConfig, PreflightReport, RunConfig, RunId, TargetModules,
    TrainerArgs, TrainerCommand, TrainingSettings, parse, render,
    testing::{file_uri, run_config, training_settings},
};
use finetune_trainer::{
    data::{chat::rendering::Rendering, tokenizer::Tokenizer},
    hf::{extension, read_config},
    lora::trainable::Trainable,
    model::Model,
    runtime::rng::RngKey,
};
use serde_json::json;
use tch::{Device, Kind, Tensor};

use crate::golden::{Golden, distance, families};

/// Where `parity.py` finds the cases.
fn cases() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("parity")
}

#[test]
fn published_results_give_the_logits_that_were_trained() {
    let mut published = 0;
    for family in families() {
        let golden = Golden::open(family);
        let base = Base::of(&golden);
        base.publish_full(&format!("{family}-full"));
        published += 1;
        for (name, lora) in &golden.facts.lora {
            base.publish_adapter(&format!("{family}-{name}"), &lora.settings);
            published += 1;
        }
    }
    assert_eq!(published, families().count() + 28);
}

/// The target modules that guides recommend, on a real model with tied embeddings.
///
/// `FINETUNE_TEST_MODEL` names a directory with SmolLM2-135M-Instruct. Its weights are converted to
/// fp32, so that merging does not round.
#[test]
fn nine_modules_of_a_real_model_merge_within_rounding() {
    let Some(stored) = std::env::var_os("FINETUNE_TEST_MODEL").map(PathBuf::from) else {
        eprintln!("skipped: FINETUNE_TEST_MODEL is not set");
        return;
    };
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("real-model-fp32");
    // Converted to fp32.
    copy_model(&stored, &directory, |tensors| {
        for (_, tensor) in tensors {
            *tensor = tensor.to_kind(Kind::Float);
        }
    });
    let base = Base {
        directory,
        added_tokens: Vec::new(),
        rows: ["The tide turns at noon.", "Gauge four reads ninety.", "End of report.", "Yes."]
            .map(str::to_owned)
            .to_vec(),
        probe: vec![1, 504, 3575, 282, 4649, 314, 260, 2240],
        tolerance: 1e-4,
        training: TrainingSettings { learning_rate: 1e-3, ..training() },
    };
    let golden = Golden::open("llama");
    let settings = LoraSettings { r: 8, ..golden.facts.lora["nine"].settings.clone() };
    base.publish_adapter("real-model-nine", &settings);
}

/// Copies a model with changed weights.
fn copy_model(from: &Path, to: &Path, change: impl Fn(&mut Vec<(String, Tensor)>)) {
    let _ = fs::remove_dir_all(to);
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy();
        if name.starts_with("model") && name.ends_with(".safetensors") {
            let mut tensors = Tensor::read_safetensors(&path).unwrap();
            change(&mut tensors);
            Tensor::write_safetensors(&tensors, to.join(path.file_name().unwrap())).unwrap();
        } else if path.is_file() {
            fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
        }
    }
}

/// A model whose config ties the embeddings, but whose weights have a different head.
#[test]
fn a_separate_head_is_used_and_published() {
    let golden = Golden::open("llama");
    let tokens = &golden.facts.rows[0].tokens;
    let with_head = |name: &str, factor: f64| {
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        copy_model(&golden.directory, &directory, |tensors| {
            let embedding = tensors.iter().find(|(name, _)| name == "model.embed_tokens.weight");
            let head = &embedding.unwrap().1 * factor;
            tensors.push(("lm_head.weight".to_owned(), head));
        });
        directory
    };
    let same = with_head("llama-same-head", 1.0);
    assert!(read_config(&same).unwrap().tie_word_embeddings);
    let directory = with_head("llama-own-head", 2.0);
    assert!(!read_config(&directory).unwrap().tie_word_embeddings);
    let doubled = load(&golden.directory).logits(tokens) * 2.0;
    assert!(distance(&load(&directory).logits(tokens), &doubled) <= 1e-6);
    let base = Base { directory, ..Base::of(&golden) };
    base.publish_full("llama-own-head");
    let output = cases().join("llama-own-head/output");
    let config = fs::read_to_string(output.join("config.json")).unwrap();
    assert!(config.contains("\"tie_word_embeddings\": false"), "{config}");
    let published = Tensor::read_safetensors(output.join("model.safetensors")).unwrap();
    assert!(published.iter().any(|(name, _)| name == "lm_head.weight"));
}

/// Tokens that the base model does not have: they are trained, published, and loaded by other
/// software.
#[test]
fn added_tokens_are_trained_and_published() {
    let nine = Golden::open("llama").facts.lora["nine"].settings.clone();
    let outer = ["embed_tokens", "lm_head"].map(str::to_owned);
    let saved = LoraSettings {
        modules_to_save: outer.to_vec(),
        target_modules: TargetModules::AllLinear,
        ..nine
    };
    for family in ["llama", "llama-biases"] {
        let golden = Golden::open(family);
        let tokenizer = Tokenizer::load(&golden.directory, &Rendering::of_model()).unwrap();
        let first = tokenizer.vocab_size();
        let base = Base {
            added_tokens: ["<|call|>", "<|result|>"].map(str::to_owned).to_vec(),
            rows: golden.facts.rows.iter().map(|row| call(&row.tokens)).collect(),
            probe: [&golden.facts.rows[0].tokens[..6], &[first, first + 1]].concat(),
            ..Base::of(&golden)
        };
        base.publish_full(&format!("{family}-added-tokens-full"));
        base.publish_adapter(&format!("{family}-added-tokens-saved"), &saved);
    }
}

/// A row that uses both added tokens.
fn call(tokens: &[u32]) -> String {
    let (before, after) = tokens.split_at(tokens.len() / 2);
    format!("{} <|call|> {} <|result|>", words(before), words(after))
}

fn words(tokens: &[u32]) -> String {
    tokens.iter().map(|token| format!("t{token}")).collect::<Vec<_>>().join(" ")
}

/// A model, its training rows, and the tokens whose logits are compared.
struct Base {
    directory: PathBuf,
    added_tokens: Vec<String>,
    rows: Vec<String>,
    probe: Vec<u32>,
    /// The largest relative distance of logits.
    tolerance: f64,
    training: TrainingSettings,
}

impl Base {
    /// A tiny model of `gen.py`, trained on its rows.
    fn of(golden: &Golden) -> Self {
        let rows = &golden.facts.rows;
        Self {
            directory: golden.directory.clone(),
            added_tokens: Vec::new(),
            rows: rows.iter().map(|row| words(&row.tokens)).collect(),
            probe: rows[0].tokens.clone(),
            tolerance: 1e-5,
            training: training(),
        }
    }

    /// Returns the model's directory with the tokens added.
    fn extended(&self) -> PathBuf {
        let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("extended");
        extension::add_tokens(&self.directory, &self.added_tokens, &cache).unwrap()
    }

    fn publish_full(&self, name: &str) {
        let case = Case::new(self, name, None);
        let output = case.run();
        case.record("full", &output, None, &load(&output).logits(&self.probe));
    }

    fn publish_adapter(&self, name: &str, settings: &LoraSettings) {
        let case = Case::new(self, name, Some(settings.clone()));
        let output = case.run();
        let adapter = output.join("adapter");
        let base = self.extended();
        let config = read_config(&base).unwrap();
        let adapted = Model::load_with_adapter(&base, config, &adapter, Dtype::Fp32, Device::Cpu)
            .unwrap()
            .logits(&self.probe);
        let found = distance(&load(&output).logits(&self.probe), &adapted);
        assert!(found <= self.tolerance, "{name}: the merged model's logits differ by {found:e}");
        case.record("merged", &output, Some(&adapter), &adapted);
    }
}

/// One run.
struct Case<'a> {
    base: &'a Base,
    name: String,
    lora: Option<LoraSettings>,
    directory: PathBuf,
}

impl<'a> Case<'a> {
    /// Creates a case in an empty directory, because an earlier build may have left files.
    fn new(base: &'a Base, name: &str, lora: Option<LoraSettings>) -> Self {
        let directory = cases().join(name);
        let _ = fs::remove_dir_all(&directory);
        Self { base, name: name.to_owned(), lora, directory }
    }

    /// Preflights, trains and publishes; returns the published directory.
    fn run(&self) -> PathBuf {
        fs::create_dir_all(&self.directory).unwrap();
        let rows = self.base.rows.iter().map(|row| format!("{}\n", json!({ "text": row })));
        fs::write(self.directory.join("train.jsonl"), rows.collect::<String>()).unwrap();

        let output = self.directory.join("output");
        let run_id = RunId(self.name.clone());
        let model = ModelSource {
            added_tokens: self.base.added_tokens.clone(),
            ..ModelSource::of(file_uri(&self.base.directory))
        };
        let dataset = DatasetSource {
            format: DatasetFormat::Text,
            on_overflow: OnOverflow::Error,
            ..DatasetSource::of(file_uri(&self.directory.join("train.jsonl")))
        };
        let target =
            OutputTarget { merge: self.lora.is_some(), ..OutputTarget::of(file_uri(&output)) };
        let report: PreflightReport = self.trainer(
            TrainerCommand::Preflight,
            &PreflightConfig {
                lora: self.lora.clone(),
                context_length: Some(CONTEXT_LENGTH),
                ..PreflightConfig::of(
                    run_id.clone(),
                    model.clone(),
                    dataset.clone(),
                    target.clone(),
                )
            },
        );
        let _: finetune_contract::RunReport = self.trainer(
            TrainerCommand::Train,
            &RunConfig {
                run_id,
                lora: self.lora.clone(),
                training: self.base.training.clone(),
                expected: ExpectedData {
                    train_sha256: report.train.expect("preflight read the rows").sha256,
                    validation_sha256: None,
                    sequences: self.base.rows.len() as u64,
                },
                ..run_config(model, dataset, target)
            },
        );
        output
    }

    /// Runs one command of the trainer and reads its report.
    fn trainer<D: Document, R: Document>(&self, command: TrainerCommand, document: &D) -> R {
        let name = command.as_str();
        let path = |suffix: &str| self.directory.join(format!("{name}.{suffix}"));
        fs::write(path("json"), render(document)).unwrap();
        let run = Command::new(env!("CARGO_BIN_EXE_finetune-trainer"))
            // On models this small, a second thread does not help.
            .env("OMP_NUM_THREADS", "1")
            .args(
                TrainerArgs::new(
                    command,
                    path("json"),
                    path("report.json"),
                    self.directory.join("work"),
                )
                .to_args(),
            )
            .output()
            .unwrap();
        let log = String::from_utf8_lossy(&run.stderr);
        assert!(run.status.success(), "{}: {name} ended with {}:\n{log}", self.name, run.status);
        parse(&fs::read_to_string(path("report.json")).unwrap()).unwrap()
    }

    /// Writes the files that `parity.py` reads.
    fn record(&self, model: &str, output: &Path, adapter: Option<&Path>, trained: &Tensor) {
        let Base { directory, added_tokens, probe, tolerance, .. } = self.base;
        let case = json!({
            "base": directory, "addedTokens": added_tokens, "tokens": probe, "tolerance": tolerance,
            model: output, "adapter": adapter,
        });
        fs::write(self.directory.join("case.json"), case.to_string()).unwrap();
        let base = load(&self.base.extended()).logits(probe);
        let logits = [("trained", trained), ("base", &base)];
        Tensor::write_safetensors(&logits, self.directory.join("logits.safetensors")).unwrap();
    }
}

const CONTEXT_LENGTH: u32 = 64;

/// A few steps with a learning rate high enough that the logits clearly change.
fn training() -> TrainingSettings {
    TrainingSettings {
        context_length: CONTEXT_LENGTH,
        learning_rate: 1e-2,
        micro_batch_size: 2,
        ..training_settings()
    }
}

fn load(directory: &Path) -> Model {
    let config = read_config(directory).unwrap();
    let seed = RngKey::from_seed(0);
    Model::load(directory, config, Trainable::Frozen, Dtype::Fp32, Device::Cpu, seed).unwrap()
}
