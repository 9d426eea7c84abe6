//! Runs that end well, and what they leave.

use std::fs;

use finetune_contract::ArtifactKind;
use serde_json::json;

use crate::sandbox::{Sandbox, lines, rows, sha256};

fn paths(manifest: &finetune_contract::Manifest) -> Vec<&str> {
    manifest.files.iter().map(|file| file.path.as_str()).collect()
}

#[test]
fn a_lora_run_publishes_an_adapter_once() {
    let Some(sandbox) = Sandbox::new() else { return };
    let job = sandbox.job("output");
    let ran = sandbox.run(&job).ok();
    assert!(ran.stdout.starts_with("published "), "{}", ran.stdout);
    let manifest = sandbox.published("output");
    assert_eq!(manifest.kind, ArtifactKind::Adapter);
    assert_eq!(manifest.step, 6);
    insta::assert_debug_snapshot!(paths(&manifest), @r#"
[
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
]
"#);
    assert!(sandbox.checkpoints("output").is_empty());
    let [first, last] = sandbox.report(&job).train_loss.unwrap();
    assert!(last < first, "{first} → {last}");

    // The same again changes nothing.
    let manifest_path = sandbox.path("output/finetune-manifest.json");
    let before =
        (sha256(&manifest_path), fs::metadata(&manifest_path).unwrap().modified().unwrap());
    let ran = sandbox.run(&job).ok();
    assert!(ran.stdout.starts_with("the same inputs are already published at "), "{}", ran.stdout);
    let after = (sha256(&manifest_path), fs::metadata(&manifest_path).unwrap().modified().unwrap());
    assert_eq!(before, after);

    // And anybody can prove it, and use it.
    let uri = sandbox.uri("output");
    sandbox.finetune(&["verify", &uri]).ok();
    let generated = sandbox.finetune(&[
        "generate",
        "--model",
        "model",
        "--adapter",
        "output",
        "--prompt",
        "3+1",
        "--max-new-tokens",
        "8",
    ]);
    assert!(!generated.ok().stdout.trim().is_empty());

    // Unless a byte of it changes.
    let path = sandbox.path("output/adapter_model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, bytes).unwrap();
    let ran = sandbox.finetune(&["verify", &uri]);
    insta::assert_snapshot!(without_digests(&sandbox.shown(&ran)), @"
exit 70
error: file://DIR/output/adapter_model.safetensors is damaged: the manifest says 19840 bytes with SHA-256 DIGEST, the store has 19840 bytes with DIGEST
");
}

/// Replaces SHA-256 digests, which depend on the CPU's arithmetic.
fn without_digests(text: &str) -> String {
    let words = text.split(' ').map(|word| {
        let digits = word.trim_end_matches(',');
        if digits.len() == 64 { word.replace(digits, "DIGEST") } else { word.to_owned() }
    });
    words.collect::<Vec<_>>().join(" ")
}

#[test]
fn a_full_parameter_run_publishes_a_model() {
    let Some(sandbox) = Sandbox::new() else { return };
    let mut job = sandbox.job("output");
    job["spec"].as_object_mut().unwrap().remove("loraConfig");
    sandbox.run(&job).ok();
    let manifest = sandbox.published("output");
    assert_eq!(manifest.kind, ArtifactKind::FullModel);
    insta::assert_debug_snapshot!(paths(&manifest), @r#"
[
    "README.md",
    "chat_template.jinja",
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
]
"#);
    sandbox.finetune(&["verify", &sandbox.uri("output")]).ok();
    sandbox
        .finetune(&["generate", "--model", "output", "--prompt", "3+1", "--max-new-tokens", "8"])
        .ok();
}

#[test]
fn a_merged_run_publishes_the_model_and_its_adapter() {
    let Some(sandbox) = Sandbox::new() else { return };
    let mut job = sandbox.job("output");
    job["spec"]["output"]["merge"] = json!(true);
    sandbox.run(&job).ok();
    let manifest = sandbox.published("output");
    assert_eq!(manifest.kind, ArtifactKind::MergedModel);
    insta::assert_debug_snapshot!(paths(&manifest), @r#"
[
    "README.md",
    "adapter/README.md",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "adapter/chat_template.jinja",
    "adapter/tokenizer.json",
    "adapter/tokenizer_config.json",
    "chat_template.jinja",
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
]
"#);
    sandbox.finetune(&["verify", &sandbox.uri("output")]).ok();
}

/// A model whose generation would go on after the end of a turn, with a stale index beside its weights.
#[test]
fn a_result_stops_where_its_turns_end() {
    let Some(sandbox) = Sandbox::new() else { return };
    sandbox.write("model/generation_config.json", "{\"eos_token_id\": 256}");
    sandbox.write(
        "model/model.safetensors.index.json",
        "{\"weight_map\": {\"model.norm.weight\": \"model-00001-of-00001.safetensors\"}}",
    );
    for is_merged in [true, false] {
        let mut job = sandbox.job(&format!("output-{is_merged}"));
        if is_merged {
            job["spec"]["output"]["merge"] = json!(true);
        } else {
            job["spec"].as_object_mut().unwrap().remove("loraConfig");
        }
        let ran = sandbox.run(&job).ok();
        let said = format!("{}{}", ran.stdout, ran.stderr);
        assert!(said.contains("answers end with \"<|im_end|>\" (token 257)"), "{said}");
        assert!(said.contains("model.safetensors is used, as in transformers"), "{said}");
        let path = sandbox.path(&format!("output-{is_merged}/generation_config.json"));
        let config: serde_json::Value =
            serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
        assert_eq!(config["eos_token_id"], json!([256, 257]));
        sandbox.finetune(&["verify", &sandbox.uri(&format!("output-{is_merged}"))]).ok();
    }
}

/// A template of one's own, whose turns end with a token that the model does not have.
#[test]
fn tokens_are_added_to_a_model_and_trained() {
    let Some(sandbox) = Sandbox::new() else { return };
    sandbox.write("chat.jsonl", "{\"messages\": [{\"role\": \"user\", \"content\": \"hi\"}, {\"role\": \"assistant\", \"content\": \"yes\"}]}\n{\"messages\": [{\"role\": \"user\", \"content\": \"ho\"}, {\"role\": \"assistant\", \"content\": \"no\"}]}\n");
    let mut job = sandbox.job("adapter");
    job["spec"]["model"]["addedTokens"] =
        json!(["<|user|>", "<|bot|>", "<|1|>", "<|2|>", "<|3|>", "<|4|>", "<|5|>", "<|over|>",]);
    job["spec"]["dataset"] = json!({
        "train": sandbox.uri("chat.jsonl"),
        "chatTemplate": "{% for m in messages %}<|{{ 'bot' if m.role == 'assistant' else m.role }}|>{{ m.content }}<|over|>{% endfor %}{% if add_generation_prompt %}<|bot|>{% endif %}",
    });
    let refused = sandbox.run(&job);
    insta::assert_snapshot!(sandbox.shown(&refused), @r#"
exit 78
error: the run cannot start:
  spec.model.addedTokens: adds 8 tokens whose embeddings would not be trained: add embed_tokens and lm_head to loraConfig.modulesToSave, or remove loraConfig to train every parameter
"#);
    job["spec"]["loraConfig"]["modulesToSave"] = json!(["embed_tokens", "lm_head"]);
    let planned = sandbox.run(&job).ok();
    let said = planned.stdout.lines().chain(planned.stderr.lines());
    let of_tokens: Vec<&str> = said.filter(|line| line.contains("addedTokens")).collect();
    insta::assert_snapshot!(of_tokens.join("\n"), @"  addedTokens                8               new to the tokenizer: their rows start as the mean of all; the vocabulary has 266 rows with them");
    sandbox.published("adapter");
    sandbox.finetune(&["verify", &sandbox.uri("adapter")]).ok();
    // The adapter says itself which tokens its base model needs.
    let prompt = ["--prompt", "hi", "--max-new-tokens", "4"];
    sandbox
        .finetune(
            &[&["generate", "--model", "model", "--adapter", "adapter"], &prompt[..]].concat(),
        )
        .ok();
    let card = fs::read_to_string(sandbox.path("adapter/README.md")).unwrap();
    assert!(card.contains("base.resize_token_embeddings("), "{card}");

    // In full, generation stops where the turns end.
    job["spec"].as_object_mut().unwrap().remove("loraConfig");
    job["spec"]["output"] = json!({"uri": sandbox.uri("model-with-tokens")});
    sandbox.run(&job).ok();
    let read = |name: &str| -> serde_json::Value {
        let path = sandbox.path("model-with-tokens").join(name);
        serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
    };
    let over =
        read("tokenizer.json")["added_tokens"].as_array().unwrap().last().unwrap()["id"].clone();
    assert_eq!(
        read("generation_config.json")["eos_token_id"].as_array().unwrap().last(),
        Some(&over)
    );
    assert_eq!(read("config.json")["vocab_size"].as_u64(), over.as_u64().map(|last| last + 1));
    sandbox.finetune(&["verify", &sandbox.uri("model-with-tokens")]).ok();

    // What has the tokens is trained further with the same list, and nothing is new.
    job["spec"]["model"]["uri"] = json!(sandbox.uri("model-with-tokens"));
    job["spec"]["loraConfig"] = json!({"r": 4});
    job["spec"]["output"] = json!({"uri": sandbox.uri("further")});
    sandbox.run(&job).ok();
}

#[test]
fn an_output_of_another_run_is_replaced_only_when_told() {
    let Some(sandbox) = Sandbox::new() else { return };
    let mut job = sandbox.job("output");
    sandbox.run(&job).ok();
    let first = sandbox.published("output");
    job["spec"]["training"]["seed"] = json!(7);
    let shown = sandbox.shown(&sandbox.run(&job));
    assert!(
        shown.starts_with("exit 78\n") && shown.contains("made with other settings"),
        "{shown}"
    );
    assert_eq!(sandbox.published("output"), first);
    job["spec"]["output"]["overwrite"] = json!(true);
    sandbox.run(&job).ok();
    let second = sandbox.published("output");
    assert_ne!(second.files, first.files);
    sandbox.finetune(&["verify", &sandbox.uri("output")]).ok();
}

#[test]
fn patience_ends_a_run_and_publishes_its_best() {
    let Some(sandbox) = Sandbox::new() else { return };
    // Answers that contradict those trained on: learning soon makes them less likely.
    let unlike = rows(0..6).replace("= ", "~ ~");
    sandbox.write("validation.jsonl", &unlike);
    let mut job = sandbox.job("output");
    job["spec"]["dataset"]["validation"] = json!(sandbox.uri("validation.jsonl"));
    let training = job["spec"]["training"].as_object_mut().unwrap();
    training.insert("maxSteps".to_owned(), json!(400));
    training.insert("evaluationSteps".to_owned(), json!(5));
    training.insert("earlyStoppingPatience".to_owned(), json!(2));
    sandbox.run(&job).ok();
    let report = sandbox.report(&job);
    let best = report.best_step.unwrap();
    assert!(report.steps < 400);
    assert_eq!(report.steps, best + 10, "two evaluations after the best");
    assert_eq!(sandbox.published("output").step, best);
}

#[test]
fn rows_may_have_a_sequence_each() {
    let Some(sandbox) = Sandbox::new() else { return };
    let mut job = sandbox.job("output");
    let training = job["spec"]["training"].as_object_mut().unwrap();
    training.remove("maxSteps");
    training.insert("numEpochs".to_owned(), json!(2));
    training.insert("packing".to_owned(), json!(false));
    sandbox.run(&job).ok();
    assert_eq!(sandbox.report(&job).steps, 6, "12 rows × 2 epochs / 4 rows a step");
    sandbox.published("output");
}

/// Three conversations of two answers each, thoughts of all but the last left out, each read twice.
#[test]
fn a_conversation_that_becomes_several_rows_is_repeated_as_a_whole() {
    let Some(sandbox) = Sandbox::new() else { return };
    let talk = |number: u32| {
        let turn = |role: &str, content: String| json!({"role": role, "content": content});
        json!({"messages": [
            turn("user", format!("{number}?")), turn("assistant", format!("<think>a{number}</think>yes")),
            turn("user", "sure?".to_owned()), turn("assistant", "<think>b</think>no".to_owned()),
        ]})
    };
    sandbox.write("talks.jsonl", &lines((0..3).map(talk)));
    let mut job = sandbox.job("output");
    job["spec"]["dataset"] = json!({
        "sources": [{"uri": sandbox.uri("talks.jsonl"), "weight": 2}],
        "chatTemplate": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    });
    job["spec"]["training"]["packing"] = json!(false);
    let planned = sandbox.planned(&job, 1);
    assert_eq!(planned.expected.sequences, 3 * 2 * 2);
    sandbox.run(&job).ok();
}

#[test]
fn rows_too_long_are_dropped_when_told() {
    let Some(sandbox) = Sandbox::new() else { return };
    let long = json!({"text": "x".repeat(300)});
    let text = format!("{{\"text\": \"short\"}}\n{long}\n{{\"text\": \"brief\"}}\n");
    sandbox.write("train.jsonl", &text);
    let mut job = sandbox.job("output");
    job["spec"]["dataset"]["onOverflow"] = json!("drop");
    job["spec"]["training"]["packing"] = json!(false);
    sandbox.run(&job).ok();
    let config = fs::read_to_string(sandbox.work_dir(&job).join("train-config.json")).unwrap();
    let config: finetune_contract::RunConfig = finetune_contract::parse(&config).unwrap();
    assert_eq!(config.expected.sequences, 2);
}

#[test]
fn a_published_adapter_is_trained_further() {
    let Some(sandbox) = Sandbox::new() else { return };
    sandbox.write_rows("validation.jsonl", 20..24);
    let job = |output: &str| {
        let mut job = sandbox.job(output);
        job["spec"]["dataset"]["validation"] = json!(sandbox.uri("validation.jsonl"));
        job
    };
    let first = job("first");
    sandbox.run(&first).ok();
    let mut second = job("second");
    second["spec"]["initialAdapter"] = json!({"uri": sandbox.uri("first")});
    sandbox.run(&second).ok();
    let [_, published] = sandbox.report(&first).eval_loss.unwrap();
    let [start, _] = sandbox.report(&second).eval_loss.unwrap();
    assert!((start - published).abs() < 1e-6, "{start} {published}");
    sandbox.finetune(&["verify", &sandbox.uri("second")]).ok();

    let mut other = job("other");
    other["spec"]["initialAdapter"] = json!({"uri": sandbox.uri("first")});
    other["spec"]["loraConfig"]["r"] = json!(2);
    insta::assert_snapshot!(sandbox.shown(&sandbox.run(&other)), @r"
    exit 78
    error: the run cannot start:
      spec.loraConfig.r: is 2, but the initial weights have 4: set it to 4
    ");
}

#[test]
fn a_run_whose_time_is_over_publishes_its_best() {
    let Some(sandbox) = Sandbox::new() else { return };
    let mut job = sandbox.job("output");
    job["spec"]["training"]["maxSteps"] = json!(1_000_000);
    job["spec"]["training"]["maxTimeSeconds"] = json!(1);
    let ran = sandbox.run(&job).ok();
    assert!(ran.stdout.contains("ended early by training.maxTimeSeconds"), "{}", ran.stdout);
    let steps = sandbox.report(&job).steps;
    assert!((1..1_000_000).contains(&steps));
    assert_eq!(sandbox.published("output").step, steps);
}
