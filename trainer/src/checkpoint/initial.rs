//! Starting a run from the weights of another run's checkpoint.

use std::path::Path;

use finetune_contract::{
    FailureReason, LoraSettings, ModelSource, ModuleNames, ObjectUri, ProblemReason, TargetModules,
    artifact::CHECKPOINT_MANIFEST_NAME,
};

use crate::{
    architecture::config::ModelConfig,
    checkpoint::{
        MASTER,
        checkpoint_store::{self, CheckpointManifest},
        load_into, open, shard_of,
    },
    failure::Failure,
    lora::trainable::Trainable,
    model::{Model, adapter::differences},
    params::flat::FlatState,
    store::{self, Store},
};

/// The field of the manifest that names the checkpoint.
pub const LOCATION: &str = "spec.initialCheckpoint.uri";

/// A reason why a run cannot start from a checkpoint.
#[derive(Debug)]
pub struct CheckpointFault {
    /// The kind of fault.
    pub reason: ProblemReason,
    /// The field to change.
    pub location: String,
    /// What is wrong and what would be right.
    pub message: String,
}

/// The result of checking a checkpoint.
#[derive(Debug)]
pub struct CheckpointCheck {
    /// Why a run cannot start from it; empty if it can.
    pub faults: Vec<CheckpointFault>,
    /// The base model of an adapter checkpoint, if it is known and not the requested one.
    pub other_base: Option<ObjectUri>,
}

/// Checks that a directory is a checkpoint of the requested model and adapter, without reading
/// weights.
///
/// # Errors
/// [`store::Error`].
pub fn check(
    store: &Store,
    base: &ModelSource,
    lora: Option<&LoraSettings>,
    model: &ModelConfig,
) -> Result<CheckpointCheck, store::Error> {
    let manifest = match read(store)? {
        Ok(manifest) => manifest,
        Err(fault) => return Ok(CheckpointCheck { faults: vec![fault], other_base: None }),
    };
    let mut faults = faults(&manifest, lora, model);
    let sizes = match manifest.files() {
        Ok(files) => checkpoint_store::check_sizes(store, "", &files)?,
        Err(why) => Err(why),
    };
    faults.extend(sizes.err().map(|why| damaged(store, &why)));
    let adapter_base = manifest.model.filter(|_| manifest.lora.is_some());
    let other_base = adapter_base.map(|model| model.uri).filter(|uri| *uri != base.uri);
    Ok(CheckpointCheck { faults, other_base })
}

/// Loads the weights of a checkpoint into a model; each rank loads what it stores.
///
/// # Errors
/// A [`Failure`] if the checkpoint does not fit, is damaged, or cannot be fetched.
pub fn start_from(
    store: &Store,
    lora: Option<&LoraSettings>,
    model: &mut Model,
    scratch: &Path,
) -> Result<(), Failure> {
    let invalid = |message| Failure::new(FailureReason::InvalidConfiguration, message);
    let fault = |fault: CheckpointFault| invalid(format!("{}: {}", fault.location, fault.message));
    let manifest = read(store)?.map_err(fault)?;
    if let Some(first) = faults(&manifest, lora, model.config()).into_iter().next() {
        return Err(fault(first));
    }
    let files = checkpoint_store::fetch_files(store, "", &manifest, shard_of(model), scratch)?;
    let files = files.map_err(|why| fault(damaged(store, &why)))?;
    let files = open(&files, model)?;
    load_into(&files, model, &[(MASTER, FlatState::Fp32(model.trained().master()))])?;
    model.trained_mut().refresh_compute();
    Ok(())
}

fn read(store: &Store) -> Result<Result<CheckpointManifest, CheckpointFault>, store::Error> {
    let fault =
        |reason, message| CheckpointFault { reason, location: LOCATION.to_owned(), message };
    let uri = store.uri();
    if store.size(CHECKPOINT_MANIFEST_NAME)?.is_none() {
        let message = format!(
            "{uri} has no {CHECKPOINT_MANIFEST_NAME}: name one step of a run, such as OUTPUT.checkpoints/RUN/step-00000600; to start from a published adapter use initialAdapter, from a published model use model.uri"
        );
        return Ok(Err(fault(ProblemReason::NotFound, message)));
    }
    Ok(checkpoint_store::read_manifest(store, "")?.map_err(|why| damaged(store, &why)))
}

fn damaged(store: &Store, why: &str) -> CheckpointFault {
    CheckpointFault {
        reason: ProblemReason::InvalidModel,
        location: LOCATION.to_owned(),
        message: format!("{} cannot be used: {why}; name another step", store.uri()),
    }
}

/// Lists why a checkpoint does not fit a model and adapter.
fn faults(
    manifest: &CheckpointManifest,
    lora: Option<&LoraSettings>,
    model: &ModelConfig,
) -> Vec<CheckpointFault> {
    let fault = |location: String, message: String| CheckpointFault {
        reason: ProblemReason::InvalidSpec,
        location,
        message,
    };
    let at_uri = |message: &str| vec![fault(LOCATION.to_owned(), message.to_owned())];
    let trainable = match (lora, &manifest.lora) {
        (None, None) => Some(Trainable::Full),
        (Some(requested), Some(stored)) => {
            let Ok(Trainable::Lora(adapters)) = Trainable::lora(model, stored) else {
                return at_uri("belongs to an adapter that does not fit this model");
            };
            // Errors in the requested settings are already reported.
            let found = differences(model, requested, stored, &adapters).unwrap_or_default();
            if !found.is_empty() {
                let to_fault =
                    |(field, message)| fault(format!("spec.loraConfig.{field}"), message);
                return found.into_iter().map(to_fault).collect();
            }
            Trainable::lora(model, requested).ok()
        }
        (None, Some(stored)) => {
            return at_uri(&format!("belongs to an adapter: set loraConfig to {}", shape(stored)));
        }
        (Some(_), None) => {
            return at_uri("belongs to a full-parameter run: remove loraConfig to continue it");
        }
    };
    let Some(trainable) = trainable else { return Vec::new() };
    let specs = trainable.trained_tensors(model);
    let trained: usize = specs.iter().map(|spec| spec.shape.iter().product::<usize>()).sum();
    match manifest.trained {
        Some(stored) if stored == trained as u64 => Vec::new(),
        Some(stored) => at_uri(&format!(
            "has {stored} trained parameters, but this model and loraConfig have {trained}: it belongs to another model"
        )),
        None => at_uri(
            "was written by an earlier release, which did not record its model: only its own run can resume from it",
        ),
    }
}

/// Formats an adapter's shape as in `spec.loraConfig`.
fn shape(lora: &LoraSettings) -> String {
    let LoraSettings {
        r,
        lora_alpha,
        lora_dropout: _,
        target_modules,
        modules_to_save,
        exclude_modules,
        layers_to_transform,
        use_rslora,
    } = lora;
    let targets = match target_modules {
        TargetModules::AllLinear => "all-linear".to_owned(),
        TargetModules::List(names) => format!("[{}]", names.join(", ")),
        TargetModules::Pattern(pattern) => format!("{pattern:?}"),
    };
    let excluded = match exclude_modules {
        None => String::new(),
        Some(ModuleNames::List(names)) => format!(", excludeModules: [{}]", names.join(", ")),
        Some(ModuleNames::Pattern(pattern)) => format!(", excludeModules: {pattern:?}"),
    };
    let layers = if layers_to_transform.is_empty() {
        String::new()
    } else {
        format!(", layersToTransform: {layers_to_transform:?}")
    };
    let saved = modules_to_save.join(", ");
    format!(
        "{{r: {r}, loraAlpha: {lora_alpha}, targetModules: {targets}{excluded}{layers}, modulesToSave: [{saved}], useRslora: {use_rslora}}}"
    )
}
