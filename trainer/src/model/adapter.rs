//! Loads a published PEFT adapter onto its base model.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use finetune_contract::{Dtype, FailureReason, LoraSettings};
use tch::Device;

use crate::{
    architecture::{config::ModelConfig, names},
    failure::Failure,
    hf::weights::{self, WeightFiles},
    lora::{
        CONFIG_FILE, PREFIX, WEIGHTS_FILE,
        config::{self, AdapterConfig},
        trainable::{LoraAdapters, Trainable},
        weights::PublishedAdapter,
    },
    model::Model,
    runtime::rng::RngKey,
    store::{Store, hash_file, publish},
};

/// Why an adapter directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read.
    #[error("cannot read {path:?}")]
    Read {
        /// The file that cannot be read.
        path: PathBuf,
        /// What the system reported.
        #[source]
        source: std::io::Error,
    },
    /// The settings are invalid, or ask for something other than plain LoRA.
    #[error("{path:?}: {reason}")]
    Settings {
        /// The settings file.
        path: PathBuf,
        /// Why the settings are refused.
        reason: String,
    },
    /// The adapter does not fit the base model.
    #[error("{directory:?} does not fit the base model")]
    Fit {
        /// The adapter's directory.
        directory: PathBuf,
        /// What does not fit.
        #[source]
        source: crate::lora::weights::Error,
    },
    /// A tensor that the adapter copies from its base model has other values.
    #[error(
        "{name:?} of the adapter differs from the base model's: the adapter belongs to another base model, or its embedding was trained or resized; merge it with PEFT, and start from the merged model"
    )]
    OtherBase {
        /// The tensor's name in the adapter's file.
        name: String,
    },
    /// The tensors are damaged, missing, or have the wrong shape.
    #[error("the adapter's weights cannot be used")]
    Weights(#[source] weights::Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::from_chain(FailureReason::InvalidModel, &error)
    }
}

impl Model {
    /// Loads a base model with a published adapter on it.
    ///
    /// # Errors
    /// A [`Failure`] if either directory is damaged or they do not fit each other.
    pub fn load_with_adapter(
        base: &Path,
        config: ModelConfig,
        adapter: &Path,
        dtype: Dtype,
        device: Device,
    ) -> Result<Self, Failure> {
        let adapter = AdapterDirectory::open(&config, adapter)?;
        let trainable = Trainable::Lora(adapter.published.adapters.clone());
        let mut model = Self::load(base, config, trainable, dtype, device, RngKey::from_seed(0))?;
        model.load_adapter_weights(&adapter, base)?;
        Ok(model)
    }

    /// Loads the weights of a published adapter of the same shape.
    ///
    /// # Errors
    /// [`Error`] if a tensor cannot be read, or the adapter belongs to another base model.
    pub fn load_adapter_weights(
        &mut self,
        adapter: &AdapterDirectory,
        base: &Path,
    ) -> Result<(), Error> {
        adapter.check_copies(base)?;
        for name in self.trained().names() {
            let mut master =
                self.trained().master_of(name).expect("the name is from the same list");
            let shape: Vec<usize> = master.size().iter().map(|&size| size as usize).collect();
            let stored = adapter
                .weights
                .tensor_of(&format!("{PREFIX}{name}"), &shape)
                .map_err(Error::Weights)?;
            master.copy_(&stored);
        }
        self.trained_mut().refresh_compute();
        Ok(())
    }
}

/// A directory with a published adapter, checked against the config of its base model.
#[derive(Debug)]
pub struct AdapterDirectory {
    /// The parsed `adapter_config.json`.
    pub settings: AdapterConfig,
    /// Its adapters on the base model.
    pub published: PublishedAdapter,
    weights: WeightFiles,
}

impl AdapterDirectory {
    /// Opens a PEFT LoRA directory and checks it against the base model's config.
    ///
    /// # Errors
    /// [`Error`] if a file is missing or damaged, or the settings are not supported.
    pub fn open(config: &ModelConfig, directory: &Path) -> Result<Self, Error> {
        let path = directory.join(CONFIG_FILE);
        let text = std::fs::read_to_string(&path)
            .map_err(|source| Error::Read { path: path.clone(), source })?;
        let settings = config::parse(&text).map_err(|reason| Error::Settings { path, reason })?;
        let weights =
            WeightFiles::open_file(&directory.join(WEIGHTS_FILE)).map_err(Error::Weights)?;
        let published = PublishedAdapter::new(config, &settings, &weights.entries())
            .map_err(|source| Error::Fit { directory: directory.to_owned(), source })?;
        Ok(Self { settings, published, weights })
    }

    /// Checks that the adapter's copies of base tensors equal the base model's.
    fn check_copies(&self, base: &Path) -> Result<(), Error> {
        if self.published.copies.is_empty() {
            return Ok(());
        }
        let base = WeightFiles::open(base).map_err(Error::Weights)?;
        for (copy, name) in &self.published.copies {
            // A tied head has no tensor of its own.
            let name = if base.contains(name) { name.as_str() } else { names::EMBEDDING_WEIGHT };
            let [copied, stored] = [self.weights.tensor(copy), base.tensor(name)];
            let copied = copied.map_err(Error::Weights)?;
            let stored = stored.map_err(Error::Weights)?.to_kind(copied.kind());
            if !copied.equal(&stored) {
                return Err(Error::OtherBase { name: copy.clone() });
            }
        }
        Ok(())
    }
}

/// Fetches the two files of a published adapter into a directory, and checks them against the
/// manifest if there is one.
///
/// # Errors
/// A [`Failure`] if the store fails or a file's digest is not the published one.
pub fn fetch(store: &Store, to: &Path) -> Result<(), Failure> {
    let manifest = publish::read_manifest(store)?;
    for name in [CONFIG_FILE, WEIGHTS_FILE] {
        let path = to.join(name);
        store.fetch(name, &path)?;
        let published = manifest.iter().flat_map(|manifest| &manifest.files);
        let published = published.filter(|file| file.path == name).map(|file| &file.sha256);
        let found = hash_file(&path)?.1;
        if let Some(sha256) = published.into_iter().find(|sha256| **sha256 != found) {
            let message = format!(
                "{} is damaged: its SHA-256 is {found}, but the manifest has {sha256}",
                store.uri().join(name)
            );
            return Err(Failure::new(FailureReason::InvalidModel, message));
        }
    }
    Ok(())
}

/// Lists the fields of `loraConfig` in which the requested settings differ from the stored
/// adapter's, with both values.
///
/// Dropout may differ: the weights do not depend on it.
///
/// # Errors
/// [`crate::lora::Error`] if the requested settings do not fit the model.
pub fn differences(
    config: &ModelConfig,
    requested: &LoraSettings,
    stored: &LoraSettings,
    adapters: &LoraAdapters,
) -> Result<Vec<(&'static str, String)>, crate::lora::Error> {
    let Trainable::Lora(wanted) = Trainable::lora(config, requested)? else {
        return Ok(Vec::new());
    };
    let leaves = |paths: &mut dyn Iterator<Item = &String>| {
        let mut leaves: Vec<&str> = paths.map(|path| names::leaf(path)).collect();
        leaves.sort_unstable();
        leaves.dedup();
        format!("[{}]", leaves.join(", "))
    };
    let mut found = Vec::new();
    let compare = |field, is_same: bool, requested: String, stored: String| {
        (!is_same).then(|| {
            let message = format!(
                "is {requested}, but the initial weights have {stored}: set it to {stored}"
            );
            (field, message)
        })
    };
    found.extend(compare(
        "r",
        requested.r == stored.r,
        requested.r.to_string(),
        stored.r.to_string(),
    ));
    let is_same = wanted.targets.keys().eq(adapters.targets.keys());
    let [ours, theirs] = [&wanted, adapters].map(|adapters| leaves(&mut adapters.targets.keys()));
    if ours == theirs && !is_same {
        // The same leaf names, in other blocks.
        let describe = |adapters: &LoraAdapters| {
            let layers: BTreeSet<usize> =
                adapters.targets.keys().filter_map(|path| names::layer(path)).collect();
            let layers: Vec<String> = layers.iter().map(usize::to_string).collect();
            format!("{} modules of the layers {}", adapters.targets.len(), layers.join(", "))
        };
        let [requested, stored] = [&wanted, adapters].map(describe);
        let message =
            format!("selects {requested}, but the initial weights have {stored}: select the same");
        found.push(("layersToTransform", message));
    } else {
        found.extend(compare("targetModules", is_same, ours, theirs));
    }
    let sorted = |paths: &[String]| {
        let mut paths = paths.to_vec();
        paths.sort();
        paths
    };
    let is_same = sorted(&wanted.modules_to_save) == sorted(&adapters.modules_to_save);
    let [ours, theirs] =
        [&wanted, adapters].map(|adapters| leaves(&mut adapters.modules_to_save.iter()));
    found.extend(compare("modulesToSave", is_same, ours, theirs));
    let same_rank = LoraSettings { r: stored.r, ..requested.clone() };
    if (same_rank.scaling() - stored.scaling()).abs() > 1e-9 * stored.scaling() {
        let both = [requested, stored]
            .map(|lora| (lora.lora_alpha.to_string(), lora.use_rslora.to_string()));
        let [(requested_alpha, requested_rslora), (alpha, rslora)] = both;
        found.extend(compare(
            "useRslora",
            requested.use_rslora == stored.use_rslora,
            requested_rslora,
            rslora,
        ));
        let is_same = (requested.lora_alpha - stored.lora_alpha).abs() < 1e-9;
        found.extend(compare("loraAlpha", is_same, requested_alpha, alpha));
    }
    Ok(found)
}
