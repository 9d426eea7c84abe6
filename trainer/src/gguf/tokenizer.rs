//! Builds the tokenizer files of a converted model: byte-level BPE with the pre-tokenizer of the family.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use crate::{
    architecture::GgufFamily,
    gguf::reader::{self, Gguf},
};

/// The type of a control token, which is special and never part of ordinary text.
const CONTROL: i64 = 3;
/// The type of a token that the authors added to the vocabulary.
const USER_DEFINED: i64 = 4;

/// The files of a tokenizer.
pub(super) struct Files {
    /// tokenizer.json.
    pub tokenizer: Value,
    /// tokenizer_config.json.
    pub settings: Value,
}

/// Builds both files.
///
/// # Errors
/// A message that says why the tokenizer is not supported.
pub(super) fn build(gguf: &Gguf) -> Result<Files, String> {
    let model =
        gguf.text("tokenizer.ggml.model").ok_or("the metadata lacks tokenizer.ggml.model")?;
    if model != "gpt2" {
        let kind = if model == "llama" { "SentencePiece" } else { model };
        return Err(format!(
            "its tokenizer is {kind}, but only byte-level BPE is supported: use the model's original \
             Hugging Face files"
        ));
    }
    let tokens = texts(gguf, "tokenizer.ggml.tokens")?;
    let merges = texts(gguf, "tokenizer.ggml.merges")?;
    let distinct = tokens.iter().collect::<BTreeSet<_>>().len();
    if distinct != tokens.len() {
        return Err(format!(
            "its vocabulary of {} tokens has only {distinct} distinct ones",
            tokens.len()
        ));
    }
    let kinds: Vec<i64> = gguf
        .list("tokenizer.ggml.token_type")
        .filter(|kinds| kinds.len() == tokens.len())
        .ok_or("the metadata lacks tokenizer.ggml.token_type with one entry for each token")?
        .iter()
        .map(|kind| if let reader::Value::Integer(kind) = kind { *kind } else { 1 })
        .collect();
    let splitting = splitting(pre_tokenizer_name(gguf)?)?;
    let vocabulary: Map<String, Value> =
        tokens.iter().enumerate().map(|(id, token)| ((*token).to_owned(), json!(id))).collect();
    let added: Vec<Value> = tokens
        .iter()
        .zip(&kinds)
        .enumerate()
        .filter(|(_, (_, kind))| matches!(**kind, CONTROL | USER_DEFINED))
        .map(|(id, (token, kind))| {
            json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": *kind == CONTROL})
        })
        .collect();
    let token_of =
        |key: &str| gguf.integer(key).and_then(|id| tokens.get(usize::try_from(id).ok()?));
    let bos = token_of("tokenizer.ggml.bos_token_id");
    let adds_bos = match gguf.value("tokenizer.ggml.add_bos_token") {
        Some(reader::Value::Bool(adds)) => *adds,
        _ => splitting.adds_bos,
    };
    let post_processor = match bos.filter(|_| adds_bos) {
        Some(bos) => {
            bos_post_processor(bos, gguf.integer("tokenizer.ggml.bos_token_id").unwrap_or(0))
        }
        None => Value::Null,
    };
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": splitting.normalizer,
        "pre_tokenizer": splitting.pre_tokenizer,
        "post_processor": post_processor,
        "decoder": byte_level(true),
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": splitting.ignore_merges, "vocab": vocabulary, "merges": merges,
        },
    });
    let mut settings = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": false,
        "model_max_length": gguf.integer(&format!("{}.context_length", gguf.text("general.architecture").unwrap_or_default())),
    });
    for (name, key) in [
        ("bos_token", "tokenizer.ggml.bos_token_id"),
        ("eos_token", "tokenizer.ggml.eos_token_id"),
        ("unk_token", "tokenizer.ggml.unknown_token_id"),
        ("pad_token", "tokenizer.ggml.padding_token_id"),
    ] {
        if let Some(token) = token_of(key) {
            settings[name] = json!(token);
        }
    }
    Ok(Files { tokenizer, settings })
}

fn texts<'a>(gguf: &'a Gguf, key: &str) -> Result<Vec<&'a str>, String> {
    let list = gguf.list(key).ok_or_else(|| format!("the metadata lacks {key}"))?;
    list.iter()
        .map(|value| match value {
            reader::Value::Text(text) => Ok(text.as_str()),
            other => Err(format!("{key} contains {other:?}, but its entries must be strings")),
        })
        .collect()
}

/// Returns the name of the pre-tokenizer.
fn pre_tokenizer_name(gguf: &Gguf) -> Result<&str, String> {
    let family = gguf.text("general.architecture").and_then(GgufFamily::of_architecture);
    let default = family.and_then(|family| family.default_pre_tokenizer);
    match (gguf.text("tokenizer.ggml.pre"), default) {
        // Files from before May 2024 lack the key.
        (None | Some("default"), Some(default)) => Ok(default),
        (None, None) => {
            Err("the metadata lacks tokenizer.ggml.pre, the pre-tokenizer: use the model's \
                             original Hugging Face files"
                .to_owned())
        }
        (Some(pre_tokenizer_name), _) => Ok(pre_tokenizer_name),
    }
}

struct Splitting {
    normalizer: Value,
    pre_tokenizer: Value,
    ignore_merges: bool,
    /// Whether a text starts with BOS, if the file does not say.
    adds_bos: bool,
}

/// Returns how a family splits text before merging.
///
/// # Source
/// The names are those of `llama-vocab.cpp` in ggml-org/llama.cpp; the rules are those of the
/// families' own tokenizer.json.
fn splitting(pre_tokenizer_name: &str) -> Result<Splitting, String> {
    let by_pattern = |digits: &str| {
        let pattern = format!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        );
        let split = json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        json!({"type": "Sequence", "pretokenizers": [split, byte_level(false)]})
    };
    let plain = |pre_tokenizer| Splitting {
        normalizer: Value::Null,
        pre_tokenizer,
        ignore_merges: false,
        adds_bos: false,
    };
    Ok(match pre_tokenizer_name {
        "gpt-2" => plain(byte_level(true)),
        "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" => {
            let digits = json!({"type": "Digits", "individual_digits": true});
            plain(json!({"type": "Sequence", "pretokenizers": [digits, byte_level(true)]}))
        }
        "qwen2" => Splitting { normalizer: json!({"type": "NFC"}), ..plain(by_pattern(r"\p{N}")) },
        "llama-bpe" | "llama3" | "llama-v3" => {
            let splitting = plain(by_pattern(r"\p{N}{1,3}"));
            Splitting { ignore_merges: true, adds_bos: true, ..splitting }
        }
        other => {
            return Err(format!(
                "its pre-tokenizer {other:?} is not supported: use the model's original Hugging Face files"
            ));
        }
    })
}

fn byte_level(use_regex: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex})
}

fn bos_post_processor(bos: &str, id: i64) -> Value {
    let special = json!({"SpecialToken": {"id": bos, "type_id": 0}});
    let sequence = |name: &str, type_id: u32| json!({"Sequence": {"id": name, "type_id": type_id}});
    let mut tokens = Map::new();
    tokens.insert(bos.to_owned(), json!({"id": bos, "ids": [id], "tokens": [bos]}));
    json!({
        "type": "TemplateProcessing",
        "single": [special, sequence("A", 0)],
        "pair": [special, sequence("A", 0), {"SpecialToken": {"id": bos, "type_id": 1}}, sequence("B", 1)],
        "special_tokens": tokens,
    })
}
