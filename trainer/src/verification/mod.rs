//! The proof behind `Succeeded`: the published bytes, read back, are whole, finite, changed the
//! model, and behave as what was trained.

use std::path::{Path, PathBuf};

use finetune_contract::{ArtifactKind, Dtype, FailureReason, Manifest, Proof, RunConfig, Strategy};
use tch::{Device, Kind, Tensor};

use crate::{
    context::RunContext,
    data::Batch,
    failure::Failure,
    hf::{read_config, weights::Checkpoint},
    lora::{self, trainable::Trainable},
    model::Model,
    runtime::rng::RngKey,
    store::{self, Store, publish},
    train::DataSplit,
};

/// Tokens of the training data the proof looks at, at most.
const PROBE_TOKENS: usize = 64;

/// How far the reloaded loss may be from the trained one, relative to it.
///
/// Adapters are published in fp32 and come back exactly. Full weights are rounded once to the base
/// model's type. A merged update is rounded to the steps of weights much larger than itself, which
/// in bf16 cost 6 % of the loss in a run of six steps on SmolLM2; a wrong merge costs all of it.
const fn loss_tolerance(kind: ArtifactKind) -> f64 {
    match kind {
        ArtifactKind::Adapter => 0.001,
        ArtifactKind::FullModel => 0.02,
        ArtifactKind::MergedModel => 0.2,
    }
}

/// The same where the result is loaded on another kind of device than it was trained on, whose
/// kernels round bf16 elsewhere. An estimate; not measured.
const ELSEWHERE: f64 = 0.05;

/// A piece of training data and what the base model says about it.
pub struct Probe {
    batch: Batch,
    tokens: Vec<u32>,
    base_logits: Tensor,
}

/// What a model says about the probe.
pub struct Seen {
    loss: f64,
    logits: Tensor,
}

impl Probe {
    /// Takes the start of the first row that has a target in it; `model` must still be the base model.
    pub fn of(model: &Model, train: &DataSplit) -> Self {
        let rows = (0..train.dataset.len()).map(|index| train.dataset.row(index));
        let start =
            |targets: &[bool]| targets.iter().take(PROBE_TOKENS).any(|&is_target| is_target);
        let row = rows
            .into_iter()
            .find(|row| start(&row.targets))
            .unwrap_or_else(|| train.dataset.row(0));
        let length = row.tokens.len().min(PROBE_TOKENS);
        let tokens = row.tokens[..length].to_vec();
        let (mut target_positions, mut labels) = (Vec::new(), Vec::new());
        // A row whose targets all lie further on is looked at as a whole.
        let is_all = !start(&row.targets);
        for (index, &token) in tokens.iter().enumerate().skip(1) {
            if is_all || row.targets[index] {
                target_positions.push(index as i64 - 1);
                labels.push(i64::from(token));
            }
        }
        let batch = Batch {
            tokens: tokens.iter().map(|&token| i64::from(token)).collect(),
            segment_lengths: vec![length],
            target_positions,
            labels,
        };
        let base_logits = model.logits(&tokens);
        Self { batch, tokens, base_logits }
    }

    /// Asks a model.
    pub fn look_at(&self, model: &Model) -> Seen {
        let loss = model.loss(&self.batch) / self.batch.labels.len() as f64;
        Seen { loss, logits: model.logits(&self.tokens) }
    }
}

/// Reads a published result back and compares it with what was trained.
///
/// # Errors
/// A [`Failure`] of reason `NotProven` that says what does not hold.
pub fn read_back(
    config: &RunConfig,
    context: &RunContext<'_>,
    output: &Store,
    manifest: &Manifest,
    base: &Path,
    probe: &Probe,
    trained: &Seen,
) -> Result<Proof, Failure> {
    let directory = context.empty_directory("readback")?;
    let bytes = fetch_verified(output, manifest, &directory)?;
    for path in
        manifest.files.iter().map(|file| &file.path).filter(|path| path.ends_with(".safetensors"))
    {
        check_tensors(&directory.join(path))?;
    }
    let device = device(config, context);
    let model = load(manifest.kind, &directory, base, config.training.dtype, device)?;
    let seen = probe.look_at(&model);
    drop(model);
    let is_elsewhere = device != context.device;
    let base_logits = if is_elsewhere {
        load_frozen(base, config.training.dtype, device)?.logits(&probe.tokens)
    } else {
        probe.base_logits.shallow_clone()
    };
    let max_logit_change = largest_difference(&seen.logits, &base_logits);
    if max_logit_change == 0.0 {
        return Err(not_proven(
            config,
            "it gives the very logits of the base model: nothing was learned",
        ));
    }
    let tolerance = loss_tolerance(manifest.kind).max(if is_elsewhere { ELSEWHERE } else { 0.0 });
    if !seen.loss.is_finite()
        || (seen.loss - trained.loss).abs() > tolerance * trained.loss.abs().max(0.1)
    {
        let why = format!(
            "its loss on training data is {}, but was {} when trained",
            seen.loss, trained.loss
        );
        return Err(not_proven(config, &why));
    }
    let _ = std::fs::remove_dir_all(&directory);
    Ok(Proof {
        files: manifest.files.len() as u32,
        bytes,
        max_logit_change,
        loss_trained_and_reloaded: Some([trained.loss, seen.loss]),
    })
}

/// Reads back a result that was published before: by an earlier attempt, or by another run of the same
/// inputs.
///
/// What was trained is gone, so only the bytes and that the result loads can be shown.
///
/// # Errors
/// A [`Failure`] if the bytes are damaged or do not load.
pub fn of_published(
    config: &RunConfig,
    context: &RunContext<'_>,
    output: &Store,
    manifest: &Manifest,
    base: &Path,
) -> Result<Proof, Failure> {
    let directory = context.empty_directory("readback")?;
    let bytes = fetch_verified(output, manifest, &directory)?;
    let tokens: Vec<u32> = (0..16).collect();
    let dtype = config.training.dtype;
    // One after the other: the plan has room for one.
    let device = device(config, context);
    let logits = load(manifest.kind, &directory, base, dtype, device)?.logits(&tokens);
    if !is_finite(&logits) {
        return Err(not_proven(config, "it gives logits that are not finite"));
    }
    let base_logits = load_frozen(base, dtype, device)?.logits(&tokens);
    let max_logit_change = largest_difference(&logits, &base_logits);
    let _ = std::fs::remove_dir_all(&directory);
    Ok(Proof {
        files: manifest.files.len() as u32,
        bytes,
        max_logit_change,
        loss_trained_and_reloaded: None,
    })
}

/// Fetches a result; bytes that are not what its manifest says are no proof.
///
/// # Errors
/// A [`Failure`] of reason `NotProven` for damaged bytes, or one of the store.
pub fn fetch_verified(output: &Store, manifest: &Manifest, to: &Path) -> Result<u64, Failure> {
    publish::fetch_verified(output, manifest, to).map_err(|error| match error {
        store::Error::Damaged { .. } => Failure::new(FailureReason::NotProven, error.to_string()),
        error => error.into(),
    })
}

/// Checks that every tensor of a file is finite, and that an adapter is not all zero.
///
/// # Errors
/// A [`Failure`] that names the tensor.
pub fn check_tensors(path: &Path) -> Result<(), Failure> {
    let damaged = |what: String| Failure::new(FailureReason::NotProven, what);
    let tensors = Checkpoint::open_file(path)
        .map_err(|error| Failure::from_chain(FailureReason::NotProven, &error))?;
    let mut largest_update: Option<f64> = None;
    for name in tensors.names() {
        let tensor = tensors.tensor(name).map_err(|error| damaged(error.to_string()))?;
        if !is_finite(&tensor) {
            return Err(damaged(format!(
                "tensor {name:?} of {path:?} has values that are not finite"
            )));
        }
        // One side of a fresh adapter is zero, so its product is: both must have moved.
        if name.contains(".lora_B.") || name.ends_with(".lora_embedding_A") {
            let size = tensor.abs().max().double_value(&[]);
            largest_update = Some(largest_update.unwrap_or(0.0).max(size));
        }
    }
    if largest_update == Some(0.0) {
        return Err(damaged(format!("every adapter in {path:?} is zero: nothing was learned")));
    }
    Ok(())
}

/// Returns what a result is computed on: what the run was, unless it had to be divided because no
/// one device holds the model. Then the processor does, slowly, with weights read in place.
fn device(config: &RunConfig, context: &RunContext<'_>) -> Device {
    match config.parallelism.strategy {
        Strategy::Zero3 => Device::Cpu,
        Strategy::None | Strategy::Ddp | Strategy::Zero1 | Strategy::Zero2 => context.device,
    }
}

/// Loads a published directory as a user of it would.
///
/// # Errors
/// A [`Failure`] if it does not load.
pub fn load(
    kind: ArtifactKind,
    directory: &Path,
    base: &Path,
    dtype: Dtype,
    device: Device,
) -> Result<Model, Failure> {
    match kind {
        ArtifactKind::Adapter => {
            Model::load_with_adapter(base, read_config(base)?, directory, dtype, device)
        }
        ArtifactKind::FullModel | ArtifactKind::MergedModel => {
            load_frozen(directory, dtype, device)
        }
    }
}

/// Loads a model directory for evaluation.
///
/// # Errors
/// A [`Failure`] if it does not load.
pub fn load_frozen(directory: &Path, dtype: Dtype, device: Device) -> Result<Model, Failure> {
    let seed = RngKey::from_seed(0);
    Model::load(directory, read_config(directory)?, Trainable::Frozen, dtype, device, seed)
}

/// Returns the path of an adapter below a published directory; `None` if it has none.
pub fn adapter_directory(kind: ArtifactKind, directory: &Path) -> Option<PathBuf> {
    match kind {
        ArtifactKind::Adapter => Some(directory.to_owned()),
        ArtifactKind::MergedModel => Some(directory.join("adapter")),
        ArtifactKind::FullModel => None,
    }
    .filter(|path| path.join(lora::WEIGHTS_FILE).exists())
}

fn is_finite(tensor: &Tensor) -> bool {
    tensor.isfinite().all().int64_value(&[]) != 0
}

fn largest_difference(left: &Tensor, right: &Tensor) -> f64 {
    (left.to_kind(Kind::Float) - right.to_kind(Kind::Float)).abs().max().double_value(&[])
}

fn not_proven(config: &RunConfig, why: &str) -> Failure {
    Failure::new(
        FailureReason::NotProven,
        format!("the result at {} is not proven: {why}", config.output.uri),
    )
}
