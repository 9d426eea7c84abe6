//! The inputs of a run: computes their digests, and refuses outputs that would overwrite them.

use std::path::{Path, PathBuf};

use finetune_contract::{
    ExpectedData, FailureReason, InputDigests, ModelSource, ObjectUri, PreflightConfig,
    RenderingSettings, RunConfig, Scheme,
    artifact::CHECKPOINT_MANIFEST_NAME,
    overlap::{input_uris, overlaps_with_inputs},
    process::PVC_ROOT,
};

use crate::{
    data::chat::template_source,
    failure::Failure,
    lora,
    store::{Environment, Role, Store, identity, is_model_file, sha256_hex},
};

/// The inputs of a run other than its rows.
#[derive(Debug, Clone, Copy)]
pub struct Sources<'a> {
    model: &'a ModelSource,
    initial_adapter: Option<&'a ObjectUri>,
    initial_checkpoint: Option<&'a ObjectUri>,
    rendering: &'a RenderingSettings,
}

impl<'a> From<&'a RunConfig> for Sources<'a> {
    fn from(config: &'a RunConfig) -> Self {
        Self {
            model: &config.model,
            initial_adapter: config.initial_adapter.as_ref(),
            initial_checkpoint: config.initial_checkpoint.as_ref(),
            rendering: &config.dataset.rendering,
        }
    }
}

impl<'a> From<&'a PreflightConfig> for Sources<'a> {
    fn from(config: &'a PreflightConfig) -> Self {
        Self {
            model: &config.model,
            initial_adapter: config.initial_adapter.as_ref(),
            initial_checkpoint: config.initial_checkpoint.as_ref(),
            rendering: &config.dataset.rendering,
        }
    }
}

/// Returns the digests of everything a run reads. Those of the rows are known from reading them.
///
/// # Errors
/// A [`Failure`] if a store cannot be read.
pub fn digests(
    sources: Sources<'_>,
    train_sha256: &str,
    validation_sha256: Option<&str>,
    environment: &Environment,
) -> Result<InputDigests, Failure> {
    let Sources { model, initial_adapter, initial_checkpoint, rendering } = sources;
    let open = |uri, revision, role| Store::open(uri, revision, role, environment);
    let store = open(&model.uri, model.revision.as_deref(), Role::Model)?;
    let model_sha256 = identity(&store, is_model_file)?;
    let initial_sha256 = match (initial_adapter, initial_checkpoint) {
        (Some(uri), _) => {
            let is_adapter = |path: &str| [lora::CONFIG_FILE, lora::WEIGHTS_FILE].contains(&path);
            Some(identity(&open(uri, None, Role::Adapter)?, is_adapter)?)
        }
        (None, Some(uri)) => {
            // The manifest contains the digests of the other files.
            let is_manifest = |path: &str| path == CHECKPOINT_MANIFEST_NAME;
            Some(identity(&open(uri, None, Role::Checkpoint)?, is_manifest)?)
        }
        (None, None) => None,
    };
    let template = rendering.template_uri().map(|uri| template_source::resolve(uri, environment));
    let chat_template_sha256 = template.transpose()?.map(|text| sha256_hex(text.as_bytes()));
    Ok(InputDigests {
        train_sha256: train_sha256.to_owned(),
        validation_sha256: validation_sha256.map(str::to_owned),
        model_sha256,
        initial_sha256,
        chat_template_sha256,
    })
}

/// Returns the digests of everything a planned run reads.
///
/// # Errors
/// As [`digests`].
pub fn of_run(config: &RunConfig, environment: &Environment) -> Result<InputDigests, Failure> {
    let ExpectedData { train_sha256, validation_sha256, .. } = &config.expected;
    digests(config.into(), train_sha256, validation_sha256.as_deref(), environment)
}

/// Describes how the output of a run overlaps with its inputs, after resolving symbolic links.
pub fn overlaps(config: &PreflightConfig) -> Vec<String> {
    let Sources { model, initial_adapter, initial_checkpoint, .. } = config.into();
    let inputs = input_uris(model, &config.dataset, initial_adapter, initial_checkpoint);
    overlaps_with_inputs(&config.output.uri, inputs, resolve_links)
}

/// Refuses a run whose result or checkpoints would overwrite its inputs.
///
/// # Errors
/// A [`Failure`] that names the input.
pub fn refuse_overlap(config: &RunConfig) -> Result<(), Failure> {
    let Sources { model, initial_adapter, initial_checkpoint, .. } = config.into();
    let inputs = input_uris(model, &config.dataset, initial_adapter, initial_checkpoint);
    for written in [&config.output.uri, &config.checkpoints_uri] {
        let messages = overlaps_with_inputs(written, inputs.iter().cloned(), resolve_links);
        if let Some(message) = messages.into_iter().next() {
            return Err(Failure::new(FailureReason::InvalidConfiguration, message));
        }
    }
    Ok(())
}

/// Resolves the symbolic links in the path of a directory or volume, as far as the path exists.
fn resolve_links(uri: ObjectUri) -> ObjectUri {
    let path = match uri.scheme {
        Scheme::File => Path::new("/").join(&uri.path),
        Scheme::Pvc => Path::new(PVC_ROOT).join(&uri.authority).join(&uri.path),
        Scheme::Hf | Scheme::S3 | Scheme::Gs | Scheme::Az => return uri,
    };
    let path = real_path(&path, MAX_LINKS).to_string_lossy().trim_start_matches('/').to_owned();
    // Volumes become directories, so that an overlap between the two is found as well.
    ObjectUri { scheme: Scheme::File, authority: String::new(), path, ..uri }
}

/// The most dangling links that are followed one after the other; the limit of the kernel.
const MAX_LINKS: u32 = 40;

/// Resolves the longest existing prefix of a path and appends the rest.
fn real_path(path: &Path, links: u32) -> PathBuf {
    let mut rest = Vec::new();
    let mut existing = path;
    loop {
        if let Ok(real) = existing.canonicalize() {
            return rest.iter().rev().fold(real, |path, name| path.join(name));
        }
        let (Some(parent), Some(name)) = (existing.parent(), existing.file_name()) else {
            return path.to_owned();
        };
        // A dangling link still determines where a result would be written.
        if links > 0
            && let Ok(target) = existing.read_link()
        {
            let target = real_path(&parent.join(target), links - 1);
            return rest.iter().rev().fold(target, |path, name| path.join(name));
        }
        rest.push(name);
        existing = parent;
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use finetune_contract::{overlap::overlaps_with_inputs, testing::file_uri};

    use super::resolve_links;

    /// Describes how an output overlaps with the model at `base`, in a directory with links.
    fn check(output: &str) -> String {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::create_dir_all(at("base/sub")).unwrap();
        fs::create_dir_all(at("other")).unwrap();
        symlink(at("base"), at("link")).unwrap();
        symlink("base/sub", at("relative")).unwrap();
        symlink(at("base/not-yet"), at("dangling")).unwrap();
        symlink(directory.path(), at("other/up")).unwrap();
        let inputs = [("spec.model.uri", file_uri(&at("base")))];
        let messages = overlaps_with_inputs(&file_uri(&at(output)), inputs, resolve_links);
        let text = messages.concat();
        text.split(" spec.model.uri")
            .next()
            .unwrap()
            .split("\" ")
            .nth(1)
            .unwrap_or("apart")
            .to_owned()
    }

    #[test]
    fn links_of_an_output_are_resolved_before_it_is_compared() {
        assert_eq!(check("base"), "is the same place as");
        assert_eq!(check("link"), "is the same place as");
        assert_eq!(check("link/out"), "lies inside");
        assert_eq!(check("relative/out"), "lies inside");
        assert_eq!(check("dangling"), "lies inside");
        assert_eq!(check("other/up/base"), "is the same place as");
        assert_eq!(check("other/up"), "holds");
        assert_eq!(check("other/out"), "apart");
        assert_eq!(check("base-tuned"), "apart");
    }
}
