//! Checks the base model without loading its weights.

use std::path::{Path, PathBuf};

use finetune_contract::{
    FailureReason, LoraFacts, ModelFacts, ObjectUri, PreflightConfig, ProblemReason,
};

use crate::{
    architecture::{config::ModelConfig, names},
    checkpoint::initial,
    data::{
        chat::{rendering::Rendering, template_source},
        tokenizer::Tokenizer,
    },
    failure::Failure,
    gguf,
    hf::extension::{self, Extension},
    preflight::{
        adapter,
        findings::{Findings, MODEL_URI, open},
        lora,
        weights::{self, Weights},
    },
    store::{Entry, Environment, Role, Store},
};

/// The files of config, tokenizer and chat template.
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

/// The result of checking a model whose tokenizer can be used.
pub(super) struct Checked {
    /// The shape of the model.
    pub(super) facts: ModelFacts,
    /// The modules that the requested adapter resolves to.
    pub(super) lora: Option<LoraFacts>,
    /// The tokenizer of the model.
    pub(super) tokenizer: Tokenizer,
}

/// The files of a model. Those that are not weights are on the local disk.
struct ModelFiles {
    store: Store,
    entries: Vec<Entry>,
    directory: PathBuf,
    /// The directory with added tokens, if the run adds any.
    extended: Option<(PathBuf, Extension)>,
}

/// Lists the files of the model and fetches the small ones.
fn fetch_files(
    config: &PreflightConfig,
    environment: &Environment,
    work_dir: &Path,
    findings: &mut Findings,
) -> Option<ModelFiles> {
    let source = &config.model;
    let revision = source.revision.as_deref();
    let mut store = open(&source.uri, revision, Role::Model, environment, MODEL_URI, findings)?;
    if store.uri().path.ends_with(".gguf") {
        store = imported(&store, work_dir, environment, findings)?;
    }
    let entries = match store.list() {
        Ok(entries) if entries.is_empty() => {
            findings.add_problem(
                ProblemReason::NotFound,
                MODEL_URI,
                format!("nothing is at {}", store.uri()),
            );
            return None;
        }
        Ok(entries) => entries,
        Err(error) => {
            findings.add_store_error(MODEL_URI, &error);
            return None;
        }
    };
    let directory = small_files(&store, &entries, work_dir, findings)?;
    let extended = match &source.added_tokens[..] {
        [] => None,
        tokens => Some(extend(&directory, tokens, work_dir, findings)?),
    };
    Some(ModelFiles { store, entries, directory, extended })
}

/// Adds the requested tokens to config and tokenizer.
fn extend(
    directory: &Path,
    tokens: &[String],
    work_dir: &Path,
    findings: &mut Findings,
) -> Option<(PathBuf, Extension)> {
    let to = work_dir.join("preflight-extended");
    let extended = make_empty(&to)
        .and_then(|()| extension::extend_config_and_tokenizer(directory, tokens, &to));
    match extended {
        Ok(extended) => Some((to, extended)),
        Err(failure) => {
            findings.add_failure(MODEL_URI, &failure);
            None
        }
    }
}

/// Refuses added tokens whose embedding rows would not be trained.
fn check_added_tokens(new_tokens: u32, lora: Option<&LoraFacts>, findings: &mut Findings) {
    let Some(lora) = lora.filter(|_| new_tokens > 0) else { return };
    let outer = [names::EMBED_TOKENS, names::LM_HEAD].map(names::leaf);
    let missing: Vec<&str> = outer
        .into_iter()
        .filter(|name| lora.saved.iter().all(|saved| saved.name != *name))
        .collect();
    if !missing.is_empty() {
        let message = format!(
            "adds {new_tokens} tokens whose embeddings would not be trained: add {} to loraConfig.modulesToSave, or remove loraConfig to train every parameter",
            missing.join(" and ")
        );
        findings.add_problem(ProblemReason::InvalidSpec, "spec.model.addedTokens", message);
    }
}

/// Loads only the tokenizer; `None` if it cannot be used.
pub(super) fn tokenizer(
    config: &PreflightConfig,
    environment: &Environment,
    work_dir: &Path,
    findings: &mut Findings,
) -> Option<Tokenizer> {
    let ModelFiles { directory, extended, .. } =
        fetch_files(config, environment, work_dir, findings)?;
    let directory = extended.map_or(directory, |(directory, _)| directory);
    load_tokenizer(&directory, config, environment, findings)
}

/// Checks the model and the requested adapter; `None` if rows cannot be tokenized.
pub(super) fn check(
    config: &PreflightConfig,
    environment: &Environment,
    work_dir: &Path,
    findings: &mut Findings,
) -> Option<Checked> {
    let ModelFiles { store, entries, directory, extended } =
        fetch_files(config, environment, work_dir, findings)?;
    let Ok(text) = std::fs::read_to_string(directory.join("config.json")) else {
        let message =
            format!("{} has no config.json: give a directory in Hugging Face layout", store.uri());
        findings.add_problem(ProblemReason::InvalidModel, MODEL_URI, message);
        return None;
    };
    let mut model = match ModelConfig::parse(&text) {
        Ok(model) => model,
        Err(error) => {
            findings.add_problem(ProblemReason::UnsupportedModel, MODEL_URI, error.to_string());
            return None;
        }
    };
    weights::warn_about_unread_files(&entries, findings);
    let weights = weights::check(&store, &entries, &mut model, findings);
    let (directory, new_tokens) = match extended {
        Some((directory, Extension { new_tokens, rows })) => {
            model.vocab_size = model.vocab_size.max(rows);
            (directory, new_tokens)
        }
        None => (directory, 0),
    };
    let mut lora_facts = None;
    if let Some(lora) = &config.lora {
        lora_facts = lora::check(lora, &model, findings);
        if let Some(uri) = &config.initial_adapter {
            adapter::check(uri, lora, &model, environment, findings);
        }
    }
    check_added_tokens(new_tokens, lora_facts.as_ref(), findings);
    if let Some(uri) = &config.initial_checkpoint {
        check_initial_checkpoint(uri, config, &model, environment, findings);
    }
    let tokenizer = load_tokenizer(&directory, config, environment, findings)?;
    let weights = weights.unwrap_or(Weights { bytes: 0, dtype: String::new() });
    let facts = facts(&model, &store, &tokenizer, weights, new_tokens);
    Some(Checked { facts, lora: lora_facts, tokenizer })
}

/// Checks that training can start from a checkpoint of another run.
fn check_initial_checkpoint(
    uri: &ObjectUri,
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
        Err(error) => return findings.add_store_error(location, &error),
    };
    for fault in checked.faults {
        findings.add_problem(fault.reason, &fault.location, fault.message);
    }
    if let Some(base) = checked.other_base {
        let message =
            format!("belongs to an adapter of {base}: it may not work with another base model");
        findings.add_warning(ProblemReason::InvalidModel, location, message);
    }
}

fn load_tokenizer(
    directory: &Path,
    config: &PreflightConfig,
    environment: &Environment,
    findings: &mut Findings,
) -> Option<Tokenizer> {
    let loaded = Rendering::resolve(&config.dataset.rendering, environment)
        .and_then(|rendering| Tokenizer::load(directory, &rendering));
    match loaded {
        Ok(tokenizer) => Some(tokenizer),
        Err(failure) if failure.reason == FailureReason::InvalidModel => {
            findings.add_problem(ProblemReason::InvalidTokenizer, MODEL_URI, failure.message);
            None
        }
        Err(failure) => {
            findings.add_failure("spec.dataset", &failure);
            None
        }
    }
}

fn facts(
    model: &ModelConfig,
    store: &Store,
    tokenizer: &Tokenizer,
    weights: Weights,
    added_tokens: u32,
) -> ModelFacts {
    ModelFacts {
        model_type: model.model_type.clone(),
        resolved_revision: store.resolved_revision().map(str::to_owned),
        parameters: model.parameters(),
        weight_bytes: weights.bytes,
        weight_dtype: weights.dtype,
        hidden_size: model.hidden_size as u32,
        intermediate_size: model.intermediate_size as u32,
        num_hidden_layers: model.num_hidden_layers as u32,
        num_attention_heads: model.num_attention_heads as u32,
        num_key_value_heads: model.num_key_value_heads as u32,
        head_dim: model.head_dim as u32,
        vocab_size: model.vocab_size as u32,
        added_tokens,
        max_position_embeddings: model.max_position_embeddings as u32,
        tie_word_embeddings: model.tie_word_embeddings,
        has_chat_template: tokenizer.has_template(),
        modules: model.modules(),
        cost: Some(model.cost()),
    }
}

/// Converts a GGUF file and opens the resulting directory.
fn imported(
    store: &Store,
    work_dir: &Path,
    environment: &Environment,
    findings: &mut Findings,
) -> Option<Store> {
    match gguf::local_model_directory(store, &work_dir.join("models")) {
        Ok(directory) => match ObjectUri::of_path(&directory) {
            Ok(uri) => open(&uri, None, Role::Model, environment, MODEL_URI, findings),
            Err(error) => {
                findings.add_problem(ProblemReason::InvalidSpec, MODEL_URI, error.to_string());
                None
            }
        },
        Err(failure) => {
            findings.add_failure(MODEL_URI, &failure);
            None
        }
    }
}

/// Fetches config and tokenizer, unless the model is on the local disk.
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
            findings.add_failure(MODEL_URI, &failure);
            None
        }
    }
}

fn is_small(path: &str) -> bool {
    SMALL_FILES.contains(&path)
        || path.strip_prefix(template_source::FOLDER).is_some_and(|name| name.ends_with(".jinja"))
}

/// Creates an empty directory. Files of another model or revision, such as a chat template, must not
/// remain in it.
fn make_empty(directory: &Path) -> Result<(), Failure> {
    match std::fs::remove_dir_all(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(Failure::from_io(&error, &format!("cannot empty {directory:?}")));
        }
        Ok(()) | Err(_) => {}
    }
    std::fs::create_dir_all(directory)
        .map_err(|error| Failure::from_io(&error, &format!("cannot create {directory:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_file_of_an_earlier_model_remains() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new/model");
        for _ in 0..2 {
            make_empty(&path).unwrap();
            assert_eq!(std::fs::read_dir(&path).unwrap().count(), 0);
            std::fs::write(path.join("chat_template.jinja"), "").unwrap();
        }
    }
}
