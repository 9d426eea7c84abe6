//! Reads the golden results of a family, and runs the engine on the same rows.

use std::{
    collections::BTreeMap,
    fs::DirEntry,
    path::{Path, PathBuf},
    sync::LazyLock,
};

use finetune_contract::{Dtype, LoraSettings, Optimizer, Recompute};
use finetune_trainer::{
    architecture::config::ModelConfig,
    data::sequences::Batch,
    lora::trainable::Trainable,
    model::Model,
    objective::causal_lm::CausalLm,
    optim::{AdamW, Clipped, clip},
    runtime::rng::RngKey,
};
use serde::Deserialize;
use tch::{Device, Kind, Tensor};

/// Returns every family of `gen.py`, in alphabetical order.
pub(crate) fn families() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().map(String::as_str)
}

/// The directories that `gen.py` wrote.
static FAMILIES: LazyLock<Vec<String>> = LazyLock::new(|| {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/data");
    let name = |entry: std::io::Result<DirEntry>| entry.unwrap().file_name().into_string().unwrap();
    let mut names: Vec<String> = data.read_dir().unwrap().map(name).collect();
    names.sort();
    assert!(names.len() >= 10, "families are missing: {names:?}");
    names
});

/// One directory below `data/`.
pub(crate) struct Golden {
    pub(crate) directory: PathBuf,
    pub(crate) facts: Facts,
    tensors: BTreeMap<String, Tensor>,
}

/// `golden.json`.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Facts {
    pub(crate) rows: Vec<Row>,
    pub(crate) loss: f64,
    pub(crate) far_positions: Vec<i64>,
    training: TrainingFacts,
    pub(crate) full: Option<Trajectory>,
    #[serde(default)]
    pub(crate) lora: BTreeMap<String, LoraCase>,
    #[serde(default)]
    pub(crate) targets: Vec<TargetCase>,
}

/// Settings, and the modules on which PEFT puts an adapter; `None` if PEFT refuses them.
#[derive(Deserialize)]
pub(crate) struct TargetCase {
    pub(crate) settings: LoraSettings,
    pub(crate) modules: Option<Vec<String>>,
}

/// A row of tokens, and which of them are targets.
#[derive(Deserialize)]
pub(crate) struct Row {
    pub(crate) tokens: Vec<u32>,
    targets: Vec<bool>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct TrainingFacts {
    rows_of_step: Vec<Vec<usize>>,
    weight_decay: f64,
    max_grad_norm: f64,
}

/// A training run of the reference: the learning rate, and the loss and unclipped gradient norm of
/// each step.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Trajectory {
    learning_rate: f64,
    losses: Vec<f64>,
    grad_norms: Vec<f64>,
}

/// One adapter: its settings, and the run that trained it.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct LoraCase {
    pub(crate) settings: LoraSettings,
    /// The `adapter_config.json` that PEFT writes.
    pub(crate) adapter_config: serde_json::Value,
    #[serde(flatten)]
    pub(crate) trajectory: Trajectory,
}

impl Golden {
    pub(crate) fn open(family: &str) -> Self {
        let directory =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/data").join(family);
        let text = std::fs::read_to_string(directory.join("golden.json")).unwrap();
        let tensors = Tensor::read_safetensors(directory.join("golden.safetensors")).unwrap();
        Self {
            facts: serde_json::from_str(&text).unwrap(),
            tensors: tensors.into_iter().collect(),
            directory,
        }
    }

    pub(crate) fn tensor(&self, name: &str) -> &Tensor {
        self.tensors.get(name).unwrap_or_else(|| panic!("no golden tensor {name:?}"))
    }

    /// Returns the tensors whose names start with a prefix, by their remaining names.
    pub(crate) fn tensors_below<'a>(&'a self, prefix: &str) -> BTreeMap<&'a str, &'a Tensor> {
        let below =
            |(name, tensor): (&'a String, &'a Tensor)| Some((name.strip_prefix(prefix)?, tensor));
        self.tensors.iter().filter_map(below).collect()
    }

    pub(crate) fn config(&self) -> ModelConfig {
        let text = std::fs::read_to_string(self.directory.join("config.json")).unwrap();
        ModelConfig::parse(&text).unwrap()
    }

    pub(crate) fn load(&self, trainable: Trainable) -> Model {
        let seed = RngKey::from_seed(0);
        Model::load(&self.directory, self.config(), trainable, Dtype::Fp32, Device::Cpu, seed)
            .unwrap()
    }

    /// Packs rows into a micro-batch as the trainer does.
    pub(crate) fn batch(&self, rows: impl IntoIterator<Item = usize>) -> Batch {
        let mut batch = Batch {
            tokens: Vec::new(),
            segment_lengths: Vec::new(),
            target_positions: Vec::new(),
            labels: Vec::new(),
        };
        for row in rows.into_iter().map(|row| &self.facts.rows[row]) {
            let start = batch.tokens.len();
            batch.tokens.extend(row.tokens.iter().map(|&token| i64::from(token)));
            batch.segment_lengths.push(row.tokens.len());
            for position in (1..row.tokens.len()).filter(|&position| row.targets[position]) {
                batch.target_positions.push((start + position - 1) as i64);
                batch.labels.push(i64::from(row.tokens[position]));
            }
        }
        batch
    }

    /// Trains as the reference did, and compares the loss and gradient norm of each step.
    ///
    /// The first step shows whether the gradient is right. Later, rounding errors grow, most in a
    /// norm that triples from one step to the next: the largest seen was 2.7e-5.
    pub(crate) fn train(&self, model: &mut Model, trajectory: &Trajectory, what: &str) {
        let training = &self.facts.training;
        let mut optimizer = AdamW::new(model.trained(), Optimizer::Adamw, training.weight_decay);
        for (step, rows) in training.rows_of_step.iter().enumerate() {
            let batch = self.batch(rows.iter().copied());
            let count = batch.labels.len() as u64;
            model.trained().zero_grad();
            let loss = model.accumulate_gradients(&batch, &CausalLm, Recompute::None, None).loss
                / count as f64;
            model.reduce_gradients().unwrap();
            let square = model.gradient_square().unwrap();
            let Clipped { norm, scale } = clip(square, count, training.max_grad_norm);
            let rate = trajectory.learning_rate;
            optimizer.step(model.trained_mut(), scale, rate, step as u64 + 1);
            let (loss_limit, norm_limit) = if step == 0 { (1e-6, 1e-6) } else { (1e-5, 5e-5) };
            let loss_error = (loss / trajectory.losses[step] - 1.0).abs();
            assert!(
                loss_error <= loss_limit,
                "{what}: the loss of step {step} differs by {loss_error:e}"
            );
            let norm_error = (norm / trajectory.grad_norms[step] - 1.0).abs();
            assert!(
                norm_error <= norm_limit,
                "{what}: the norm of step {step} differs by {norm_error:e}"
            );
        }
    }
}

/// The largest absolute difference over the largest absolute value of the reference.
pub(crate) fn distance(found: &Tensor, reference: &Tensor) -> f64 {
    assert_eq!(found.size(), reference.size());
    let wide = |tensor: &Tensor| tensor.to_kind(Kind::Double);
    let largest = |tensor: &Tensor| tensor.abs().max().double_value(&[]);
    let distance = largest(&(wide(found) - wide(reference))) / largest(&wide(reference));
    assert!(distance.is_finite(), "not finite, or the reference is zero");
    distance
}
