//! Downloads a published result and verifies it, independently of the run that made it.

use std::path::{Path, PathBuf};

use clap::Args;
use finetune_contract::{ArtifactKind, Dtype, FailureReason, Manifest, ObjectUri};
use tch::{Device, Tensor};

use crate::{
    failure::Failure,
    gguf,
    hf::{extension, weights::WeightFiles},
    lora::trainable::Trainable,
    model::Model,
    runtime::stdout::print_line,
    store::{Environment, Role, Store, publish},
    verification,
};

/// The result to verify.
#[derive(Debug, Args)]
pub struct Arguments {
    /// The `output.uri` of a run.
    uri: String,
    /// The base model of an adapter, a directory or a URI; by default the one that its manifest names.
    #[arg(long)]
    model: Option<String>,
    /// Scratch space; a temporary directory if absent.
    #[arg(long)]
    work_dir: Option<PathBuf>,
}

/// Verifies a result and prints one line for each check.
///
/// # Errors
/// A [`Failure`] that says which check failed.
pub fn run(arguments: &Arguments, environment: &Environment) -> Result<(), Failure> {
    let uri = parse(&arguments.uri)?;
    let store = Store::open(&uri, None, Role::Output, environment)?;
    let Some(manifest) = publish::read_manifest(&store)? else {
        let message = format!("no complete result is published at {uri}: it has no manifest");
        return Err(Failure::new(FailureReason::NotProven, message));
    };
    let work_dir = arguments.work_dir.clone().unwrap_or_else(|| {
        std::env::temp_dir().join(format!("finetune-verify-{}", std::process::id()))
    });
    let result = verify(arguments, environment, &store, &manifest, &work_dir, &mut print_line);
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
    print: &mut dyn FnMut(&str),
) -> Result<(), Failure> {
    let directory = work_dir.join("result");
    let _ = std::fs::remove_dir_all(&directory);
    std::fs::create_dir_all(&directory)
        .map_err(|error| Failure::from_io(&error, &format!("cannot create {directory:?}")))?;
    print(&format!(
        "result    {} of run {}, step {}",
        kind_name(manifest.kind),
        manifest.run_id,
        manifest.step
    ));
    print(&format!("written   by {} from {}", manifest.generator, manifest.base_model.uri));

    let bytes = verification::fetch_verified(store, manifest, &directory)?;
    print(&format!(
        "digests   ok: {} files, {:.1} MB, all digests match the manifest",
        manifest.files.len(),
        bytes as f64 / 1e6
    ));

    let mut tensors = 0;
    for file in manifest.files.iter().filter(|file| file.path.ends_with(".safetensors")) {
        let path = directory.join(&file.path);
        verification::check_tensors(&path)?;
        tensors += WeightFiles::open_file(&path).map_or(0, |weights| weights.names().count());
    }
    if tensors == 0 {
        let message = format!("the result at {} has no weights", arguments.uri);
        return Err(Failure::new(FailureReason::NotProven, message));
    }
    print(&format!("tensors   ok: {tensors}, all finite"));

    let base = match manifest.kind {
        ArtifactKind::Adapter => match base_directory(arguments, environment, manifest, work_dir) {
            Ok(base) => base,
            // A base model named by the user must exist; that of the manifest may be local to the
            // machine that trained.
            Err(failure) if arguments.model.is_some() => return Err(failure),
            Err(failure) => {
                print(&format!("loads     not tried: {failure}"));
                print("          (name the base model with --model)");
                return Ok(());
            }
        },
        ArtifactKind::FullModel | ArtifactKind::MergedModel => directory.clone(),
    };
    let model = verification::load(manifest.kind, &directory, &base, Dtype::Fp32, Device::Cpu)?;
    check_logits(&model)?;
    let loaded = match model.trainable() {
        Trainable::Lora(lora) => format!("an adapter on {} modules", lora.targets.len()),
        Trainable::Frozen | Trainable::Full => {
            format!("{} parameters", model.config().parameters())
        }
    };
    print(&format!("loads     ok: {loaded}, finite logits"));
    Ok(())
}

fn base_directory(
    arguments: &Arguments,
    environment: &Environment,
    manifest: &Manifest,
    work_dir: &Path,
) -> Result<PathBuf, Failure> {
    let (uri, revision) = match &arguments.model {
        Some(named) if !named.contains("://") => (local_uri(Path::new(named))?, None),
        Some(named) => (parse(named)?, None),
        None => (manifest.base_model.uri.clone(), manifest.base_model.revision.as_deref()),
    };
    let store = Store::open(&uri, revision, Role::Model, environment)?;
    let models = work_dir.join("models");
    let directory = gguf::local_model_directory(&store, &models)?;
    // A local directory is used in place without a check that it exists.
    if !directory.join("config.json").exists() {
        let message = format!("there is no base model at {uri}");
        return Err(Failure::new(FailureReason::InvalidModel, message));
    }
    extension::add_tokens(&directory, &manifest.base_model.added_tokens, &models)
}

fn local_uri(directory: &Path) -> Result<ObjectUri, Failure> {
    let absolute = directory.canonicalize().map_err(|error| {
        let message = format!("the base model {directory:?} cannot be read: {error}");
        Failure::new(FailureReason::InvalidConfiguration, message)
    })?;
    ObjectUri::of_path(&absolute)
        .map_err(|error| Failure::from_chain(FailureReason::InvalidConfiguration, &error))
}

fn check_logits(model: &Model) -> Result<(), Failure> {
    let tokens: Vec<u32> = (0..16.min(model.config().vocab_size as u32)).collect();
    let logits: Tensor = model.logits(&tokens);
    if logits.isfinite().all().int64_value(&[]) == 0 {
        return Err(Failure::new(
            FailureReason::NotProven,
            "the logits of the result are not finite",
        ));
    }
    Ok(())
}

fn parse(uri: &str) -> Result<ObjectUri, Failure> {
    ObjectUri::parse(uri)
        .map_err(|error| Failure::from_chain(FailureReason::InvalidConfiguration, &error))
}

fn kind_name(kind: ArtifactKind) -> &'static str {
    match kind {
        ArtifactKind::Adapter => "LoRA adapter",
        ArtifactKind::FullModel => "full model",
        ArtifactKind::MergedModel => "merged model with its adapter",
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use finetune_contract::{CONTRACT_VERSION, ModelSource, RunId};
    use serde_json::json;
    use tch::Kind;
    use tempfile::TempDir;

    use super::*;
    use crate::hf::safetensors_writer::{self, Declared};

    /// A tiny random model of `tests/golden/gen.py`.
    fn base(family: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/data").join(family)
    }

    /// Publishes a directory that `fill` fills, and verifies it.
    fn check(
        kind: ArtifactKind,
        base_uri: &str,
        model: Option<PathBuf>,
        fill: impl Fn(&Path),
    ) -> String {
        let directory = TempDir::new().unwrap();
        let result = directory.path().join("made");
        fs::create_dir(&result).unwrap();
        fill(&result);
        let uri = format!("file://{}/output", directory.path().display());
        let environment = Environment::from_pairs([]);
        let store = Store::open(&parse(&uri).unwrap(), None, Role::Output, &environment).unwrap();
        let manifest = Manifest {
            version: CONTRACT_VERSION,
            run_id: RunId("a-run".to_owned()),
            kind,
            generator: "a test".to_owned(),
            base_model: ModelSource::of(base_uri.parse().unwrap()),
            train_sha256: "0".repeat(64),
            inputs: None,
            settings: None,
            step: 3,
            files: Vec::new(),
        };
        let manifest = publish::publish(&store, &result, manifest, false).unwrap().manifest;
        let arguments = Arguments {
            uri,
            model: model.map(|path| path.to_str().unwrap().to_owned()),
            work_dir: None,
        };
        let mut lines = Vec::new();
        let work_dir = directory.path().join("work");
        let verified =
            verify(&arguments, &environment, &store, &manifest, &work_dir, &mut |line| {
                lines.push(line.to_owned());
            });
        let last = match verified {
            Ok(()) => "verified".to_owned(),
            Err(failure) => format!("{:?}: {failure}", failure.reason),
        };
        lines.push(last);
        let data = base("").display().to_string();
        lines
            .join("\n")
            .replace(directory.path().to_str().unwrap(), "DIR")
            .replace(data.trim_end_matches('/'), "DATA")
    }

    fn copy_model(to: &Path) {
        for file in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
        {
            fs::copy(base("llama").join(file), to.join(file)).unwrap();
        }
    }

    /// Writes an adapter on the queries of both blocks; every element of its `lora_B` is `b`.
    fn adapter(to: &Path, b: f64) {
        let settings = json!({
            "peft_type": "LORA", "r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "bias": "none",
            "target_modules": ["q_proj"], "modules_to_save": null, "task_type": "CAUSAL_LM",
        });
        fs::write(to.join("adapter_config.json"), settings.to_string()).unwrap();
        let declared: Vec<Declared> = [("lora_A", vec![2, 32]), ("lora_B", vec![32, 2])]
            .into_iter()
            .flat_map(|(side, shape)| {
                (0..2).map(move |layer| Declared {
                    name: format!(
                        "base_model.model.model.layers.{layer}.self_attn.q_proj.{side}.weight"
                    ),
                    kind: Kind::Float,
                    shape: shape.clone(),
                })
            })
            .collect();
        safetensors_writer::write::<std::io::Error>(
            &to.join("adapter_model.safetensors"),
            &declared,
            |tensor| {
                let value = if tensor.name.contains("lora_B") { b } else { 0.5 };
                Ok(Tensor::full(tensor.shape.as_slice(), value, (Kind::Float, Device::Cpu)))
            },
        )
        .unwrap();
    }

    #[test]
    fn a_complete_result_is_verified_up_to_its_logits() {
        let model = check(ArtifactKind::FullModel, "hf://someone/base", None, copy_model);
        insta::assert_snapshot!(model, @"result    full model of run a-run, step 3
written   by a test from hf://someone/base
digests   ok: 4 files, 0.1 MB, all digests match the manifest
tensors   ok: 20, all finite
loads     ok: 19616 parameters, finite logits
verified");
        let uri = format!("file://{}", base("llama").display());
        let adapted = check(ArtifactKind::Adapter, &uri, None, |to| adapter(to, 0.5));
        insta::assert_snapshot!(adapted, @"result    LoRA adapter of run a-run, step 3
written   by a test from file://DATA/llama
digests   ok: 2 files, 0.0 MB, all digests match the manifest
tensors   ok: 4, all finite
loads     ok: an adapter on 2 modules, finite logits
verified");
    }

    #[test]
    fn an_unreachable_base_model_ends_verification_early() {
        let check =
            |model| check(ArtifactKind::Adapter, "file:///gone", model, |to| adapter(to, 0.5));
        insta::assert_snapshot!(check(None), @"result    LoRA adapter of run a-run, step 3
written   by a test from file:///gone
digests   ok: 2 files, 0.0 MB, all digests match the manifest
tensors   ok: 4, all finite
loads     not tried: there is no base model at file:///gone
          (name the base model with --model)
verified");
        // A base model named by the user must exist and fit.
        assert!(check(Some(base("llama"))).ends_with("finite logits\nverified"));
        insta::assert_snapshot!(check(Some(base("no-such"))).lines().last().unwrap(), @r#"InvalidConfiguration: the base model "DATA/no-such" cannot be read: No such file or directory (os error 2)"#);
        insta::assert_snapshot!(check(Some(base("llama-biases"))).lines().last().unwrap(), @r#"InvalidModel: "DIR/work/result" does not fit the base model: base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight has shape [32, 2], must be [48, 2]: the adapter belongs to another model"#);
    }

    #[test]
    fn names_what_is_wrong_with_a_result() {
        let last = |kind, fill: &dyn Fn(&Path)| {
            let uri = format!("file://{}", base("llama").display());
            check(kind, &uri, None, fill).lines().last().unwrap().to_owned()
        };
        insta::assert_snapshot!(last(ArtifactKind::Adapter, &|to| adapter(to, 0.0)), @r#"NotProven: every adapter in "DIR/work/result/adapter_model.safetensors" is zero: the training had no effect"#);
        insta::assert_snapshot!(last(ArtifactKind::Adapter, &|to| adapter(to, f64::NAN)), @r#"NotProven: tensor "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight" of "DIR/work/result/adapter_model.safetensors" has values that are not finite"#);
        insta::assert_snapshot!(last(ArtifactKind::FullModel, &|to| {
            copy_model(to);
            fs::remove_file(to.join("model.safetensors")).unwrap();
        }), @"NotProven: the result at file://DIR/output has no weights");
        insta::assert_snapshot!(last(ArtifactKind::FullModel, &|to| {
            copy_model(to);
            let path = to.join("model.safetensors");
            let bytes = fs::read(&path).unwrap();
            fs::write(&path, &bytes[..bytes.len() - 4]).unwrap();
        }), @r#"NotProven: "DIR/work/result/model.safetensors" is damaged: the file has 80484 bytes but needs 80488: it is truncated"#);
        insta::assert_snapshot!(last(ArtifactKind::FullModel, &|to| {
            copy_model(to);
            let config = fs::read_to_string(to.join("config.json")).unwrap();
            let narrow = config.replace("\"intermediate_size\": 48", "\"intermediate_size\": 40");
            assert_ne!(config, narrow);
            fs::write(to.join("config.json"), narrow).unwrap();
        }), @r#"InvalidModel: tensor "model.layers.0.mlp.gate_proj.weight" has shape [48, 32], but the config requires [40, 32]"#);
    }
}
