//! The base model, checked without loading its weights.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use finetune_contract::{
    FailureReason, LoraSettings, ModelFacts, PreflightConfig, ProblemReason, TargetModules,
};

use super::{Findings, adapter, open};
use crate::{
    checkpoint::initial,
    data::{Rendering, Tokenizer, chat_template, format::nearest},
    failure::Failure,
    import,
    model::{
        attach::{self, Attachment},
        config::ModelConfig,
        header::{self, TensorEntry},
        names,
        weights::{INDEX_FILE, SINGLE_FILE, shards_of_index},
    },
    store::{self, Entry, Environment, Role, Store},
};

/// Small files a tokenizer or config may consist of.
const SMALL_FILES: [&str; 8] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
];
const LOCATION: &str = "spec.model.uri";
/// Ranks vLLM can be started for.
const RANKS: [u32; 9] = [1, 8, 16, 32, 64, 128, 256, 320, 512];

/// Checks the model and the adapter asked for; `None` if rows cannot be tokenised for it.
pub(super) fn check(
    config: &PreflightConfig,
    environment: &Environment,
    work_dir: &Path,
    findings: &mut Findings,
) -> Option<(ModelFacts, Tokenizer)> {
    let source = &config.model;
    let revision = source.revision.as_deref();
    let mut store = open(&source.uri, revision, Role::Model, environment, LOCATION, findings)?;
    if store.uri().path.ends_with(".gguf") {
        store = imported(&store, work_dir, environment, findings)?;
    }
    let entries = match store.list() {
        Ok(entries) if entries.is_empty() => {
            findings.problem(
                ProblemReason::NotFound,
                LOCATION,
                format!("nothing is at {}", store.uri()),
            );
            return None;
        }
        Ok(entries) => entries,
        Err(error) => {
            findings.store_problem(LOCATION, &error);
            return None;
        }
    };
    let directory = small_files(&store, &entries, work_dir, findings)?;
    let Ok(text) = std::fs::read_to_string(directory.join("config.json")) else {
        let message =
            format!("{} has no config.json: name a directory in Hugging Face layout", store.uri());
        findings.problem(ProblemReason::InvalidModel, LOCATION, message);
        return None;
    };
    let model = match ModelConfig::parse(&text) {
        Ok(model) => model,
        Err(error) => {
            findings.problem(ProblemReason::UnsupportedModel, LOCATION, error.to_string());
            return None;
        }
    };
    let weights = check_weights(&store, &entries, &model, findings);
    if let Some(lora) = &config.lora {
        check_lora(lora, &model, findings);
        if let Some(uri) = &config.initial_adapter {
            adapter::check(uri, lora, &model, environment, findings);
        }
    }
    if let Some(uri) = &config.initial_checkpoint {
        check_initial_checkpoint(uri, config, &model, environment, findings);
    }
    let tokenizer = match load_tokenizer(&directory, config, environment) {
        Ok(tokenizer) => tokenizer,
        Err(failure) if failure.reason == FailureReason::InvalidModel => {
            findings.problem(ProblemReason::InvalidTokenizer, LOCATION, failure.message);
            return None;
        }
        Err(failure) => {
            findings.failure("spec.dataset", &failure);
            return None;
        }
    };
    let (weight_bytes, weight_dtype) = weights.unwrap_or((0, String::new()));
    Some((facts(&model, &store, &tokenizer, weight_bytes, weight_dtype), tokenizer))
}

/// Checks that training can start from a checkpoint of another run.
fn check_initial_checkpoint(
    uri: &str,
    config: &PreflightConfig,
    model: &ModelConfig,
    environment: &Environment,
    findings: &mut Findings,
) {
    let location = initial::LOCATION;
    let Some(store) = open(uri, None, Role::Checkpoint, environment, location, findings) else {
        return;
    };
    let checked = match initial::check(&store, &config.model, config.lora.as_ref(), model) {
        Ok(checked) => checked,
        Err(error) => return findings.store_problem(location, &error),
    };
    for fault in checked.faults {
        findings.problem(fault.reason, &fault.location, fault.message);
    }
    if let Some(base) = checked.other_base {
        let message =
            format!("is of an adapter of {base}: on another base its weights may mean nothing");
        findings.warning(ProblemReason::InvalidModel, location, message);
    }
}

fn load_tokenizer(
    directory: &Path,
    config: &PreflightConfig,
    environment: &Environment,
) -> Result<Tokenizer, Failure> {
    let rendering = Rendering::resolve(&config.dataset.rendering, environment)?;
    Tokenizer::load(directory, &rendering)
}

fn facts(
    model: &ModelConfig,
    store: &Store,
    tokenizer: &Tokenizer,
    weight_bytes: u64,
    weight_dtype: String,
) -> ModelFacts {
    ModelFacts {
        model_type: model.model_type.clone(),
        resolved_revision: store.resolved_revision().map(str::to_owned),
        parameters: model.parameters(),
        weight_bytes,
        weight_dtype,
        hidden_size: model.hidden_size as u32,
        intermediate_size: model.intermediate_size as u32,
        num_hidden_layers: model.num_hidden_layers as u32,
        num_attention_heads: model.num_attention_heads as u32,
        num_key_value_heads: model.num_key_value_heads as u32,
        head_dim: model.head_dim as u32,
        vocab_size: model.vocab_size as u32,
        max_position_embeddings: model.max_position_embeddings as u32,
        tie_word_embeddings: model.tie_word_embeddings,
        has_chat_template: tokenizer.has_template(),
        modules: model.modules(),
    }
}

/// Imports a GGUF file and opens the directory it became.
fn imported(
    store: &Store,
    work_dir: &Path,
    environment: &Environment,
    findings: &mut Findings,
) -> Option<Store> {
    match import::local_directory(store, &work_dir.join("models")) {
        Ok(directory) => {
            let uri = format!("file://{}", directory.display());
            open(&uri, None, Role::Model, environment, LOCATION, findings)
        }
        Err(failure) => {
            findings.failure(LOCATION, &failure);
            None
        }
    }
}

/// Brings config and tokenizer to local disk, unless they are there.
fn small_files(
    store: &Store,
    entries: &[Entry],
    work_dir: &Path,
    findings: &mut Findings,
) -> Option<PathBuf> {
    if let Some(directory) = store.local_path("") {
        return Some(directory);
    }
    let directory = work_dir.join("preflight-model");
    let fetch = || -> Result<(), Failure> {
        make_empty(&directory)?;
        for entry in entries.iter().filter(|entry| is_small(&entry.path)) {
            store.fetch(&entry.path, &directory.join(&entry.path))?;
        }
        Ok(())
    };
    match fetch() {
        Ok(()) => Some(directory),
        Err(failure) => {
            findings.failure(LOCATION, &failure);
            None
        }
    }
}

fn is_small(path: &str) -> bool {
    SMALL_FILES.contains(&path)
        || path.strip_prefix(chat_template::FOLDER).is_some_and(|name| name.ends_with(".jinja"))
}

/// Makes a directory without anything in it: files of another model or revision that this one does
/// not have, such as a chat template, would be taken for its own.
fn make_empty(directory: &Path) -> Result<(), Failure> {
    match std::fs::remove_dir_all(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(Failure::from_io(&error, &format!("cannot empty {directory:?}")));
        }
        Ok(()) | Err(_) => {}
    }
    std::fs::create_dir_all(directory)
        .map_err(|error| Failure::from_io(&error, &format!("cannot make {directory:?}")))
}

/// Reads the headers of all weight files; returns their bytes and the widest dtype.
fn check_weights(
    store: &Store,
    entries: &[Entry],
    model: &ModelConfig,
    findings: &mut Findings,
) -> Option<(u64, String)> {
    let files = match weight_files(store, entries) {
        Ok(files) => files,
        Err((reason, message)) => {
            findings.problem(reason, LOCATION, message);
            return None;
        }
    };
    let mut tensors = BTreeMap::new();
    let mut bytes = 0;
    for (file, size) in files {
        bytes += size;
        match read_header(store, &file, size) {
            Ok(found) => tensors.extend(found),
            Err((reason, message)) => {
                findings.problem(reason, &file, message);
                return None;
            }
        }
    }
    compare(&tensors, model, findings);
    let width = |dtype: &str| ["F16", "BF16", "F32"].iter().position(|known| *known == dtype);
    let widest =
        tensors.values().map(|tensor| tensor.dtype.as_str()).max_by_key(|dtype| width(dtype));
    Some((bytes, widest.unwrap_or_default().to_owned()))
}

fn weight_files(
    store: &Store,
    entries: &[Entry],
) -> Result<Vec<(String, u64)>, (ProblemReason, String)> {
    let size = |name: &str| entries.iter().find(|entry| entry.path == name).map(|entry| entry.size);
    if let Some(index_size) = size(INDEX_FILE) {
        let text = store.read_range(INDEX_FILE, 0..index_size).map_err(of_store)?;
        let shards = shards_of_index(&String::from_utf8_lossy(&text)).map_err(|reason| {
            (ProblemReason::InvalidModel, format!("{INDEX_FILE} is damaged: {reason}"))
        })?;
        return shards
            .into_keys()
            .map(|shard| match size(&shard) {
                Some(size) => Ok((shard, size)),
                None => Err((
                    ProblemReason::InvalidModel,
                    format!("{INDEX_FILE} names {shard:?}, which does not exist"),
                )),
            })
            .collect();
    }
    if let Some(size) = size(SINGLE_FILE) {
        return Ok(vec![(SINGLE_FILE.to_owned(), size)]);
    }
    let pickles = [".bin", ".pt", ".pth", ".ckpt"];
    let unsafe_file =
        entries.iter().find(|entry| pickles.iter().any(|ending| entry.path.ends_with(ending)));
    let message = match unsafe_file {
        Some(entry) => format!(
            "the weights are a pickle ({}), which can run any code when opened: convert them with transformers' save_pretrained, which writes safetensors",
            entry.path
        ),
        None => format!("{} has no {SINGLE_FILE} and no {INDEX_FILE}", store.uri()),
    };
    Err((ProblemReason::InvalidModel, message))
}

pub(super) fn read_header(
    store: &Store,
    file: &str,
    size: u64,
) -> Result<BTreeMap<String, TensorEntry>, (ProblemReason, String)> {
    let damaged = |error: header::Error| (ProblemReason::InvalidModel, error.to_string());
    let first = store.read_range(file, 0..size.min(8)).map_err(of_store)?;
    let length = header::header_length(&first, size).map_err(damaged)?;
    let json = store.read_range(file, 8..8 + length).map_err(of_store)?;
    header::parse(&json, size).map_err(damaged)
}

/// Keeps the store's own reason: a file that cannot be reached is not a damaged one.
fn of_store(error: store::Error) -> (ProblemReason, String) {
    (error.problem_reason(), error.to_string())
}

fn compare(tensors: &BTreeMap<String, TensorEntry>, model: &ModelConfig, findings: &mut Findings) {
    let (mut missing, mut misshapen) = (Vec::new(), Vec::new());
    for expected in model.tensors() {
        match tensors.get(&expected.name) {
            None => missing.push(expected.name),
            Some(found) if found.shape != expected.shape => {
                misshapen.push(format!(
                    "{} is {:?}, not {:?}",
                    expected.name, found.shape, expected.shape
                ));
            }
            Some(found) if !["F32", "F16", "BF16"].contains(&found.dtype.as_str()) => {
                misshapen.push(format!(
                    "{} has dtype {}, not F32, F16 or BF16",
                    expected.name, found.dtype
                ));
            }
            Some(_) => {}
        }
    }
    let some = |list: &[String]| {
        let more =
            if list.len() > 3 { format!(" and {} more", list.len() - 3) } else { String::new() };
        format!("{}{more}", list[..list.len().min(3)].join(", "))
    };
    let expected: BTreeSet<String> =
        model.tensors().into_iter().map(|tensor| tensor.name).collect();
    // Old checkpoints carry the rotary table, tied ones sometimes the head they do not use.
    let is_harmless = |name: &str| {
        name.ends_with("rotary_emb.inv_freq")
            || (name == "lm_head.weight" && model.tie_word_embeddings)
    };
    let unexpected: Vec<String> = tensors
        .keys()
        .filter(|name| !expected.contains(*name) && !is_harmless(name))
        .cloned()
        .collect();
    if !unexpected.is_empty() {
        let message = format!(
            "the weights have {}, which a model of this config.json does not use: its answers would be wrong",
            some(&unexpected)
        );
        findings.problem(ProblemReason::InvalidModel, LOCATION, message);
    }
    if !missing.is_empty() {
        let message =
            format!("the weights lack {}: they do not belong to this config.json", some(&missing));
        findings.problem(ProblemReason::InvalidModel, LOCATION, message);
    }
    if !misshapen.is_empty() {
        findings.problem(
            ProblemReason::InvalidModel,
            LOCATION,
            format!("the weights do not fit config.json: {}", some(&misshapen)),
        );
    }
}

fn check_lora(lora: &LoraSettings, model: &ModelConfig, findings: &mut Findings) {
    if let Err(error) = Attachment::lora(model, lora) {
        let location = match &error {
            attach::Error::UnknownModule { field, .. } => format!("spec.{field}"),
            attach::Error::RankTooLarge { .. } => "spec.loraConfig.r".to_owned(),
            attach::Error::Both { .. } | attach::Error::Nothing => "spec.loraConfig".to_owned(),
        };
        let hint = match &error {
            attach::Error::UnknownModule { name, known, .. } => {
                let known: Vec<&str> = known.iter().map(String::as_str).collect();
                nearest(name, &known)
                    .map_or(String::new(), |near| format!(" (did you mean {near:?}?)"))
            }
            _ => String::new(),
        };
        findings.problem(ProblemReason::InvalidSpec, &location, format!("{error}{hint}"));
        return;
    }
    warn_of_servability(lora, findings);
}

/// # Source
/// `vllm/lora/peft_helper.py` and `vllm/config/lora.py`, v0.22.
fn warn_of_servability(lora: &LoraSettings, findings: &mut Findings) {
    let mut warn = |location: &str, message: String| {
        findings.warning(ProblemReason::Servability, location, message);
    };
    if !lora.modules_to_save.is_empty() {
        warn(
            "spec.loraConfig.modulesToSave",
            "vLLM refuses adapters with modulesToSave: set output.merge to true to serve the merged model".to_owned(),
        );
    }
    if let TargetModules::List(targets) = &lora.target_modules {
        let outer = targets
            .iter()
            .find(|target| ["embed_tokens", "lm_head"].contains(&names::leaf(target)));
        if let Some(outer) = outer {
            warn(
                "spec.loraConfig.targetModules",
                format!(
                    "vLLM does not serve adapters on {outer} of every model: set output.merge to true to serve the merged model"
                ),
            );
        }
    }
    match RANKS.into_iter().find(|&rank| rank >= lora.r) {
        None => warn("spec.loraConfig.r", format!("vLLM serves ranks up to 512, not {}", lora.r)),
        Some(rank) if rank > 16 => {
            warn(
                "spec.loraConfig.r",
                format!("vLLM serves rank {} only with --max-lora-rank {rank}", lora.r),
            );
        }
        Some(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use finetune_contract::ObjectUri;

    use super::*;

    #[test]
    fn weights_that_cannot_be_read_are_not_called_damaged() {
        let directory = tempfile::tempdir().unwrap();
        let uri = ObjectUri::parse(&format!("file://{}", directory.path().display())).unwrap();
        let store = Store::open(&uri, None, Role::Model, &Environment::default()).unwrap();
        let (reason, _) = read_header(&store, "gone.safetensors", 100).unwrap_err();
        assert_eq!(reason, ProblemReason::NotFound);
        std::fs::write(directory.path().join("short.safetensors"), [0; 4]).unwrap();
        let (reason, _) = read_header(&store, "short.safetensors", 4).unwrap_err();
        assert_eq!(reason, ProblemReason::InvalidModel);
    }

    #[test]
    fn nothing_of_the_model_before_is_left() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new/model");
        for _ in 0..2 {
            make_empty(&path).unwrap();
            assert_eq!(std::fs::read_dir(&path).unwrap().count(), 0);
            std::fs::write(path.join("chat_template.jinja"), "").unwrap();
        }
    }
}
