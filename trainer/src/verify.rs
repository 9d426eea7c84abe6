//! Reading a published result back, as anybody can at any time.

use std::{
    io::Write,
    path::{Path, PathBuf},
};

use clap::Args;
use finetune_contract::{ArtifactKind, Dtype, FailureReason, Manifest, ObjectUri};
use tch::Tensor;

use crate::{
    failure::Failure,
    import,
    model::{Model, attach::Attachment, weights::Checkpoint},
    proof,
    store::{Environment, Role, Store, publish},
};

/// What to verify.
#[derive(Debug, Args)]
pub struct Arguments {
    /// The `output.uri` of a run.
    uri: String,
    /// The base model of an adapter, if not the one its manifest names.
    #[arg(long)]
    model: Option<String>,
    /// Scratch space; a temporary directory if absent.
    #[arg(long)]
    work_dir: Option<PathBuf>,
}

/// Verifies a result and prints what was found.
///
/// # Errors
/// A [`Failure`] that says what does not hold.
pub fn run(arguments: &Arguments, environment: &Environment) -> Result<(), Failure> {
    let uri = parse(&arguments.uri)?;
    let store = Store::open(&uri, None, Role::Output, environment)?;
    let Some(manifest) = publish::read_manifest(&store)? else {
        let message = format!("nothing complete is published at {uri}: it has no manifest");
        return Err(Failure::new(FailureReason::NotProven, message));
    };
    let work_dir = arguments.work_dir.clone().unwrap_or_else(|| {
        std::env::temp_dir().join(format!("finetune-verify-{}", std::process::id()))
    });
    let result = verify(arguments, environment, &store, &manifest, &work_dir);
    if arguments.work_dir.is_none() {
        let _ = std::fs::remove_dir_all(&work_dir);
    }
    result
}

fn verify(
    arguments: &Arguments,
    environment: &Environment,
    store: &Store,
    manifest: &Manifest,
    work_dir: &Path,
) -> Result<(), Failure> {
    let directory = work_dir.join("result");
    let _ = std::fs::remove_dir_all(&directory);
    std::fs::create_dir_all(&directory)
        .map_err(|error| Failure::from_io(&error, &format!("cannot make {directory:?}")))?;
    line(&format!(
        "result    {} of run {}, step {}",
        noun(manifest.kind),
        manifest.run_id,
        manifest.step
    ));
    line(&format!("written   by {} from {}", manifest.generator, manifest.base_model.uri));

    let bytes = proof::fetch_verified(store, manifest, &directory)?;
    line(&format!(
        "digests   ok: {} files, {:.1} MB, every byte is what the manifest says",
        manifest.files.len(),
        bytes as f64 / 1e6
    ));

    let mut tensors = 0;
    for file in manifest.files.iter().filter(|file| file.path.ends_with(".safetensors")) {
        let path = directory.join(&file.path);
        proof::check_tensors(&path)?;
        tensors += Checkpoint::open_file(&path).map_or(0, |checkpoint| checkpoint.names().count());
    }
    line(&format!("tensors   ok: {tensors}, all finite"));

    let base = match manifest.kind {
        ArtifactKind::Adapter => match base_directory(arguments, environment, manifest, work_dir) {
            Ok(base) => base,
            Err(failure) => {
                line(&format!("loads     not tried: {failure}"));
                line("          (name the base model with --model)");
                return Ok(());
            }
        },
        ArtifactKind::FullModel | ArtifactKind::MergedModel => directory.clone(),
    };
    let model = proof::load(manifest.kind, &directory, &base, Dtype::Fp32)?;
    check_logits(&model)?;
    let what = match model.attachment() {
        Attachment::Lora(lora) => format!("an adapter on {} modules", lora.targets.len()),
        Attachment::Frozen | Attachment::Full => {
            format!("{} parameters", model.config().parameters())
        }
    };
    line(&format!("loads     ok: {what}, finite logits"));
    Ok(())
}

fn base_directory(
    arguments: &Arguments,
    environment: &Environment,
    manifest: &Manifest,
    work_dir: &Path,
) -> Result<PathBuf, Failure> {
    let (uri, revision) = match &arguments.model {
        Some(uri) => (uri, None),
        None => (&manifest.base_model.uri, manifest.base_model.revision.as_deref()),
    };
    let store = Store::open(&parse(uri)?, revision, Role::Model, environment)?;
    import::local_directory(&store, &work_dir.join("models"))
}

fn check_logits(model: &Model) -> Result<(), Failure> {
    let tokens: Vec<u32> = (0..16.min(model.config().vocab_size as u32)).collect();
    let logits: Tensor = model.logits(&tokens);
    if logits.isfinite().all().int64_value(&[]) == 0 {
        return Err(Failure::new(
            FailureReason::NotProven,
            "the result gives logits that are not finite",
        ));
    }
    Ok(())
}

fn parse(uri: &str) -> Result<ObjectUri, Failure> {
    ObjectUri::parse(uri)
        .map_err(|error| Failure::from_chain(FailureReason::InvalidConfiguration, &error))
}

fn noun(kind: ArtifactKind) -> &'static str {
    match kind {
        ArtifactKind::Adapter => "LoRA adapter",
        ArtifactKind::FullModel => "full model",
        ArtifactKind::MergedModel => "merged model with its adapter",
    }
}

fn line(text: &str) {
    let _ = writeln!(std::io::stdout().lock(), "{text}");
}
