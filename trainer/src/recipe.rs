//! One training run, top to bottom: fetch, resume, train, export, publish, verify.
//!
//! LoRA and full-parameter fine-tuning share this recipe. They differ only in which parameters are
//! trainable and in what is exported.

use std::path::{Path, PathBuf};

use finetune_contract::{
    ArtifactKind, CONTRACT_VERSION, Dtype, FailureReason, InputDigests, Manifest, ModelSource,
    ObjectUri, Outcome, Proof, RunConfig, Split, Stage, artifact::MANIFEST_NAME, decisive_settings,
};
use tch::Device;
use tracing::{info, warn};

use crate::{
    checkpoint::{Checkpoints, TrainState, initial},
    context::RunContext,
    data::{
        chat::rendering::Rendering, dataset::Dataset, row_sources::RowSources,
        sequences::Sequences, tokenizer::Tokenizer,
    },
    export::{self, Export},
    failure::Failure,
    gguf,
    hf::{extension, read_config},
    inputs,
    lora::trainable::Trainable,
    metrics::recorder::Recorder,
    model::{
        DataParallel, Model,
        adapter::{self, AdapterDirectory},
    },
    objective::causal_lm::CausalLm,
    ops,
    optim::AdamW,
    runtime::rng::RngKey,
    store::{
        self, Role, Store,
        publish::{self, OutputContents, Published},
    },
    train::{DataSplit, TrainLoop, TrainOutcome},
    verification::{self, VerificationBatch},
};

/// Executes a run and returns its outcome; `None` on ranks other than 0, which leave export,
/// publication and verification to rank 0.
///
/// # Errors
/// A [`Failure`]; checkpoints that were saved before it remain.
pub fn run(
    config: &RunConfig,
    context: &RunContext<'_>,
    recorder: &mut Recorder,
) -> Result<Option<Outcome>, Failure> {
    let ranks = &context.ranks;
    // If a result of the same inputs is already published, verify that one instead of training.
    inputs::refuse_overlap(config)?;
    let output = open(&config.output.uri, Role::Output, context)?;
    let input_digests = identify_inputs(config, context)?;
    let published = match &input_digests {
        Some(inputs) => find_published(config, &output, inputs)?,
        None => None,
    };
    ranks.barrier("compared")?;
    if ranks.any(published.is_some())? {
        let Some(published) = published else { return Ok(None) };
        let base = fetch_model(&config.model, context)?;
        let proof =
            verification::verify_published(config, context, &output, &published.manifest, &base)?;
        recorder.record_earlier_result(published.manifest.step);
        return Ok(Some(outcome_of_published(config, *published, proof)));
    }

    // Fetch the model; tokenize the rows and check that they are those of the plan.
    let base = fetch_model_once(&config.model, context)?;
    recorder.record_stage(Stage::Loading);
    let rendering = Rendering::resolve(&config.dataset.rendering, context.environment)?;
    let tokenizer = Tokenizer::load(&base, &rendering)?;
    let train = prepare_train(config, context, &tokenizer)?;
    recorder.record_skipped_rows(train.dataset.skipped_rows());
    let validation = prepare_validation(config, context, &tokenizer)?;
    drop(tokenizer);
    let end_of_turn = train.dataset.rendering_stats().unlisted_end_token();

    // Load the model and resume from the newest checkpoint, if there is one.
    let model = load_model(config, &base, context)?;
    ranks.barrier("loaded")?;
    let verification_batch = VerificationBatch::new(&model, &train.dataset);
    let optimizer =
        AdamW::new(model.trained(), config.training.optimizer, config.training.weight_decay);
    let store = open(&config.checkpoints_uri, Role::Output, context)?;
    let checkpoints =
        Checkpoints::new(store, context.work_dir, config, input_digests.clone(), &model);
    let mut training = TrainLoop {
        config,
        model,
        objective: &CausalLm,
        optimizer,
        train,
        validation,
        checkpoints,
        state: TrainState::default(),
    };
    resume(&mut training, recorder, context.device)?;
    if let (Some(uri), 0) = (&config.initial_adapter, training.state.step) {
        load_initial_adapter(uri, &mut training, &base, context)?;
    }
    if let (Some(uri), 0) = (&config.initial_checkpoint, training.state.step) {
        let store = open(uri, Role::Checkpoint, context)?;
        let model = &mut training.model;
        initial::start_from(&store, config.lora.as_ref(), model, context.work_dir)?;
    }

    // Train.
    if training.run(context.stop, recorder)? == TrainOutcome::Interrupted {
        return Ok(Some(Outcome::Interrupted { checkpoint_step: training.state.step }));
    }
    let step = restore_best(&mut training)?;

    // Export the files and publish them.
    recorder.record_stage(Stage::Exporting);
    let trained = verification_batch.evaluate(&training.model);
    ranks.check()?;
    if !ranks.is_first() {
        export::contribute(&training.model)?;
        return Ok(None);
    }
    let directory = context.empty_directory("export")?;
    let chat_template = rendering.chat_template.as_deref();
    let export =
        Export { config, base: &base, training: &training, step, chat_template, end_of_turn };
    let kind = export::write(&export, &directory)?;
    recorder.record_stage(Stage::Publishing);
    let manifest = manifest(config, input_digests, kind, step);
    let published = publish::publish(&output, &directory, manifest, config.output.overwrite)?;
    // Verification downloads the published files; the disk need not hold them twice.
    let _ = std::fs::remove_dir_all(&directory);

    // Download the published files and verify them.
    recorder.record_stage(Stage::Verifying);
    drop(training.model);
    let proof = verification::verify_trained(
        config,
        context,
        &output,
        &published.manifest,
        &base,
        &verification_batch,
        &trained,
    )
    .inspect_err(|failure| unpublish(&output, failure))?;
    if let Err(failure) = training.checkpoints.clear() {
        warn!(%failure, "the result is published, but its checkpoints could not be deleted");
    }
    Ok(Some(Outcome::Succeeded {
        kind,
        uri: config.output.uri.to_string(),
        manifest_sha256: published.manifest_sha256,
        proof,
    }))
}

/// Opens one of the run's URIs.
///
/// # Errors
/// A [`Failure`] if its store cannot be opened.
fn open(uri: &ObjectUri, role: Role, context: &RunContext<'_>) -> Result<Store, Failure> {
    Ok(Store::open(uri, None, role, context.environment)?)
}

fn fetch_model(source: &ModelSource, context: &RunContext<'_>) -> Result<PathBuf, Failure> {
    let revision = source.revision.as_deref();
    let store = Store::open(&source.uri, revision, Role::Model, context.environment)?;
    let directory = gguf::local_model_directory(&store, context.model_cache)?;
    extension::add_tokens(&directory, &source.added_tokens, context.model_cache)
}

/// Fetches the model once for all ranks of a machine: the ranks that share the cache of another wait
/// until that rank has fetched it.
fn fetch_model_once(source: &ModelSource, context: &RunContext<'_>) -> Result<PathBuf, Failure> {
    if context.shares_model_cache {
        context.ranks.barrier("fetched")?;
        return fetch_model(source, context);
    }
    let directory = fetch_model(source, context)?;
    context.ranks.barrier("fetched")?;
    Ok(directory)
}

fn load_model(config: &RunConfig, base: &Path, context: &RunContext<'_>) -> Result<Model, Failure> {
    let model_config = read_config(base)?;
    let attachment = match &config.lora {
        None => Trainable::Full,
        Some(lora) => Trainable::lora(&model_config, lora)
            .map_err(|error| Failure::from_chain(FailureReason::InvalidConfiguration, &error))?,
    };
    let seed = RngKey::from_seed(config.training.seed).fold_in_name("init");
    let division = DataParallel {
        ranks: context.ranks.clone(),
        strategy: config.parallelism.strategy,
        ..DataParallel::single_rank()
    };
    let dtype = config.training.dtype;
    Model::load_data_parallel(base, model_config, attachment, dtype, context.device, seed, division)
}

fn prepare_train(
    config: &RunConfig,
    context: &RunContext<'_>,
    tokenizer: &Tokenizer,
) -> Result<DataSplit, Failure> {
    let rows = open_rows(config, context, Split::Train)?.ok_or_else(|| {
        Failure::new(FailureReason::InvalidConfiguration, "the dataset names no training rows")
    })?;
    let train = prepare(config, context, tokenizer, &rows, "train")?;
    let uris = rows.uris();
    check_unchanged(&uris, &config.expected.train_sha256, train.dataset.sha256())?;
    let (found, planned) = (train.sequences.len() as u64, config.expected.sequences);
    if found != planned {
        let message = format!(
            "{uris} has {found} sequences, but the plan expects {planned}: run the plan again"
        );
        return Err(Failure::new(FailureReason::InvalidDataset, message));
    }
    Ok(train)
}

/// Opens the sources of a split; `None` if the dataset has no such split.
fn open_rows(
    config: &RunConfig,
    context: &RunContext<'_>,
    split: Split,
) -> Result<Option<RowSources>, Failure> {
    RowSources::open(&config.dataset, split, |uri, _| open(uri, Role::Dataset, context))
}

fn prepare_validation(
    config: &RunConfig,
    context: &RunContext<'_>,
    tokenizer: &Tokenizer,
) -> Result<Option<DataSplit>, Failure> {
    let Some(rows) = open_rows(config, context, Split::Validation)? else {
        return Ok(None);
    };
    let validation = prepare(config, context, tokenizer, &rows, "validation")?;
    let expected = config.expected.validation_sha256.as_deref().unwrap_or_default();
    check_unchanged(&rows.uris(), expected, validation.dataset.sha256())?;
    Ok(Some(validation))
}

fn prepare(
    config: &RunConfig,
    context: &RunContext<'_>,
    tokenizer: &Tokenizer,
    rows: &RowSources,
    name: &str,
) -> Result<DataSplit, Failure> {
    let scratch = context.empty_directory(name)?;
    let training = &config.training;
    let dataset = Dataset::prepare(
        rows,
        tokenizer,
        training.context_length,
        config.dataset.on_overflow,
        &scratch,
    )?;
    let sequences = Sequences::new(&dataset, training.packing, training.context_length);
    Ok(DataSplit { dataset, sequences })
}

fn check_unchanged(uris: &str, expected: &str, found: &str) -> Result<(), Failure> {
    if expected == found {
        return Ok(());
    }
    let message = format!(
        "{uris} changed since the preflight (its digest is {found}, the plan expects {expected}): run the plan again"
    );
    Err(Failure::new(FailureReason::InvalidDataset, message))
}

fn resume(
    training: &mut TrainLoop<'_>,
    recorder: &mut Recorder,
    device: Device,
) -> Result<(), Failure> {
    let TrainLoop { checkpoints, model, optimizer, state, config, .. } = training;
    if let Some(restored) = checkpoints.restore_newest(model, optimizer)? {
        info!(step = restored.step, "resuming from a checkpoint");
        *state = restored;
    }
    if config.training.dtype == Dtype::Bf16 && device == Device::Cpu {
        keep_bf16_kernel(state);
    }
    recorder.resume(state);
    Ok(())
}

/// Selects the matrix kernel of the checkpoint, so that the resumed run is bit-for-bit the same.
fn keep_bf16_kernel(state: &mut TrainState) {
    let before = state.bf16_kernel.take();
    if let Some(Err(why)) = before.as_deref().map(ops::choose_bf16_kernel) {
        warn!(
            why,
            "the run resumes with another kernel, so its results will not be bit-for-bit the same"
        );
    }
    state.bf16_kernel = ops::bf16_kernel().map(str::to_owned);
}

/// Initializes the adapter with the weights of a published one.
fn load_initial_adapter(
    uri: &ObjectUri,
    training: &mut TrainLoop<'_>,
    base: &Path,
    context: &RunContext<'_>,
) -> Result<(), Failure> {
    let directory = context.empty_directory("initial-adapter")?;
    adapter::fetch(&open(uri, Role::Adapter, context)?, &directory)?;
    let TrainLoop { config, model, .. } = training;
    let requested = config.lora.as_ref().ok_or_else(|| {
        Failure::new(FailureReason::InvalidConfiguration, "initialAdapter requires lora")
    })?;
    let initial = AdapterDirectory::open(model.config(), &directory)?;
    let invalid = |message| Failure::new(FailureReason::InvalidConfiguration, message);
    let lora = &initial.settings.lora;
    let adapters = &initial.published.adapters;
    let differences =
        adapter::differences(model.config(), requested, lora, adapters).map_err(|error| {
            invalid(format!("the adapter at {uri} does not fit the model: {error}"))
        })?;
    if let Some((field, message)) = differences.into_iter().next() {
        return Err(invalid(format!("spec.loraConfig.{field}: {message}")));
    }
    Ok(model.load_adapter_weights(&initial, base)?)
}

/// Restores the weights of the best evaluation and returns their step; without evaluations, or if the
/// last weights are the best, keeps those.
fn restore_best(training: &mut TrainLoop<'_>) -> Result<u64, Failure> {
    // Synchronizes the ranks: all must see the last checkpoint of rank 0.
    training.model.ranks().any(false)?;
    let state = &training.state;
    match state.best {
        Some(best) if best.step != state.step => {
            info!(
                step = best.step,
                loss = best.loss,
                "publishing the weights of the best evaluation"
            );
            training.checkpoints.restore_best(best.step, &mut training.model)?;
            Ok(best.step)
        }
        _ => Ok(state.step),
    }
}

/// Computes the digests of the inputs before they are read; `None` on ranks other than 0.
fn identify_inputs(
    config: &RunConfig,
    context: &RunContext<'_>,
) -> Result<Option<InputDigests>, Failure> {
    if !context.ranks.is_first() {
        return Ok(None);
    }
    inputs::of_run(config, context.environment).map(Some)
}

/// Returns the published result of the same inputs at the output, if there is one.
fn find_published(
    config: &RunConfig,
    output: &Store,
    inputs: &InputDigests,
) -> Result<Option<Box<Published>>, Failure> {
    // Any kind will do: it follows from the settings, which are compared.
    let planned = manifest(config, Some(inputs.clone()), ArtifactKind::Adapter, 0);
    match publish::inspect(output, &planned, config.attempt > 0)? {
        OutputContents::SameInputs(published) => Ok(Some(published)),
        OutputContents::Vacant => Ok(None),
        OutputContents::OtherInputs(_) if config.output.overwrite => Ok(None),
        OutputContents::OtherInputs(contents) => {
            Err(store::Error::OutputExists { uri: config.output.uri.to_string(), contents }.into())
        }
    }
}

/// Returns the outcome of a run that found its result published, by an earlier attempt of its own or
/// by another run.
fn outcome_of_published(config: &RunConfig, published: Published, proof: Proof) -> Outcome {
    let Published { manifest, manifest_sha256 } = published;
    let (kind, uri) = (manifest.kind, config.output.uri.to_string());
    if manifest.run_id == config.run_id && config.attempt > 0 {
        return Outcome::Succeeded { kind, uri, manifest_sha256, proof };
    }
    Outcome::AlreadyPublished { kind, uri, manifest_sha256, by: manifest.run_id }
}

fn manifest(
    config: &RunConfig,
    inputs: Option<InputDigests>,
    kind: ArtifactKind,
    step: u64,
) -> Manifest {
    Manifest {
        version: CONTRACT_VERSION,
        run_id: config.run_id.clone(),
        kind,
        generator: concat!("finetune-trainer ", env!("CARGO_PKG_VERSION")).to_owned(),
        base_model: config.model.clone(),
        train_sha256: config.expected.train_sha256.clone(),
        inputs,
        settings: Some(decisive_settings(config)),
        step,
        files: Vec::new(),
    }
}

/// Deletes the manifest of a result that failed its verification: without one it is not published.
fn unpublish(output: &Store, failure: &Failure) {
    if failure.reason == FailureReason::NotProven
        && let Err(error) = output.delete(MANIFEST_NAME)
    {
        warn!(%error, "the manifest of a result that failed verification could not be deleted");
    }
}
