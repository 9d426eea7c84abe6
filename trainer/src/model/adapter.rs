//! A published PEFT adapter, put back on its base model.

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
        trainable::{Attachment, LoraAttachment},
        weights::Published,
    },
    model::Model,
    runtime::rng::Counter,
    store::{Store, hash_file, publish},
};

/// Why an adapter directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read.
    #[error("cannot read {path:?}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The settings are damaged or ask for something else than plain LoRA.
    #[error("{path:?}: {reason}")]
    Settings {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The adapter does not fit the base model.
    #[error("{directory:?} cannot be put on the base model")]
    Fit {
        /// The adapter.
        directory: PathBuf,
        /// Why.
        #[source]
        source: crate::lora::weights::Error,
    },
    /// The adapter has an embedding or head of its own.
    #[error(
        "{name:?} of the adapter differs from the base model's: the adapter is of another base model, or its embedding was trained or resized; merge it with PEFT, and start from the result"
    )]
    OtherBase {
        /// The tensor.
        name: String,
    },
    /// The tensors are damaged, missing, or of other shapes.
    #[error("the adapter's weights cannot be used")]
    Weights(#[source] weights::Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::from_chain(FailureReason::InvalidModel, &error)
    }
}

impl Model {
    /// Assembles a base model with a published adapter on it.
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
        let published = Adapter::open(&config, adapter)?;
        let attachment = Attachment::Lora(published.published.attachment.clone());
        let mut model = Self::load(base, config, attachment, dtype, device, Counter::from_seed(0))?;
        model.take_adapter(&published, base)?;
        Ok(model)
    }

    /// Gives the attached adapter the weights of a published one of the same shape.
    ///
    /// # Errors
    /// [`Error`] if a tensor cannot be read, or it is of another base model.
    pub fn take_adapter(&mut self, adapter: &Adapter, base: &Path) -> Result<(), Error> {
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

/// A published adapter on disk, opened beside its base model's config.
#[derive(Debug)]
pub struct Adapter {
    /// Its settings.
    pub settings: AdapterConfig,
    /// What it is on the base model.
    pub published: Published,
    weights: WeightFiles,
}

impl Adapter {
    /// Opens a PEFT LoRA directory and checks it against the base model's config.
    ///
    /// # Errors
    /// [`Error`] if a file is missing or damaged, or the adapter asks for what is not known here.
    pub fn open(config: &ModelConfig, directory: &Path) -> Result<Self, Error> {
        let path = directory.join(CONFIG_FILE);
        let text = std::fs::read_to_string(&path)
            .map_err(|source| Error::Read { path: path.clone(), source })?;
        let settings = config::parse(&text).map_err(|reason| Error::Settings { path, reason })?;
        let weights =
            WeightFiles::open_file(&directory.join(WEIGHTS_FILE)).map_err(Error::Weights)?;
        let published = Published::new(config, &settings, &weights.entries())
            .map_err(|source| Error::Fit { directory: directory.to_owned(), source })?;
        Ok(Self { settings, published, weights })
    }

    /// Checks that what the adapter repeats of its base model is what the base model has.
    fn check_copies(&self, base: &Path) -> Result<(), Error> {
        if self.published.copies.is_empty() {
            return Ok(());
        }
        let base = WeightFiles::open(base).map_err(Error::Weights)?;
        for (copy, name) in &self.published.copies {
            // A head that is the embedding has no tensor of its own.
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

/// Brings the two files of a published adapter into a directory; what has a manifest must be what it
/// says.
///
/// # Errors
/// A [`Failure`] if the store fails or a file is not the one that was published.
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
                "{} is damaged: its manifest says SHA-256 {sha256}, it has {found}",
                store.uri().join(name)
            );
            return Err(Failure::new(FailureReason::InvalidModel, message));
        }
    }
    Ok(())
}

/// Lists where an adapter asked for is not of the shape of one that is there, by field of
/// `loraConfig`, with both values.
///
/// Dropout may differ: it is no part of what was trained.
///
/// # Errors
/// [`crate::lora::Error`] if what is asked for does not fit the model.
pub fn differences(
    config: &ModelConfig,
    asked: &LoraSettings,
    there: &LoraSettings,
    attachment: &LoraAttachment,
) -> Result<Vec<(&'static str, String)>, crate::lora::Error> {
    let Attachment::Lora(wanted) = Attachment::lora(config, asked)? else { return Ok(Vec::new()) };
    let leaves = |paths: &mut dyn Iterator<Item = &String>| {
        let mut leaves: Vec<&str> = paths.map(|path| names::leaf(path)).collect();
        leaves.sort_unstable();
        leaves.dedup();
        format!("[{}]", leaves.join(", "))
    };
    let mut found = Vec::new();
    let mut compare = |field, is_same: bool, asked: String, published: String| {
        if !is_same {
            let message = format!(
                "is {asked}, but what training starts from has {published}: set it to that"
            );
            found.push((field, message));
        }
    };
    compare("r", asked.r == there.r, asked.r.to_string(), there.r.to_string());
    let is_same = wanted.targets.keys().eq(attachment.targets.keys());
    let [ours, theirs] =
        [&wanted, attachment].map(|attachment| leaves(&mut attachment.targets.keys()));
    if ours == theirs && !is_same {
        // The same names, in other blocks.
        let describe = |attachment: &LoraAttachment| {
            let layers: BTreeSet<usize> =
                attachment.targets.keys().filter_map(|path| names::layer(path)).collect();
            let layers: Vec<String> = layers.iter().map(usize::to_string).collect();
            format!("{} modules in the layers {}", attachment.targets.len(), layers.join(", "))
        };
        compare("layersToTransform", false, describe(&wanted), describe(attachment));
    } else {
        compare("targetModules", is_same, ours, theirs);
    }
    let sorted = |paths: &[String]| {
        let mut paths = paths.to_vec();
        paths.sort();
        paths
    };
    let is_same = sorted(&wanted.saved) == sorted(&attachment.saved);
    let [ours, theirs] =
        [&wanted, attachment].map(|attachment| leaves(&mut attachment.saved.iter()));
    compare("modulesToSave", is_same, ours, theirs);
    let same_rank = LoraSettings { r: there.r, ..asked.clone() };
    if (same_rank.scaling() - there.scaling()).abs() > 1e-9 * there.scaling() {
        let both =
            [asked, there].map(|lora| (lora.lora_alpha.to_string(), lora.use_rslora.to_string()));
        let [(asked_alpha, asked_kind), (alpha, kind)] = both;
        compare("useRslora", asked.use_rslora == there.use_rslora, asked_kind, kind);
        let is_same = (asked.lora_alpha - there.lora_alpha).abs() < 1e-9;
        compare("loraAlpha", is_same, asked_alpha, alpha);
    }
    Ok(found)
}
