//! A step of another run, whose weights a run starts from.

use std::path::Path;

use finetune_contract::{
    FailureReason, LoraSettings, ModelSource, ModuleNames, ProblemReason, TargetModules,
    artifact::CHECKPOINT_MANIFEST_NAME,
};

use crate::{
    architecture::config::ModelConfig,
    checkpoint::{
        MASTER,
        archive::{self, CheckpointManifest},
        fill, open, share,
    },
    failure::Failure,
    lora::trainable::Attachment,
    model::{Model, adapter::differences},
    params::flat::Flat,
    store::{self, Store},
};

/// The manifest's field that names it.
pub const LOCATION: &str = "spec.initialCheckpoint.uri";

/// Why a run cannot start from a checkpoint.
#[derive(Debug)]
pub struct Unfit {
    /// The kind of the fault.
    pub reason: ProblemReason,
    /// The field to change.
    pub location: String,
    /// What is wrong and what would be right.
    pub message: String,
}

/// What was found of a checkpoint.
#[derive(Debug)]
pub struct Checked {
    /// Why a run cannot start from it; none if it can.
    pub faults: Vec<Unfit>,
    /// The base model of an adapter's, if it is known and not the one asked for.
    pub other_base: Option<String>,
}

/// Checks that a directory is a checkpoint of what is to be trained; reads no weights.
///
/// # Errors
/// [`store::Error`].
pub fn check(
    store: &Store,
    base: &ModelSource,
    lora: Option<&LoraSettings>,
    model: &ModelConfig,
) -> Result<Checked, store::Error> {
    let manifest = match read(store)? {
        Ok(manifest) => manifest,
        Err(unfit) => return Ok(Checked { faults: vec![unfit], other_base: None }),
    };
    let mut faults = faults(&manifest, lora, model);
    let sizes = match manifest.files() {
        Ok(files) => archive::check_sizes(store, "", &files)?,
        Err(why) => Err(why),
    };
    faults.extend(sizes.err().map(|why| damaged(store, &why)));
    let there = manifest.model.filter(|_| manifest.lora.is_some());
    let other_base = there.map(|there| there.uri).filter(|uri| *uri != base.uri);
    Ok(Checked { faults, other_base })
}

/// Gives a model the weights of a checkpoint, on every rank what it has of them.
///
/// # Errors
/// A [`Failure`] if it is not one of what is trained, is damaged, or cannot be fetched.
pub fn start_from(
    store: &Store,
    lora: Option<&LoraSettings>,
    model: &mut Model,
    scratch: &Path,
) -> Result<(), Failure> {
    let invalid = |message| Failure::new(FailureReason::InvalidConfiguration, message);
    let unfit = |unfit: Unfit| invalid(format!("{}: {}", unfit.location, unfit.message));
    let manifest = read(store)?.map_err(unfit)?;
    if let Some(fault) = faults(&manifest, lora, model.config()).into_iter().next() {
        return Err(unfit(fault));
    }
    let files = archive::fetch_files(store, "", &manifest, share(model), scratch)?;
    let files = files.map_err(|why| unfit(damaged(store, &why)))?;
    let files = open(&files, model)?;
    fill(&files, model, &[(MASTER, Flat::Floats(model.trained().master()))])?;
    model.trained_mut().refresh_compute();
    Ok(())
}

fn read(store: &Store) -> Result<Result<CheckpointManifest, Unfit>, store::Error> {
    let unfit = |reason, message| Unfit { reason, location: LOCATION.to_owned(), message };
    let uri = store.uri();
    if store.size(CHECKPOINT_MANIFEST_NAME)?.is_none() {
        let message = format!(
            "{uri} has no {CHECKPOINT_MANIFEST_NAME}: name one step of a run, as OUTPUT.checkpoints/RUN/step-00000600; a published adapter is gone on from with initialAdapter, a published model by naming it as model.uri"
        );
        return Ok(Err(unfit(ProblemReason::NotFound, message)));
    }
    Ok(archive::read_manifest(store, "")?.map_err(|why| damaged(store, &why)))
}

fn damaged(store: &Store, why: &str) -> Unfit {
    Unfit {
        reason: ProblemReason::InvalidModel,
        location: LOCATION.to_owned(),
        message: format!("{} cannot be used: {why}; name another step", store.uri()),
    }
}

/// Lists why weights cannot be those of a model and adapter.
fn faults(
    manifest: &CheckpointManifest,
    lora: Option<&LoraSettings>,
    model: &ModelConfig,
) -> Vec<Unfit> {
    let unfit = |location: String, message: String| Unfit {
        reason: ProblemReason::InvalidSpec,
        location,
        message,
    };
    let at_uri = |message: &str| vec![unfit(LOCATION.to_owned(), message.to_owned())];
    let attachment = match (lora, &manifest.lora) {
        (None, None) => Some(Attachment::Full),
        (Some(asked), Some(there)) => {
            let Ok(Attachment::Lora(attachment)) = Attachment::lora(model, there) else {
                return at_uri("is of an adapter that does not fit this model");
            };
            // What is wrong with the settings asked for is already said.
            let found = differences(model, asked, there, &attachment).unwrap_or_default();
            if !found.is_empty() {
                let fault = |(field, message)| unfit(format!("spec.loraConfig.{field}"), message);
                return found.into_iter().map(fault).collect();
            }
            Attachment::lora(model, asked).ok()
        }
        (None, Some(there)) => {
            return at_uri(&format!("is of an adapter: set loraConfig to {}", shape(there)));
        }
        (Some(_), None) => {
            return at_uri("is of a model trained whole: remove loraConfig to go on with it");
        }
    };
    let Some(attachment) = attachment else { return Vec::new() };
    let specs = attachment.trained(model);
    let trained: usize = specs.iter().map(|spec| spec.shape.iter().product::<usize>()).sum();
    match manifest.trained {
        Some(there) if there == trained as u64 => Vec::new(),
        Some(there) => at_uri(&format!(
            "has {there} trained parameters, but this model and loraConfig have {trained}: it is of another model"
        )),
        None => at_uri(
            "is of an earlier release, which did not write what it is of: only its own run can go on from it",
        ),
    }
}

/// Writes an adapter's shape as a manifest has it.
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
