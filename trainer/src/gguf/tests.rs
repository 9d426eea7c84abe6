//! Tests of whole conversions: of files that transformers reads as well, and of files with one error.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use finetune_contract::testing::file_uri;
use serde::Deserialize;
use serde_json::Value;
use tch::{Kind, Tensor};

use crate::{
    data::{
        chat::rendering::Rendering,
        conversation::{ChatRole, Message},
        tokenizer::Tokenizer,
    },
    gguf::{Arguments, convert, local_model_directory, run},
    hf::{read_config, weights::WeightFiles},
    store::{Environment, Role, Store, sha256_hex},
    verification::load_frozen,
};

const NAMES: [&str; 4] = ["llama-smollm", "llama-llama3", "qwen2", "qwen3"];

/// The content of a file according to transformers, written by `golden/gen.py`.
#[derive(Deserialize)]
struct Golden {
    config: BTreeMap<String, Value>,
    weights: BTreeMap<String, String>,
    texts: Vec<Text>,
}

#[derive(Deserialize)]
struct Text {
    text: String,
    tokens: Vec<u32>,
}

fn golden(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/gguf/golden").join(file)
}

fn bf16_bytes(tensor: &Tensor) -> Vec<u8> {
    assert_eq!(tensor.kind(), Kind::BFloat16);
    let mut bytes = vec![0; tensor.numel() * 2];
    tensor.contiguous().copy_data_u8(&mut bytes, tensor.numel());
    bytes
}

/// Compares numbers as fp32, the precision of GGUF.
fn same(found: &Value, expected: &Value) -> bool {
    match (found.as_f64(), expected.as_f64()) {
        (Some(found), Some(expected)) => (found as f32).to_bits() == (expected as f32).to_bits(),
        _ => found == expected,
    }
}

#[test]
fn converts_files_as_transformers_reads_them() {
    let directory = tempfile::tempdir().unwrap();
    for name in NAMES {
        let golden_text = fs::read_to_string(golden(&format!("{name}.json"))).unwrap();
        let expected: Golden = serde_json::from_str(&golden_text).unwrap();
        let to = directory.path().join(name);
        convert(&golden(&format!("{name}.gguf")), &to).unwrap();

        let config = read_config(&to).unwrap();
        for (key, value) in &expected.config {
            assert!(same(&config.source[key], value), "{name}: {key} is {}", config.source[key]);
        }
        let weights = WeightFiles::open(&to).unwrap();
        let found: BTreeMap<String, String> = weights
            .names()
            .map(|name| (name.to_owned(), sha256_hex(&bf16_bytes(&weights.tensor(name).unwrap()))))
            .collect();
        assert_eq!(found, expected.weights, "{name}");
        let tokenizer = Tokenizer::load(&to, &Rendering::of_model()).unwrap();
        for Text { text, tokens } in &expected.texts {
            assert_eq!(&tokenizer.encode(text, true).unwrap(), tokens, "{name}: {text:?}");
        }
        let logits = load_frozen(&to, finetune_contract::Dtype::Fp32, tch::Device::Cpu)
            .unwrap()
            .logits(&[1, 2, 3]);
        assert_eq!(logits.isfinite().all().int64_value(&[]), 1, "{name}");
    }
}

#[test]
fn keeps_the_chat_template_and_the_end_of_a_turn() {
    let directory = tempfile::tempdir().unwrap();
    let to = directory.path().join("model");
    convert(&golden("llama-smollm.gguf"), &to).unwrap();
    let tokenizer = Tokenizer::load(&to, &Rendering::of_model()).unwrap();
    let message = Message::new(ChatRole::User, "hello");
    let text = tokenizer.render_chat(&[message], false).unwrap();
    assert_eq!(text, "<|start|>user\nhello<|end|>\n");
    let tokens = tokenizer.encode(&text, false).unwrap();
    assert!(tokenizer.eos_ids().iter().any(|end| tokens.contains(end)), "{tokens:?}");
    assert_eq!(tokenizer.decode(&tokens, true), "user\nhello\n");
}

#[test]
fn does_not_overwrite_a_directory() {
    let directory = tempfile::tempdir().unwrap();
    let to = directory.path().join("model");
    let arguments = Arguments { from: golden("qwen2.gguf"), to: to.clone() };
    fs::create_dir(&to).unwrap();
    run(&arguments).unwrap();
    let message =
        run(&arguments).unwrap_err().message.replace(directory.path().to_str().unwrap(), "");
    insta::assert_snapshot!(message, @r#""/model" already exists: choose another directory with --to, or remove it"#);
}

#[test]
fn converts_a_file_again_only_if_its_bytes_changed() {
    let directory = tempfile::tempdir().unwrap();
    let from = directory.path().join("x.gguf");
    let mut bytes = fs::read(golden("qwen2.gguf")).unwrap();
    fs::write(&from, &bytes).unwrap();
    let imported = || {
        let uri = file_uri(&from);
        let environment = Environment::from_pairs([]);
        let store = Store::open(&uri, None, Role::Model, &environment).unwrap();
        local_model_directory(&store, &directory.path().join("cache")).unwrap()
    };
    let first = imported();
    assert_eq!(imported(), first);
    // The size remains the same.
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&from, &bytes).unwrap();
    assert_ne!(imported(), first);
}

/// Changes a file and tries to convert it.
fn check(edit: impl Fn(&mut Vec<u8>)) -> String {
    let directory = tempfile::tempdir().unwrap();
    let from = directory.path().join("x.gguf");
    let mut bytes = fs::read(golden("llama-smollm.gguf")).unwrap();
    edit(&mut bytes);
    fs::write(&from, bytes).unwrap();
    let to = directory.path().join("model");
    match convert(&from, &to) {
        Ok(()) => "converted".to_owned(),
        Err(failure) => {
            assert!(!to.exists(), "a failed conversion must leave nothing behind");
            failure.message.replace(directory.path().to_str().unwrap(), "")
        }
    }
}

fn find(bytes: &[u8], text: &str) -> usize {
    bytes.windows(text.len()).position(|window| window == text.as_bytes()).unwrap()
}

/// Overwrites bytes at a distance after a text that occurs in the file.
fn overwrite_after(text: &str, distance: usize, new: &[u8]) -> impl Fn(&mut Vec<u8>) {
    move |bytes| {
        let position = find(bytes, text) + text.len() + distance;
        bytes[position..position + new.len()].copy_from_slice(new);
    }
}

/// Sets a 32-bit number of the metadata; its type precedes it.
fn set(key: &str, number: u32) -> impl Fn(&mut Vec<u8>) {
    move |bytes| overwrite_after(key, 4, &number.to_le_bytes())(bytes)
}

/// Sets a string of the metadata to another of the same length; its type and length precede it.
fn set_text(key: &str, text: &str) -> impl Fn(&mut Vec<u8>) {
    move |bytes| overwrite_after(key, 12, text.as_bytes())(bytes)
}

/// Adds a 32-bit number to the metadata, and a second one to keep the tensors aligned.
fn add(key: &str, number: u32) -> impl Fn(&mut Vec<u8>) {
    let entry = |key: &str, number: u32| {
        let length = (key.len() as u64).to_le_bytes();
        [&length[..], key.as_bytes(), &4_u32.to_le_bytes(), &number.to_le_bytes()].concat()
    };
    let added = entry(key, number);
    let filling = 64 - (added.len() + entry("", 0).len()) % 32;
    let added = [added, entry(&"x".repeat(filling), 0)].concat();
    move |bytes| {
        // The number of values follows the magic number, the version and the number of tensors.
        bytes[16] += 2;
        bytes.splice(24..24, added.iter().copied());
    }
}

/// Renames a key or tensor to a name of the same length.
fn rename(from: &str, to: &str) -> impl Fn(&mut Vec<u8>) {
    assert_eq!(from.len(), to.len());
    move |bytes| {
        let position = find(bytes, from);
        bytes[position..position + to.len()].copy_from_slice(to.as_bytes());
    }
}

#[test]
fn reports_what_is_wrong_with_a_file() {
    assert_eq!(check(|_| {}), "converted");
    insta::assert_snapshot!(check(set_text("general.architecture", "gemma")), @r#""/x.gguf": the architecture "gemma" is not supported: use one of llama, qwen2, qwen3"#);
    insta::assert_snapshot!(check(set_text("tokenizer.ggml.model", "bert")), @r#""/x.gguf": its tokenizer is bert, but only byte-level BPE is supported: use the model's original Hugging Face files"#);
    insta::assert_snapshot!(check(set_text("tokenizer.ggml.pre", "tekken")), @r#""/x.gguf": its pre-tokenizer "tekken" is not supported: use the model's original Hugging Face files"#);
    insta::assert_snapshot!(check(rename("tokenizer.ggml.pre", "tokenizer.ggml.xxx")), @r#""/x.gguf": the metadata lacks tokenizer.ggml.pre, the pre-tokenizer: use the model's original Hugging Face files"#);
    insta::assert_snapshot!(check(rename("tokenizer.ggml.merges", "tokenizer.ggml.xxxxxx")), @r#""/x.gguf": the metadata lacks tokenizer.ggml.merges"#);
    insta::assert_snapshot!(check(rename("tokenizer.ggml.token_type", "tokenizer.ggml.xxxxxxxxxx")), @r#""/x.gguf": the metadata lacks tokenizer.ggml.token_type with one entry for each token"#);
    insta::assert_snapshot!(check(set("llama.block_count", 2_000_000_000)), @r#""/x.gguf": llama.block_count is 2000000000, but the file has 11 tensors"#);
    insta::assert_snapshot!(check(set("llama.block_count", 2)), @r#""/x.gguf": the file has no tensor "blk.1.attn_norm.weight""#);
    insta::assert_snapshot!(check(set("llama.embedding_length", 128)), @r#""/x.gguf": tensor "token_embd.weight" has shape [345, 64], but the metadata requires [345, 128]"#);
    insta::assert_snapshot!(check(set("llama.attention.head_count", 0)), @r#""/x.gguf": llama.embedding_length is 64 and llama.attention.head_count is 0"#);
    insta::assert_snapshot!(check(set("llama.attention.head_count_kv", 3)), @r#""/x.gguf": config.json has num_key_value_heads = 3: it must divide num_attention_heads = 4"#);
    insta::assert_snapshot!(check(rename("llama.context_length", "llama.xxxxxxx_length")), @r#""/x.gguf": the metadata lacks llama.context_length"#);
    insta::assert_snapshot!(check(add("llama.expert_count", 8)), @r#""/x.gguf": llama.expert_count is 8: a mixture of experts is not supported, use the model's original Hugging Face files"#);
    insta::assert_snapshot!(check(add("llama.attention.value_length", 8)), @r#""/x.gguf": llama.attention.value_length is 8: a head width of values that differs from that of keys is not supported, use the model's original Hugging Face files"#);
    insta::assert_snapshot!(check(add("llama.attention.sliding_window", 255)), @r#""/x.gguf": llama.attention.sliding_window is 255: a sliding window is not supported, use the model's original Hugging Face files"#);
    assert_eq!(check(add("llama.attention.sliding_window", 256)), "converted");
    insta::assert_snapshot!(check(rename("blk.0.attn_norm.weight", "blk.0.attn_q.bias12345")), @r#""/x.gguf": its architecture does not use 1 of its tensors, such as "blk.0.attn_q.bias12345": use the model's original Hugging Face files"#);
    // After the name come the number of dimensions, two dimensions, and the type.
    insta::assert_snapshot!(check(overwrite_after("blk.0.attn_q.weight", 20, &99_u32.to_le_bytes())), @r#""/x.gguf": tensor "blk.0.attn_q.weight" has the storage type 99, which is not supported"#);
    insta::assert_snapshot!(check(overwrite_after("blk.0.attn_q.weight", 24, &(1_u64 << 40).to_le_bytes())), @r#""/x.gguf": tensor "blk.0.attn_q.weight": the file is truncated: a tensor needs 2560 bytes at 1099511635232, but it has 41248"#);
    insta::assert_snapshot!(check(overwrite_after("blk.0.attn_q.weight", 0, &9_u32.to_le_bytes())), @r#""/x.gguf": the file is damaged: tensor "blk.0.attn_q.weight" has 9 dimensions"#);
    insta::assert_snapshot!(check(|bytes| bytes.truncate(bytes.len() - 1000)), @r#""/x.gguf": tensor "blk.0.attn_norm.weight": the file is truncated: a tensor needs 256 bytes at 40480, but it has 40248"#);
    insta::assert_snapshot!(check(|bytes| bytes.truncate(1000)), @r#""/x.gguf": the file is truncated: a number needs 8 bytes at 995, but it has 1000"#);
    insta::assert_snapshot!(check(Vec::clear), @r#""/x.gguf": the file is truncated: the magic number needs 4 bytes at 0, but it has 0"#);
}

#[test]
fn damage_anywhere_in_the_header_is_an_error_or_harmless() {
    let length = find(&fs::read(golden("llama-smollm.gguf")).unwrap(), "blk.0.ffn_up.weight") + 60;
    for index in 0..200 {
        // The step is coprime to the length, which spreads the positions over the header.
        let position = index * 7919 % length;
        check(|bytes| bytes[position] ^= 1 << (index % 8));
        check(|bytes| {
            let end = bytes.len().min(position + 8);
            bytes[position..end].fill(0xff);
        });
    }
}
