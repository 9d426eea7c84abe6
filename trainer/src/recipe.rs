//! The story of a run: bring everything here, take up the thread, train, write, publish, prove.
//!
//! LoRA and full-parameter fine-tuning share it. They differ in what is attached to the model and
//! in what is exported, and nowhere between.

use std::path::{Path, PathBuf};

use finetune_contract::{
    ArtifactKind, CONTRACT_VERSION, Dtype, FailureReason, InputDigests, Manifest, ModelSource,
    ObjectUri, Outcome, Proof, RunConfig, Stage, artifact::MANIFEST_NAME, decisive_settings,
};
use tch::Device;
use tracing::{info, warn};

use crate::{
    checkpoint::{Checkpoints, TrainState, initial},
    context::RunContext,
    data::{Dataset, Rendering, RowSources, Sequences, Tokenizer},
    export::{self, Export},
    failure::Failure,
    gguf,
    hf::{extension, read_config},
    inputs,
    lora::trainable::Trainable,
    metrics::recorder::Teller,
    model::{
        DataParallel, Model,
        adapter::{self, AdapterDirectory},
    },
    ops,
    optim::AdamW,
    runtime::rng::RngKey,
    store::{
        self, Role, Store,
        publish::{self, Found, Published},
    },
    train::{DataSplit, TrainLoop, TrainOutcome},
    verification::{self, Probe},
};

/// Carries out a run; `None` on a rank that has done its share and leaves the rest to rank 0.
///
/// # Errors
/// A [`Failure`] with its reason; what was saved before stays.
pub fn run(
    config: &RunConfig,
    context: &RunContext<'_>,
    teller: &mut Teller<'_>,
) -> Result<Option<Outcome>, Failure> {
    let ranks = &context.ranks;
    // A result of the same inputs may be there already, and then there is nothing to train.
    inputs::refuse_overlap(config)?;
    let output = open(&config.output.uri, Role::Output, context)?;
    let made_from = identify_inputs(config, context)?;
    let found = match &made_from {
        Some(inputs) => find_published(config, &output, inputs)?,
        None => None,
    };
    ranks.barrier("compared")?;
    if ranks.any(found.is_some())? {
        let Some(published) = found else { return Ok(None) };
        let base = fetch_model(&config.model, context)?;
        let proof =
            verification::of_published(config, context, &output, &published.manifest, &base)?;
        teller.done_before(published.manifest.step);
        return Ok(Some(published_before(config, *published, proof)));
    }
    let base = fetch_model_for_all(&config.model, context)?;

    // Rows become tokens, and must be the rows that were planned for.
    teller.stage(Stage::Loading);
    let rendering = Rendering::resolve(&config.dataset.rendering, context.environment)?;
    let tokenizer = Tokenizer::load(&base, &rendering)?;
    let train = prepare_train(config, context, &tokenizer)?;
    teller.left_out(train.dataset.left_out());
    let validation = prepare_validation(config, context, &tokenizer)?;
    drop(tokenizer);
    let end_of_turn = train.dataset.rendered().unlisted_end();

    // The model, with what is trained of it; then the thread of an earlier attempt, if there is one.
    let model = load_model(config, &base, context)?;
    ranks.barrier("loaded")?;
    let probe = Probe::of(&model, &train);
    let optimizer =
        AdamW::new(model.trained(), config.training.optimizer, config.training.weight_decay);
    let store = open(&config.checkpoints_uri, Role::Output, context)?;
    let checkpoints = Checkpoints::new(store, context.work_dir, config, made_from.clone(), &model);
    let mut training = TrainLoop {
        config,
        model,
        optimizer,
        train,
        validation,
        checkpoints,
        state: TrainState::default(),
    };
    resume(&mut training, teller, context.device)?;
    if let (Some(uri), 0) = (&config.initial_adapter, training.state.step) {
        start_from(uri, &mut training, &base, context)?;
    }
    if let (Some(uri), 0) = (&config.initial_checkpoint, training.state.step) {
        let store = open(uri, Role::Checkpoint, context)?;
        let model = &mut training.model;
        initial::start_from(&store, config.lora.as_ref(), model, context.work_dir)?;
    }

    // Train.
    if training.run(context.stop, teller)? == TrainOutcome::Interrupted {
        return Ok(Some(Outcome::Interrupted { checkpoint_step: training.state.step }));
    }
    let step = take_best(&mut training)?;

    // Write the files and publish them.
    teller.stage(Stage::Exporting);
    let trained = probe.look_at(&training.model);
    ranks.check()?;
    if !ranks.is_first() {
        export::follow(&training.model)?;
        return Ok(None);
    }
    let directory = context.empty_directory("export")?;
    let chat_template = rendering.chat_template.as_deref();
    let export =
        Export { config, base: &base, training: &training, step, chat_template, end_of_turn };
    let kind = export::write(&export, &directory)?;
    teller.stage(Stage::Publishing);
    let manifest = manifest(config, made_from, kind, step);
    let published = publish::publish(&output, &directory, manifest, config.output.overwrite)?;
    // What is read back are the published files, and there is no room for both.
    let _ = std::fs::remove_dir_all(&directory);

    // Success is what was read back.
    teller.stage(Stage::Verifying);
    drop(training.model);
    let proof = verification::read_back(
        config,
        context,
        &output,
        &published.manifest,
        &base,
        &probe,
        &trained,
    )
    .inspect_err(|failure| withdraw(&output, failure))?;
    if let Err(failure) = training.checkpoints.clear() {
        warn!(%failure, "the result is published, but its checkpoints could not be removed");
    }
    Ok(Some(Outcome::Succeeded {
        kind,
        uri: config.output.uri.clone(),
        manifest_sha256: published.manifest_sha256,
        proof,
    }))
}

/// Opens one of the run's URIs.
///
/// # Errors
/// A [`Failure`] if the URI cannot be parsed or its store cannot be set up.
pub fn open(uri: &str, role: Role, context: &RunContext<'_>) -> Result<Store, Failure> {
    let uri = ObjectUri::parse(uri)
        .map_err(|error| Failure::from_chain(FailureReason::InvalidConfiguration, &error))?;
    Ok(Store::open(&uri, None, role, context.environment)?)
}

fn fetch_model(source: &ModelSource, context: &RunContext<'_>) -> Result<PathBuf, Failure> {
    let uri = ObjectUri::parse(&source.uri)
        .map_err(|error| Failure::from_chain(FailureReason::InvalidConfiguration, &error))?;
    let store = Store::open(&uri, source.revision.as_deref(), Role::Model, context.environment)?;
    let directory = gguf::local_directory(&store, context.model_cache)?;
    extension::with_tokens(&directory, &source.added_tokens, context.model_cache)
}

/// Fetches the model once for all ranks of a machine: who comes second finds what is there.
fn fetch_model_for_all(source: &ModelSource, context: &RunContext<'_>) -> Result<PathBuf, Failure> {
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
    let rows = open_rows(config, context, finetune_contract::Split::Train)?.ok_or_else(|| {
        Failure::new(FailureReason::InvalidConfiguration, "the dataset names no training rows")
    })?;
    let split = prepare(config, context, tokenizer, &rows, "train")?;
    let train = rows.names();
    unchanged(&train, &config.expected.train_sha256, split.dataset.sha256())?;
    let (found, planned) = (split.sequences.len() as u64, config.expected.sequences);
    if found != planned {
        let message = format!(
            "{train} makes {found} sequences, but {planned} were planned for: run the plan again"
        );
        return Err(Failure::new(FailureReason::InvalidDataset, message));
    }
    Ok(split)
}

/// Opens the sources of a split's rows; `None` if there is no such split.
fn open_rows(
    config: &RunConfig,
    context: &RunContext<'_>,
    split: finetune_contract::Split,
) -> Result<Option<RowSources>, Failure> {
    RowSources::open(&config.dataset, split, |uri, _| open(uri, Role::Dataset, context))
}

fn prepare_validation(
    config: &RunConfig,
    context: &RunContext<'_>,
    tokenizer: &Tokenizer,
) -> Result<Option<DataSplit>, Failure> {
    let Some(rows) = open_rows(config, context, finetune_contract::Split::Validation)? else {
        return Ok(None);
    };
    let split = prepare(config, context, tokenizer, &rows, "validation")?;
    let expected = config.expected.validation_sha256.as_deref().unwrap_or_default();
    unchanged(&rows.names(), expected, split.dataset.sha256())?;
    Ok(Some(split))
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

fn unchanged(uri: &str, expected: &str, found: &str) -> Result<(), Failure> {
    if expected == found {
        return Ok(());
    }
    let message = format!(
        "{uri} changed since it was checked (its digest is {found}, {expected} was planned for): run the plan again"
    );
    Err(Failure::new(FailureReason::InvalidDataset, message))
}

fn resume(
    training: &mut TrainLoop<'_>,
    teller: &mut Teller<'_>,
    device: Device,
) -> Result<(), Failure> {
    let TrainLoop { checkpoints, model, optimizer, state, config, .. } = training;
    if let Some(restored) = checkpoints.restore_newest(model, optimizer)? {
        info!(step = restored.step, "continuing from a checkpoint");
        *state = restored;
    }
    if config.training.dtype == Dtype::Bf16 && device == Device::Cpu {
        keep_kernel(state);
    }
    teller.resume(state);
    Ok(())
}

/// Multiplies with the kernel of the checkpoint, so that the run continues bit for bit.
fn keep_kernel(state: &mut TrainState) {
    let before = state.bf16_kernel.take();
    if let Some(Err(why)) = before.as_deref().map(ops::choose_bf16_kernel) {
        warn!(why, "the run continues with another kernel, and not equal bit for bit");
    }
    state.bf16_kernel = ops::bf16_kernel().map(str::to_owned);
}

/// Gives the adapter the weights of a published one; a run that goes on has its own.
fn start_from(
    uri: &str,
    training: &mut TrainLoop<'_>,
    base: &Path,
    context: &RunContext<'_>,
) -> Result<(), Failure> {
    let directory = context.empty_directory("initial-adapter")?;
    adapter::fetch(&open(uri, Role::Adapter, context)?, &directory)?;
    let TrainLoop { config, model, .. } = training;
    let asked = config.lora.as_ref().ok_or_else(|| {
        Failure::new(FailureReason::InvalidConfiguration, "initialAdapter needs lora")
    })?;
    let there = AdapterDirectory::open(model.config(), &directory)?;
    let unlike = |message| Failure::new(FailureReason::InvalidConfiguration, message);
    let lora = &there.settings.lora;
    let attachment = &there.published.adapters;
    let differences = adapter::differences(model.config(), asked, lora, attachment)
        .map_err(|error| unlike(format!("the adapter at {uri} does not fit the model: {error}")))?;
    if let Some((field, message)) = differences.into_iter().next() {
        return Err(unlike(format!("spec.loraConfig.{field}: {message}")));
    }
    Ok(model.load_adapter_weights(&there, base)?)
}

/// Puts the best weights back if they are not the last; returns the step they belong to.
fn take_best(training: &mut TrainLoop<'_>) -> Result<u64, Failure> {
    // What rank 0 saved last is there for all only now.
    training.model.ranks().any(false)?;
    let state = &training.state;
    match state.best {
        Some(best) if best.step != state.step => {
            info!(step = best.step, loss = best.loss, "publishing the best evaluation's weights");
            training.checkpoints.restore_best(best.step, &mut training.model)?;
            Ok(best.step)
        }
        _ => Ok(state.step),
    }
}

/// Identifies what the run reads before it is read; rank 0 does it for all.
fn identify_inputs(
    config: &RunConfig,
    context: &RunContext<'_>,
) -> Result<Option<InputDigests>, Failure> {
    if !context.ranks.is_first() {
        return Ok(None);
    }
    inputs::of_run(config, context.environment).map(Some)
}

/// Returns the result of the same inputs at the output, if there is one.
fn find_published(
    config: &RunConfig,
    output: &Store,
    inputs: &InputDigests,
) -> Result<Option<Box<Published>>, Failure> {
    let kind = ArtifactKind::Adapter; // It follows from the settings, which are compared.
    let here = manifest(config, Some(inputs.clone()), kind, 0);
    match publish::find(output, &here, config.attempt > 0)? {
        Found::Same(published) => Ok(Some(published)),
        Found::Vacant => Ok(None),
        Found::Other(_) if config.output.overwrite => Ok(None),
        Found::Other(holds) => {
            Err(store::Error::OutputExists { uri: config.output.uri.clone(), holds }.into())
        }
    }
}

/// Says how a run ended that found its result: an earlier attempt of its own made it, or another run.
fn published_before(config: &RunConfig, published: Published, proof: Proof) -> Outcome {
    let Published { manifest, manifest_sha256 } = published;
    let (kind, uri) = (manifest.kind, config.output.uri.clone());
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

/// Takes the manifest back of a result that is not what was trained: it must not exist.
fn withdraw(output: &Store, failure: &Failure) {
    if failure.reason == FailureReason::NotProven
        && let Err(error) = output.delete(MANIFEST_NAME)
    {
        warn!(%error, "an unproven result could not be withdrawn");
    }
}
