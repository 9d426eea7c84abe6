//! Tests of whole preflights on a tiny model, each with one mistake.

use std::{collections::BTreeMap, fs, path::Path};

use finetune_contract::{
    CONTRACT_VERSION, DatasetFormat, DatasetSource, LoraSettings, ModelSource, ModuleNames,
    ObjectUri, OnInvalidRow, OnOverflow, OutputTarget, PreflightConfig, PreflightReport, RowSource,
    RunId, TERMINATION_MESSAGE_LIMIT, TargetModules, render, testing::file_uri,
};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;

use crate::{
    architecture::config::ModelConfig,
    data::chat::goldens::{CHATML, tokenizer_json},
    lora::{config, trainable::Trainable},
    preflight::run,
    store::Environment,
};

/// A directory with a valid model and valid rows.
struct Fixture {
    directory: tempfile::TempDir,
    config: PreflightConfig,
}

impl Fixture {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| file_uri(&directory.path().join(name));
        let config = PreflightConfig::of(
            RunId("run-1".to_owned()),
            ModelSource::of(at("model")),
            DatasetSource::of(at("train.jsonl")),
            OutputTarget::of(at("output")),
        );
        let fixture = Self { directory, config };
        fs::create_dir(fixture.path("model")).unwrap();
        let model = json!({
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 320,
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": true,
        });
        fixture.write("model/config.json", &model.to_string());
        fixture.write("model/tokenizer.json", &tokenizer_json("<s>", "<|im_end|>").to_string());
        let settings =
            json!({"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": CHATML});
        fixture.write("model/tokenizer_config.json", &settings.to_string());
        fixture.write_weights(|_| {});
        fixture.write("train.jsonl", "{\"text\": \"one\"}\n{\"text\": \"two\"}\n");
        fixture
    }

    fn at(&self, name: &str) -> ObjectUri {
        file_uri(&self.path(name))
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.directory.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    /// Writes zeros of the shapes of config.json, after `change`.
    fn write_weights(&self, change: impl FnOnce(&mut BTreeMap<String, Vec<usize>>)) {
        let text = fs::read_to_string(self.path("model/config.json")).unwrap();
        let tensors = ModelConfig::parse(&text).unwrap().tensors();
        let mut shapes: BTreeMap<_, _> =
            tensors.into_iter().map(|tensor| (tensor.name, tensor.shape)).collect();
        change(&mut shapes);
        let zeros = vec![0; 2 * 320 * 64];
        let views = shapes.iter().map(|(name, shape)| {
            let bytes = 2 * shape.iter().product::<usize>();
            (name, TensorView::new(Dtype::BF16, shape.clone(), &zeros[..bytes]).unwrap())
        });
        let path = self.path("model/model.safetensors");
        fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
    }

    /// Writes the weights of config.json and a head, all bytes of which are `head`.
    fn write_head(&self, dtype: Dtype, head: u8) {
        let text = fs::read_to_string(self.path("model/config.json")).unwrap();
        let tensors = ModelConfig::parse(&text).unwrap().tensors();
        let width = if dtype == Dtype::F32 { 4 } else { 2 };
        let (zeros, other) = (vec![0; 2 * 320 * 64], vec![head; 320 * 16 * width]);
        let mut views: Vec<(String, TensorView<'_>)> = tensors
            .into_iter()
            .map(|tensor| {
                let bytes = 2 * tensor.shape.iter().product::<usize>();
                let view = TensorView::new(Dtype::BF16, tensor.shape, &zeros[..bytes]).unwrap();
                (tensor.name, view)
            })
            .collect();
        let view = TensorView::new(dtype, vec![320, 16], &other).unwrap();
        views.push(("lm_head.weight".to_owned(), view));
        let path = self.path("model/model.safetensors");
        fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
    }

    fn with_lora(mut self, change: impl FnOnce(&mut LoraSettings)) -> Self {
        let mut lora = LoraSettings {
            r: 8,
            lora_alpha: 16.0,
            lora_dropout: 0.0,
            target_modules: TargetModules::AllLinear,
            modules_to_save: Vec::new(),
            exclude_modules: None,
            layers_to_transform: Vec::new(),
            use_rslora: false,
        };
        change(&mut lora);
        self.config.lora = Some(lora);
        self
    }

    fn report(&self) -> PreflightReport {
        let work_dir = self.path("work");
        fs::create_dir_all(&work_dir).unwrap();
        run(&self.config, &Environment::default(), &work_dir).fit()
    }

    /// Formats problems and warnings, one per line.
    fn check(&self) -> String {
        let report = self.report();
        assert!(render(&report).len() <= TERMINATION_MESSAGE_LIMIT);
        let problems =
            report.problems.iter().map(|problem| format!("{:?} {problem}", problem.reason));
        let warnings = report.warnings.iter().map(|warning| format!("warning: {warning}"));
        let text = problems.chain(warnings).collect::<Vec<_>>().join("\n");
        text.replace(&Path::new(self.directory.path()).display().to_string(), "")
    }
}

#[test]
fn a_run_that_can_work_has_no_problems() {
    let fixture = Fixture::new();
    assert_eq!(fixture.check(), "");
    let report = fixture.report();
    let model = report.model.unwrap();
    assert_eq!((model.weight_dtype.as_str(), model.vocab_size), ("BF16", 320));
    let train = report.train.unwrap();
    // BOS, three bytes and EOS each; BOS is never predicted.
    assert_eq!((train.rows, train.tokens, train.target_tokens), (2, 10, 8));
}

#[test]
fn reports_missing_files_of_a_model() {
    for (file, wanted) in [
        ("config.json", "has no config.json"),
        ("tokenizer.json", "tokenizer.json"),
        ("model.safetensors", "has neither model.safetensors"),
    ] {
        let fixture = Fixture::new();
        fs::remove_file(fixture.path("model").join(file)).unwrap();
        let found = fixture.check();
        assert!(found.contains(wanted), "{file}: {found}");
    }
}

#[test]
fn refuses_weights_that_can_run_code() {
    let fixture = Fixture::new();
    let model = fixture.path("model");
    fs::rename(model.join("model.safetensors"), model.join("pytorch_model.bin")).unwrap();
    insta::assert_snapshot!(fixture.check(), @"InvalidModel spec.model.uri: the weights are a pickle (pytorch_model.bin), which can execute any code when loaded: convert them with transformers' save_pretrained, which writes safetensors");
}

#[test]
fn refuses_weights_that_do_not_fit_the_config() {
    let fixture = Fixture::new();
    fixture.write_weights(|shapes| {
        shapes.remove("model.norm.weight");
        shapes.insert("model.embed_tokens.weight".to_owned(), vec![300, 16]);
        shapes.insert("model.layers.0.self_attn.q_proj.bias".to_owned(), vec![16]);
        shapes.insert("model.layers.0.self_attn.rotary_emb.inv_freq".to_owned(), vec![4]);
    });
    insta::assert_snapshot!(fixture.check(), @"
        InvalidModel spec.model.uri: the weights have model.layers.0.self_attn.q_proj.bias, which a model with this config.json does not use: its output would be wrong
        InvalidModel spec.model.uri: the weights lack model.norm.weight: they do not belong to this config.json
        InvalidModel spec.model.uri: the weights do not fit config.json: model.embed_tokens.weight is [300, 16], not [320, 16]
        ");
}

#[test]
fn refuses_truncated_weights() {
    let fixture = Fixture::new();
    let path = fixture.path("model/model.safetensors");
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 10]).unwrap();
    let found = fixture.check();
    assert!(found.contains("InvalidModel") && found.contains("it is truncated"), "{found}");
}

#[test]
fn refuses_an_index_that_names_a_missing_shard() {
    let fixture = Fixture::new();
    let index = json!({"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}});
    fixture.write("model/model.safetensors.index.json", &index.to_string());
    fs::remove_file(fixture.path("model/model.safetensors")).unwrap();
    insta::assert_snapshot!(fixture.check(), @r#"InvalidModel spec.model.uri: model.safetensors.index.json lists "model-00001-of-00002.safetensors", which does not exist"#);
}

#[test]
fn refuses_an_unknown_architecture() {
    let fixture = Fixture::new();
    fixture.write("model/config.json", r#"{"model_type": "gpt2"}"#);
    let found = fixture.check();
    let expected = r#"UnsupportedModel spec.model.uri: config.json says model_type "gpt2", which this trainer does not know: use a model of type llama, "#;
    assert!(found.starts_with(expected), "{found}");
}

#[test]
fn requires_a_chat_template_for_conversations() {
    let fixture = Fixture::new();
    fixture.write("model/tokenizer_config.json", "{}");
    fixture.write("train.jsonl", r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#);
    insta::assert_snapshot!(fixture.check(), @"InvalidDataset train.jsonl:1: the model has no chat template, so a conversation cannot be rendered: set dataset.chatTemplate (to chatml, alpaca, vicuna, a template's text or its URI), use an instruction-tuned model, or give rows of prompt and completion");
}

#[test]
fn requires_a_tokenizer_that_fits_the_model() {
    let mut fixture = Fixture::new();
    // Reported once, although it affects both splits.
    fixture.write("valid.jsonl", "{\"text\": \"three\"}\n");
    fixture.config.dataset.validation = Some(fixture.at("valid.jsonl"));
    let config = fs::read_to_string(fixture.path("model/config.json")).unwrap();
    fixture.write("model/config.json", &config.replace("320", "258"));
    fixture.write_weights(|_| {});
    insta::assert_snapshot!(fixture.check(), @"InvalidTokenizer spec.model.uri: the tokenizer produces token 259, but the embedding of the model has only 258 rows: tokenizer and model do not belong together");
}

/// A token that the tokenizer has but the embedding lacks is a problem only if a row contains it.
#[test]
fn a_token_beyond_the_embedding_is_refused_where_it_occurs() {
    let mut fixture = Fixture::new();
    let config = fs::read_to_string(fixture.path("model/config.json")).unwrap();
    fixture.write("model/config.json", &config.replace("320", "260"));
    fixture.write_weights(|_| {});
    assert_eq!(fixture.check(), "");
    fixture.write("valid.jsonl", "{\"text\": \"<|eot_id|>\"}\n");
    fixture.config.dataset.validation = Some(fixture.at("valid.jsonl"));
    insta::assert_snapshot!(fixture.check(), @"InvalidTokenizer spec.model.uri: the tokenizer produces token 263, but the embedding of the model has only 260 rows: tokenizer and model do not belong together");
    fixture.config.dataset.validation = None;
    fixture.write("train.jsonl", "{\"text\": \"one\"}\n{\"text\": \"<|eot_id|>\"}\n");
    insta::assert_snapshot!(fixture.check(), @"InvalidTokenizer spec.model.uri: the tokenizer produces token 263, but the embedding of the model has only 260 rows: tokenizer and model do not belong together");
    // The same for a token that is only declared and gets the next id.
    fixture.write("model/config.json", &config.replace("320", "264"));
    fixture.write_weights(|_| {});
    assert_eq!(fixture.check(), "");
    fixture
        .write("model/tokenizer_config.json", r#"{"bos_token": "<s>", "eos_token": "<|done|>"}"#);
    insta::assert_snapshot!(fixture.check(), @"InvalidTokenizer spec.model.uri: the tokenizer produces token 264, but the embedding of the model has only 264 rows: tokenizer and model do not belong together");
}

#[test]
fn counts_all_bad_lines_and_shows_the_first() {
    let fixture = Fixture::new();
    fixture.write("train.jsonl", &format!("{{\"text\": \"a\"}}\n{}", "{\"txt\": 1}\n".repeat(500)));
    let report = fixture.report();
    assert_eq!(report.problems_total, 500);
    insta::assert_snapshot!(report.problems[0], @r#"train.jsonl:2: "text" is missing (did you mean "text" instead of "txt"?) (500 rows; the next are train.jsonl:3, train.jsonl:4, train.jsonl:5, …)"#);
    assert!(render(&report).len() <= TERMINATION_MESSAGE_LIMIT);
}

#[test]
fn refuses_rows_of_mixed_formats() {
    let fixture = Fixture::new();
    fixture.write("train.jsonl", "{\"text\": \"a\"}\n{\"prompt\": \"a\", \"completion\": \"b\"}\n");
    insta::assert_snapshot!(fixture.check(), @r#"InvalidDataset train.jsonl:2: "text" is missing"#);
}

/// The report names the actual mistake and does not suggest a longer context.
#[test]
fn invalid_rows_are_not_reported_as_too_long() {
    let check = |text: &str, on_invalid_row| {
        let mut fixture = Fixture::new();
        fixture.config.context_length = Some(32);
        fixture.config.dataset.on_invalid_row = on_invalid_row;
        fixture.write("train.jsonl", text);
        fixture.check()
    };
    insta::assert_snapshot!(check("{\"message\": []}\n", OnInvalidRow::Error), @r#"InvalidDataset train.jsonl:1: the row has the keys "message", none of which is "messages", "conversations", "prompt", "instruction", "text" (did you mean "messages" instead of "message"?)"#);
    insta::assert_snapshot!(check(&"{\"message\": []}\n".repeat(3), OnInvalidRow::Error), @r#"InvalidDataset train.jsonl:1: the row has the keys "message", none of which is "messages", "conversations", "prompt", "instruction", "text" (did you mean "messages" instead of "message"?) (3 rows; the next are train.jsonl:2, train.jsonl:3)"#);
    insta::assert_snapshot!(check("", OnInvalidRow::Error), @"NothingToTrain spec.dataset.train: the dataset has no rows");
    insta::assert_snapshot!(check("[]", OnInvalidRow::Error), @"NothingToTrain spec.dataset.train: the dataset has no rows");
    insta::assert_snapshot!(check("{\"text\": 1}\n", OnInvalidRow::Drop), @r#"
InvalidDataset spec.dataset.train: 1 of 1 rows cannot be used, but dataset.onInvalidRow: drop leaves out at most 10 %: fix the rows
InvalidDataset train.jsonl:1: "text" is 1, but it must be a string
"#);
}

#[test]
fn warns_if_generation_does_not_stop_at_the_end_of_a_turn() {
    let fixture = Fixture::new();
    fixture.write("model/generation_config.json", r#"{"eos_token_id": 258}"#);
    fixture.write("train.jsonl", r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#);
    insta::assert_snapshot!(fixture.check(), @r#"warning: spec.dataset.train: answers end with "<|im_end|>" (token 259), but generation stops at "<s>": for a full-parameter or merged result, 259 will be added to eos_token_id in its generation_config.json; to serve an adapter, add it to generation_config.json of the base model or set it as a stop token"#);
}

#[test]
fn a_printed_date_is_a_warning_and_reported() {
    let mut fixture = Fixture::new();
    let settings = json!({
        "bos_token": "<s>", "eos_token": "<|im_end|>",
        "chat_template": "{% set day = strftime_now('%d %b %Y') %}{% if messages[0].role != 'system' %}{{ day }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
    });
    fixture.write("model/tokenizer_config.json", &settings.to_string());
    let turns = r#"{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#;
    let with_system = format!(r#"{{"messages": [{{"role": "system", "content": "c"}}, {turns}"#);
    fixture.write("train.jsonl", &with_system);
    assert_eq!((fixture.check(), fixture.report().template_date), (String::new(), None));
    fixture.write("train.jsonl", &format!("{with_system}\n{{\"messages\": [{turns}\n"));
    let today = crate::runtime::clock::today().to_string();
    assert_eq!(
        fixture.check(),
        format!(
            "warning: spec.dataset: the chat template prints the current date, {today}, into every row: set dataset.templateDate to get the same text on another day"
        )
    );
    assert_eq!(fixture.report().template_date, Some(today));
    fixture.config.dataset.rendering.template_date = Some("2026-01-31".to_owned());
    let report = fixture.report();
    assert_eq!(
        (fixture.check(), report.template_date.as_deref()),
        (String::new(), Some("2026-01-31"))
    );
}

#[test]
fn refuses_an_empty_dataset() {
    let fixture = Fixture::new();
    fixture.write("train.jsonl", "\n\n");
    insta::assert_snapshot!(fixture.check(), @"NothingToTrain spec.dataset.train: the dataset has no rows");
}

#[test]
fn reports_how_many_tokens_would_be_cut() {
    let mut fixture = Fixture::new();
    fixture.config.context_length = Some(8);
    fixture.write("train.jsonl", "{\"text\": \"short\"}\n{\"text\": \"rather long\"}\n");
    insta::assert_snapshot!(fixture.check(), @"warning: spec.dataset.train: 1 of 2 rows have more than 8 tokens (the longest 13); 5 tokens would be cut");
    fixture.config.dataset.on_overflow = OnOverflow::Error;
    insta::assert_snapshot!(fixture.check(), @"Overflow spec.dataset.train: 1 of 2 rows have more than 8 tokens (the longest 13); 5 tokens would be cut: raise training.contextLength, or set dataset.onOverflow to truncate or drop");
    fixture.config.context_length = Some(3);
    fixture.config.dataset.on_overflow = OnOverflow::Drop;
    insta::assert_snapshot!(fixture.check(), @"NothingToTrain spec.dataset.train: 2 of 2 rows have more than 3 tokens (the longest 13); 14 tokens would be cut, and every row would be dropped: raise training.contextLength");
    fixture.config.context_length = Some(65);
    insta::assert_snapshot!(fixture.check(), @"InvalidSpec spec.training.contextLength: contextLength is 65, but the model supports at most 64 positions: set it to 64 or less");
}

#[test]
fn refuses_rows_whose_answers_are_all_cut_off() {
    let mut fixture = Fixture::new();
    fixture.config.context_length = Some(4);
    fixture.write("train.jsonl", r#"{"messages": [{"role": "user", "content": "aaaa"}, {"role": "assistant", "content": "b"}]}"#);
    insta::assert_snapshot!(fixture.check(), @"NothingToTrain spec.dataset.train: 1 of 1 rows have more than 4 tokens (the longest 43); 39 tokens would be cut, which leaves no row with a token to train on: raise training.contextLength");
}

#[test]
fn reports_how_many_rows_truncation_would_leave_out() {
    let mut fixture = Fixture::new();
    fixture.config.context_length = Some(42);
    let row = |question: &str| {
        format!(
            "{{\"messages\": [{{\"role\": \"user\", \"content\": \"{question}\"}}, {{\"role\": \"assistant\", \"content\": \"b\"}}]}}\n"
        )
    };
    fixture.write("train.jsonl", &(row("a") + &row("a rather long question") + &row("short")));
    insta::assert_snapshot!(fixture.check(), @"warning: spec.dataset.train: 2 of 3 rows have more than 42 tokens (the longest 61); 21 tokens would be cut, and 1 of these rows would have no token left to train on and be left out");
}

#[test]
fn warns_about_duplicate_rows() {
    let mut fixture = Fixture::new();
    fixture.write("train.jsonl", "{\"text\": \"a\"}\n{\"text\": \"b\"}\n{\"text\": \"a\"}\n");
    fixture.write("valid.jsonl", "{\"text\": \"b\"}\n{\"text\": \"c\"}\n");
    fixture.config.dataset.validation = Some(fixture.at("valid.jsonl"));
    insta::assert_snapshot!(fixture.check(), @"
        warning: spec.dataset.train: 1 of 3 rows repeat an earlier row
        warning: spec.dataset.validation: 1 of 2 validation rows are also training rows: the validation loss will be too low
        ");
}

#[test]
fn checks_the_adapter_against_the_model() {
    let check = |change: fn(&mut LoraSettings)| Fixture::new().with_lora(change).check();
    insta::assert_snapshot!(check(|lora| lora.r = 9), @r#"InvalidSpec spec.loraConfig.r: loraConfig.r is 9, larger than "model.layers.0.self_attn.k_proj" (8 x 16): use at most 8"#);
    insta::assert_snapshot!(check(|lora| lora.target_modules = TargetModules::List(vec!["q_porj".to_owned()])), @r#"InvalidSpec spec.loraConfig.targetModules: loraConfig.targetModules has "q_porj", which matches no module of this model: use down_proj, embed_tokens, gate_proj, input_layernorm, k_proj, lm_head, norm, o_proj, post_attention_layernorm, q_proj, up_proj, v_proj (did you mean "q_proj"?)"#);
    insta::assert_snapshot!(check(|lora| lora.modules_to_save = vec!["head".to_owned()]), @r#"InvalidSpec spec.loraConfig.modulesToSave: loraConfig.modulesToSave has "head", which matches no module of this model: use down_proj, embed_tokens, gate_proj, input_layernorm, k_proj, lm_head, norm, o_proj, post_attention_layernorm, q_proj, up_proj, v_proj"#);
    insta::assert_snapshot!(check(|lora| lora.modules_to_save = vec!["lm_head".to_owned()]), @"warning: spec.loraConfig.modulesToSave: vLLM rejects adapters with modulesToSave: set output.merge to true to serve the merged model");
    insta::assert_snapshot!(check(|lora| lora.target_modules = TargetModules::List(vec!["embed_tokens".to_owned()])), @"warning: spec.loraConfig.targetModules: vLLM does not serve adapters on embed_tokens of every model: set output.merge to true to serve the merged model");
}

#[test]
fn reports_all_mistakes_at_once() {
    let mut fixture = Fixture::new();
    fixture.config.output.uri = fixture.at("model/out");
    fixture.config.dataset.train = Some(fixture.at("train.jsonl.missing"));
    insta::assert_snapshot!(fixture.check(), @r#"
        NotFound spec.dataset.train: nothing is at file:///train.jsonl.missing
        InvalidSpec spec.output.uri: "file:///model/out" lies inside spec.model.uri (file:///model): the output must not be an input, inside one, or a parent of one, with or without output.overwrite; choose another output.uri
        "#);
}

#[test]
fn the_weights_decide_whether_the_head_is_tied() {
    let check = |dtype, head| {
        let fixture = Fixture::new();
        fixture.write_head(dtype, head);
        let messages = fixture.check();
        let model = fixture.report().model.unwrap();
        let heads = model.modules.iter().filter(|module| module.name == "lm_head").count();
        assert_eq!(heads == 1, !model.tie_word_embeddings);
        (model.tie_word_embeddings, messages)
    };
    assert_eq!(check(Dtype::BF16, 0), (true, String::new()));
    let (is_tied, messages) = check(Dtype::BF16, 1);
    insta::assert_snapshot!(messages, @"warning: spec.model.uri: config.json says tie_word_embeddings: true, but the weights have an lm_head.weight that differs from model.embed_tokens.weight: the head of the weights is used, as transformers 5 does, and a published model says tie_word_embeddings: false");
    assert!(!is_tied);
    assert!(!check(Dtype::F32, 0).0);
    // If the config does not tie them, there is no warning.
    let fixture = Fixture::new();
    let text = fs::read_to_string(fixture.path("model/config.json")).unwrap();
    fixture.write_head(Dtype::BF16, 1);
    let untied = text.replace("\"tie_word_embeddings\":true", "\"tie_word_embeddings\":false");
    fixture.write("model/config.json", &untied);
    assert_eq!(fixture.check(), "");
}

#[test]
fn a_single_file_takes_precedence_over_an_index() {
    let fixture = Fixture::new();
    let index = json!({"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}});
    fixture.write("model/model.safetensors.index.json", &index.to_string());
    insta::assert_snapshot!(fixture.check(), @"warning: spec.model.uri: both model.safetensors and model.safetensors.index.json exist: model.safetensors is used, as in transformers (vLLM uses the index); remove the stale one");
    // A tensor of two shards.
    let single = fixture.path("model/model.safetensors");
    for shard in ["a.safetensors", "b.safetensors"] {
        fs::copy(&single, fixture.path(&format!("model/{shard}"))).unwrap();
    }
    fs::remove_file(single).unwrap();
    let map =
        json!({"model.norm.weight": "a.safetensors", "model.embed_tokens.weight": "b.safetensors"});
    let index = json!({ "weight_map": map });
    fixture.write("model/model.safetensors.index.json", &index.to_string());
    insta::assert_snapshot!(fixture.check(), @"InvalidModel spec.model.uri: model.embed_tokens.weight is in both a.safetensors and b.safetensors: remove one of them");
}

#[test]
fn reports_the_modules_of_the_adapter() {
    let report = |change: fn(&mut LoraSettings)| {
        let lora = Fixture::new().with_lora(change).report().lora.unwrap();
        let list = |modules: &[finetune_contract::ModuleShape]| {
            let one = |module: &finetune_contract::ModuleShape| {
                format!("{} {}x{}", module.name, module.out_features, module.in_features)
            };
            modules.iter().map(one).collect::<Vec<_>>().join(", ")
        };
        format!("{} | {} | {}", list(&lora.targets), list(&lora.saved), lora.unties)
    };
    let messages = [
        report(|_| {}),
        report(|lora| {
            let nine = [
                "q_proj",
                "k_proj",
                "v_proj",
                "o_proj",
                "gate_proj",
                "up_proj",
                "down_proj",
                "embed_tokens",
                "lm_head",
            ];
            lora.target_modules = TargetModules::List(nine.map(str::to_owned).to_vec());
        }),
        report(|lora| {
            let names = ["self_attn.q_proj", "lm_head"].map(str::to_owned);
            lora.target_modules = TargetModules::List(names.to_vec());
            lora.modules_to_save = vec!["lm_head".to_owned(), "model.norm".to_owned()];
        }),
        report(|lora| lora.target_modules = TargetModules::Pattern(r".*\.[qk]_proj".to_owned())),
    ];
    insta::assert_snapshot!(messages.join("\n"), @r"
q_proj 16x16, k_proj 8x16, v_proj 8x16, o_proj 16x16, gate_proj 32x16, up_proj 32x16, down_proj 16x32 |  | false
embed_tokens 320x16, q_proj 16x16, k_proj 8x16, v_proj 8x16, o_proj 16x16, gate_proj 32x16, up_proj 32x16, down_proj 16x32, lm_head 320x16 |  | true
q_proj 16x16 | norm 16x0, lm_head 320x16 | true
q_proj 16x16, k_proj 8x16 |  | false
");
}

#[test]
fn added_tokens_get_rows_that_are_trained() {
    let add_tokens = |tokens: &[&str], mut fixture: Fixture| {
        fixture.config.model.added_tokens = tokens.iter().map(|&token| token.to_owned()).collect();
        fixture
    };
    let facts = |fixture: Fixture| {
        let model = fixture.report().model.unwrap();
        (model.added_tokens, model.vocab_size, model.modules[0].out_features)
    };
    let many: Vec<String> = (0..60).map(|index| format!("<|{index}|>")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    // The tokenizer has 264 tokens, the embedding 320 rows.
    assert_eq!(facts(add_tokens(&["<|a|>", "<|b|>"], Fixture::new())), (2, 320, 320));
    assert_eq!(facts(add_tokens(&many, Fixture::new())), (60, 324, 324));
    // An existing token is not new and needs no training.
    assert_eq!(facts(add_tokens(&["<|im_end|>"], Fixture::new())), (0, 320, 320));

    let saving = |names: &[&str]| {
        let names = names.iter().map(|&name| name.to_owned()).collect();
        let lora = Fixture::new().with_lora(|lora| lora.modules_to_save = names);
        add_tokens(&["<|a|>", "<|b|>"], lora)
    };
    insta::assert_snapshot!(saving(&[]).check(), @"InvalidSpec spec.model.addedTokens: adds 2 tokens whose embeddings would not be trained: add embed_tokens and lm_head to loraConfig.modulesToSave, or remove loraConfig to train every parameter");
    insta::assert_snapshot!(saving(&["embed_tokens"]).check(), @r#"
InvalidSpec spec.model.addedTokens: adds 2 tokens whose embeddings would not be trained: add lm_head to loraConfig.modulesToSave, or remove loraConfig to train every parameter
warning: spec.loraConfig.modulesToSave: vLLM rejects adapters with modulesToSave: set output.merge to true to serve the merged model
"#);
    let problems = saving(&["embed_tokens", "lm_head"]).report().problems;
    assert_eq!(problems, []);
    insta::assert_snapshot!(add_tokens(&["<|im_end|>"], Fixture::new().with_lora(|_| {})).check(), @"");
}

#[test]
fn module_names_that_match_nothing_are_refused() {
    let check = |change: fn(&mut LoraSettings)| Fixture::new().with_lora(change).check();
    let messages = [
        check(|lora| lora.target_modules = TargetModules::Pattern("q_proj".to_owned())),
        check(|lora| lora.target_modules = TargetModules::Pattern("(q_proj".to_owned())),
        check(|lora| lora.target_modules = TargetModules::Pattern(".*self_attn.*".to_owned())),
        check(|lora| lora.target_modules = TargetModules::List(vec!["norm".to_owned()])),
        check(|lora| lora.layers_to_transform = vec![0, 1]),
        check(|lora| {
            lora.target_modules = TargetModules::Pattern(".*q_proj".to_owned());
            lora.layers_to_transform = vec![0];
        }),
        check(|lora| {
            lora.exclude_modules = Some(ModuleNames::List(vec!["lm_head".to_owned()]));
        }),
        check(|lora| lora.exclude_modules = Some(ModuleNames::Pattern(".*".to_owned()))),
    ];
    insta::assert_snapshot!(messages.join("\n"), @r#"
InvalidSpec spec.loraConfig.targetModules: loraConfig.targetModules is the pattern "q_proj", which matches no module: it must match full paths such as "model.layers.0.self_attn.q_proj" and "lm_head"
InvalidSpec spec.loraConfig.targetModules: loraConfig.targetModules is the pattern "(q_proj", which cannot be used as a regular expression: Parsing error at position 15: Opening parenthesis without closing parenthesis
InvalidSpec spec.loraConfig.targetModules: loraConfig.targetModules selects "model.layers.0.self_attn", but only linear layers, embed_tokens and lm_head can have an adapter: name those, or exclude it with excludeModules
InvalidSpec spec.loraConfig.targetModules: loraConfig.targetModules selects "model.norm", but only linear layers, embed_tokens and lm_head can have an adapter: name those, or exclude it with excludeModules
InvalidSpec spec.loraConfig.layersToTransform: loraConfig.layersToTransform has 1, but the model has the layers 0 to 0
InvalidSpec spec.loraConfig.layersToTransform: loraConfig.layersToTransform cannot be combined with a targetModules pattern: put the layers into the pattern
InvalidSpec spec.loraConfig.excludeModules: loraConfig.excludeModules has "lm_head", which excludes none of the modules of targetModules: remove it or correct the name
InvalidSpec spec.loraConfig: loraConfig selects no module: nothing would be trained
"#);
}

/// Writes an adapter of rank 8 on the attention of the model, after `change` of its settings.
fn with_adapter(change: impl FnOnce(&mut serde_json::Value), is_cut: bool) -> Fixture {
    let mut fixture = Fixture::new().with_lora(|_| {});
    fixture.config.initial_adapter = Some(fixture.at("adapter"));
    fs::create_dir(fixture.path("adapter")).unwrap();
    let mut settings = json!({
        "peft_type": "LORA", "r": 8, "lora_alpha": 16, "lora_dropout": 0.1,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    });
    change(&mut settings);
    fixture.write("adapter/adapter_config.json", &settings.to_string());
    let text = fs::read_to_string(fixture.path("model/config.json")).unwrap();
    let model = ModelConfig::parse(&text).unwrap();
    // If the settings cannot be parsed, the weights of the requested settings will do.
    let lora = config::parse(&settings.to_string()).map(|settings| settings.lora);
    let lora = lora.unwrap_or_else(|_| fixture.config.lora.clone().unwrap());
    let attachment = Trainable::lora(&model, &lora).unwrap();
    let zeros = vec![0; 4 * 32 * 8];
    let mut specs = attachment.trained_tensors(&model);
    specs.truncate(specs.len() - usize::from(is_cut));
    let views = specs.iter().map(|spec| {
        let bytes = 4 * spec.shape.iter().product::<usize>();
        let view = TensorView::new(Dtype::F32, spec.shape.clone(), &zeros[..bytes]).unwrap();
        (format!("base_model.model.{}", spec.name), view)
    });
    let path = fixture.path("adapter/adapter_model.safetensors");
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
    fixture
}

#[test]
fn an_initial_adapter_must_have_the_requested_shape() {
    insta::assert_snapshot!(with_adapter(|_| {}, false).check(), @"");
    let other = with_adapter(
        |settings| {
            settings["r"] = json!(4);
            settings["target_modules"] = json!(["q_proj", "v_proj"]);
            settings["lora_alpha"] = json!(32);
        },
        false,
    );
    insta::assert_snapshot!(other.check(), @r"
    InvalidSpec spec.loraConfig.r: is 8, but the initial weights have 4: set it to 4
    InvalidSpec spec.loraConfig.targetModules: is [down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj], but the initial weights have [q_proj, v_proj]: set it to [q_proj, v_proj]
    InvalidSpec spec.loraConfig.loraAlpha: is 16, but the initial weights have 32: set it to 32
    ");
}

#[test]
fn an_initial_checkpoint_must_fit_the_model() {
    let mut fixture = Fixture::new();
    let checkpoint = fixture.path("step-00000006");
    fixture.config.initial_checkpoint = Some(file_uri(&checkpoint));
    insta::assert_snapshot!(fixture.check(), @"NotFound spec.initialCheckpoint.uri: file:///step-00000006 has no checkpoint-manifest.json: name one step of a run, such as OUTPUT.checkpoints/RUN/step-00000600; to start from a published adapter use initialAdapter, from a published model use model.uri");
    fs::create_dir(&checkpoint).unwrap();
    let manifest = |trained: u64| {
        json!({
            "version": CONTRACT_VERSION, "runId": "other", "settingsSha256": "", "trained": trained,
            "state": {
                "step": 6, "tokensSeen": 9, "firstLoss": 2.0, "lastLoss": 1.0, "baseEvalLoss": null,
                "lastEval": null, "best": null, "evaluationsSinceBest": 0,
            },
            "files": [{"size": 1, "sha256": ""}],
        })
    };
    let text = fs::read_to_string(fixture.path("model/config.json")).unwrap();
    let parameters = ModelConfig::parse(&text).unwrap().parameters();
    fixture.write("step-00000006/state.safetensors", "7");
    fixture.write("step-00000006/checkpoint-manifest.json", &manifest(parameters).to_string());
    insta::assert_snapshot!(fixture.check(), @"");
    fixture.write("step-00000006/checkpoint-manifest.json", &manifest(7).to_string());
    insta::assert_snapshot!(fixture.check(), @"InvalidSpec spec.initialCheckpoint.uri: has 7 trained parameters, but this model and loraConfig have 7472: it belongs to another model");
    fixture.write("step-00000006/checkpoint-manifest.json", "{}");
    insta::assert_snapshot!(fixture.check(), @"InvalidModel spec.initialCheckpoint.uri: file:///step-00000006 cannot be used: checkpoint manifest is not valid: the field `version` is missing; name another step");
    // A file is truncated.
    fixture.write("step-00000006/checkpoint-manifest.json", &manifest(parameters).to_string());
    fixture.write("step-00000006/state.safetensors", "");
    insta::assert_snapshot!(fixture.check(), @"InvalidModel spec.initialCheckpoint.uri: file:///step-00000006 cannot be used: state.safetensors is missing or truncated; name another step");
    let adapter = fixture.with_lora(|_| {});
    adapter.write("step-00000006/checkpoint-manifest.json", &manifest(parameters).to_string());
    insta::assert_snapshot!(adapter.check(), @r#"
    InvalidSpec spec.initialCheckpoint.uri: belongs to a full-parameter run: remove loraConfig to continue it
    InvalidModel spec.initialCheckpoint.uri: file:///step-00000006 cannot be used: state.safetensors is missing or truncated; name another step
    "#);
}

#[test]
fn a_damaged_or_missing_initial_adapter_is_reported() {
    insta::assert_snapshot!(with_adapter(|_| {}, true).check(), @"InvalidModel spec.initialAdapter.uri: the adapter's weights lack base_model.model.model.layers.0.mlp.down_proj.lora_B.weight: it belongs to another model, or is damaged");
    let other = with_adapter(|settings| settings["peft_type"] = json!("IA3"), false);
    insta::assert_snapshot!(other.check(), @r#"InvalidModel file:///adapter/adapter_config.json: peft_type is "IA3", but only LORA adapters can be loaded"#);
    let gone = with_adapter(|_| {}, false);
    fs::remove_file(gone.path("adapter/adapter_model.safetensors")).unwrap();
    insta::assert_snapshot!(gone.check(), @"NotFound spec.initialAdapter.uri: file:///adapter lacks adapter_config.json or adapter_model.safetensors: give the directory of a LoRA adapter (of a merged result its subdirectory adapter/); to continue from a full-parameter result, set it as model.uri");
}

#[test]
fn rows_with_the_same_error_are_one_problem() {
    let fixture = Fixture::new();
    let text =
        "{\"text\": \"a\"}\n{\"text\": \"b\", \"why\": \"c\"}\n{\"text\": 1}\n{\"text\": 2}\n";
    fixture.write("train.jsonl", &text.repeat(3));
    insta::assert_snapshot!(fixture.check(), @r#"
InvalidDataset train.jsonl:2: the key "why" is unknown, so its content would be lost: remove it, or list it in dataset.ignoredKeys if it need not be trained on (3 rows; the next are train.jsonl:6, train.jsonl:10)
InvalidDataset train.jsonl:3: "text" is 1, but it must be a string (6 rows; the next are train.jsonl:4, train.jsonl:7, train.jsonl:8, …)
warning: spec.dataset.train: 2 of 3 rows repeat an earlier row
"#);
    assert_eq!(fixture.report().problems_total, 9);
}

#[test]
fn a_few_invalid_rows_are_left_out_if_requested() {
    let mut fixture = Fixture::new();
    fixture.config.dataset.on_invalid_row = OnInvalidRow::Drop;
    fixture.write("train.jsonl", &("{\"text\": \"a\"}\n".repeat(9) + "{\"text\": \"\"}\n"));
    let bad = fixture.report().train.unwrap().bad_rows;
    assert_eq!(bad, 1);
    insta::assert_snapshot!(fixture.check(), @r#"
warning: train.jsonl:10: left out: "text" is empty
warning: spec.dataset.train: 8 of 9 rows repeat an earlier row
"#);
    fixture.write("train.jsonl", &("{\"text\": \"a\"}\n".repeat(8) + "{\"text\": \"\"}\n"));
    insta::assert_snapshot!(fixture.check(), @r#"
InvalidDataset spec.dataset.train: 1 of 9 rows cannot be used, but dataset.onInvalidRow: drop leaves out at most 10 %: fix the rows
InvalidDataset train.jsonl:9: "text" is empty
warning: spec.dataset.train: 7 of 8 rows repeat an earlier row
"#);
}

#[test]
fn invalid_rows_of_each_kind_are_left_out_and_reported() {
    let mut fixture = Fixture::new();
    let good: String = (0..30).map(|row| format!("{{\"text\": \"row {row}\"}}\n")).collect();
    let bad = "{\"text\": \"a\"\n{\"text\": 1}\n{\"txt\": \"a\"}\n";
    fixture.write("train.jsonl", &(good + bad));
    insta::assert_snapshot!(fixture.check(), @r#"
InvalidDataset train.jsonl:31: the row is not JSON: EOF while parsing an object at column 12
InvalidDataset train.jsonl:32: "text" is 1, but it must be a string
InvalidDataset train.jsonl:33: "text" is missing (did you mean "text" instead of "txt"?)
"#);
    assert_eq!(fixture.report().problems_total, 3);
    fixture.config.dataset.on_invalid_row = OnInvalidRow::Drop;
    insta::assert_snapshot!(fixture.check(), @r#"
warning: train.jsonl:31: left out: the row is not JSON: EOF while parsing an object at column 12
warning: train.jsonl:32: left out: "text" is 1, but it must be a string
warning: train.jsonl:33: left out: "text" is missing (did you mean "text" instead of "txt"?)
"#);
    let train = fixture.report().train.unwrap();
    assert_eq!((train.rows, train.bad_rows), (30, 3));
}

#[test]
fn warns_about_files_that_a_prefix_leaves_out() {
    let mut fixture = Fixture::new();
    fs::create_dir(fixture.path("rows")).unwrap();
    for name in
        ["train.jsonl", "test.jsonl", "validation.jsonl", "._train.jsonl", "dataset_info.json"]
    {
        fixture.write(&format!("rows/{name}"), &format!("{{\"text\": \"{name}\"}}\n"));
    }
    fixture.config.dataset.train = Some(fixture.at("rows/"));
    insta::assert_snapshot!(fixture.check(), @"warning: spec.dataset.train: 2 files are named after another split and left out: test.jsonl, validation.jsonl; to use a file anyway, give its own URI");
    let census = fixture.report().train.unwrap();
    assert_eq!(
        (census.files, census.rows, census.file_names),
        (1, 1, vec!["train.jsonl".to_owned()])
    );
    fs::remove_file(fixture.path("rows/train.jsonl")).unwrap();
    insta::assert_snapshot!(fixture.check(), @"InvalidDataset spec.dataset.train: file:///rows/ has no file for training: test.jsonl, validation.jsonl are named after another split; to use one of them anyway, give its own URI");
}

#[test]
fn several_sources_are_read_each_in_its_format() {
    let mut fixture = Fixture::new();
    fixture.write("a.json", r#"[{"text": "one"}, {"text": "two"}]"#);
    fixture.write("b.csv", "prompt,completion\nthree,four\n");
    let source = |name: &str, format, weight| RowSource { uri: fixture.at(name), format, weight };
    let sources = vec![
        source("a.json", DatasetFormat::Auto, 2.0),
        source("b.csv", DatasetFormat::PromptCompletion, 1.0),
    ];
    (fixture.config.dataset.train, fixture.config.dataset.sources) = (None, sources);
    assert_eq!(fixture.check(), "");
    let census = fixture.report().train.unwrap();
    assert_eq!((census.files, census.rows, census.duplicate_rows), (2, 5, 0));
    let missing = &mut fixture.config.dataset.sources[1].uri;
    *missing = missing.with_suffix(".missing");
    insta::assert_snapshot!(fixture.check(), @"NotFound spec.dataset.sources: nothing is at file:///b.csv.missing");
}

#[test]
fn a_fraction_of_the_rows_is_held_out() {
    let mut fixture = Fixture::new();
    let rows: String = (0..200).map(|row| format!("{{\"text\": \"{}\"}}\n", row % 100)).collect();
    fixture.write("train.jsonl", &rows);
    let dataset = &mut fixture.config.dataset;
    (dataset.validation_fraction, dataset.seed) = (Some(0.2), Some(42));
    let report = fixture.report();
    let (train, validation) = (report.train.unwrap(), report.validation.unwrap());
    assert_eq!(train.rows + validation.rows, 200);
    assert!((20..60).contains(&validation.rows), "{}", validation.rows);
    assert_eq!(report.overlapping_rows, 0);
    fixture.write("train.jsonl", "{\"text\": \"a\"}\n");
    fixture.config.dataset.validation_fraction = Some(0.0001);
    insta::assert_snapshot!(fixture.check(), @"NothingToTrain spec.dataset.validationFraction: holds out no row, because there are so few: raise it above 0.0001");
}
