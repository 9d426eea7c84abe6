//! Renders rows with templates of every family. Tests compare text in which trained spans are in
//! [brackets].
//!
//! The templates are short versions of those of real models: what matters is which tokens the template
//! supplies, and where a turn ends.

use serde_json::json;

use finetune_contract::DatasetFormat;

use crate::data::{
    chat::template::{Sources, Template},
    conversation::{ChatRole, Conversation, Example, Message},
    formats::{self, ReadOptions},
    tokenizer::{Tokenizer, targets::TokenRow},
};

pub(crate) const CHATML: &str = "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind<|im_end|>\n{% endif %}\
    {{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

const LLAMA3: &str = "{{- bos_token }}{%- for m in messages %}\
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{%- endfor %}\
    {%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}";

const MISTRAL: &str = "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}\
    {{ raise_exception('roles must alternate user/assistant') }}{% endif %}\
    {% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}\
    {% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}";

/// Prints the reasoning of the last turn only, and an empty block if it has none.
const QWEN3: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% set said = m.content %}\
    {% if m.role == 'assistant' %}{% set thought = '' %}{% if '</think>' in said %}\
    {% set thought = said.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}\
    {% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}\
    {% if loop.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{% endif %}\
    {{ said + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

const GENERATION: &str = "{% for m in messages %}\n<|im_start|>{{ m.role }}\n\n{% if m.role == 'assistant' %}\n\
    {% generation %}\n{{ m.content }}<|im_end|>{% endgeneration %}\n{% else %}\n{{ m.content }}<|im_end|>\n{% endif %}\n\n{% endfor %}";

/// Returns the `tokenizer.json` of a byte-level tokenizer like that of Llama 3: trimmed offsets, BOS
/// from a post-processor template, runs of spaces.
pub(crate) fn tokenizer_json(bos: &str, eos: &str) -> serde_json::Value {
    let mut alphabet: Vec<char> =
        tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let mut vocab: Vec<String> = alphabet.into_iter().map(String::from).collect();
    vocab.extend(["ĠĠ", "ĠĠĠĠ"].map(str::to_owned));
    let size = vocab.len();
    let vocab: serde_json::Map<_, _> =
        vocab.into_iter().enumerate().map(|(id, token)| (token, json!(id))).collect();
    let special = [
        bos,
        eos,
        "<|im_start|>",
        "<|im_end|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ];
    let added: Vec<_> = special
        .into_iter()
        .enumerate()
        .map(|(index, content)| {
            json!({"id": size + index, "content": content, "single_word": false, "lstrip": false,
                   "rstrip": false, "normalized": false, "special": true})
        })
        .collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let starts_with_bos = json!({
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [size], "tokens": [bos]}},
    });
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": {"type": "Sequence", "processors": [byte_level, starts_with_bos]},
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                  "vocab": vocab, "merges": [["Ġ", "Ġ"], ["ĠĠ", "ĠĠ"]]},
    })
}

fn tokenizer(template: Option<&str>, bos: &str, eos: &str) -> Tokenizer {
    let inner: tokenizers::Tokenizer = tokenizer_json(bos, eos).to_string().parse().unwrap();
    let variables = [("bos_token", bos), ("eos_token", eos)];
    let variables = variables.map(|(name, token)| (name.to_owned(), token.to_owned())).to_vec();
    let template = template.map(|source| {
        let sources = Sources { default: source.to_owned(), tool_use: None };
        Template::compile(&sources, &variables, jiff::civil::date(2026, 1, 31)).unwrap()
    });
    let eos_ids = [eos, "<|im_end|>", "<|eot_id|>"];
    let eos_ids = eos_ids.iter().filter_map(|token| inner.token_to_id(token)).collect();
    Tokenizer::from_parts(inner, template, eos_ids)
}

/// Renders a row with trained spans in brackets and line breaks as `⏎`.
pub(crate) fn show(tokenizer: &Tokenizer, example: &Example) -> String {
    let rows = match tokenizer.tokenize(example) {
        Ok(tokenized) => tokenized.rows,
        Err(reason) => return format!("error: {reason}"),
    };
    let shown: Vec<String> = rows.iter().map(|row| show_row(tokenizer, row)).collect();
    shown.join(" // ")
}

fn show_row(tokenizer: &Tokenizer, row: &TokenRow) -> String {
    assert!(!row.targets[0], "the first token has nothing it could be predicted from");
    let mut shown = String::new();
    let mut start = 0;
    while start < row.tokens.len() {
        let is_target = row.targets[start];
        let length = row.targets[start..].iter().take_while(|&&other| other == is_target).count();
        let text = tokenizer.decode(&row.tokens[start..start + length], false);
        shown.extend(if is_target { ["[", &text, "]"] } else { ["", &text, ""] });
        start += length;
    }
    shown.replace('\n', "⏎")
}

fn chat(turns: &[(&str, &str)]) -> Example {
    let turn = |&(role, content): &(&str, &str)| {
        let role = match role {
            "system" => ChatRole::System,
            "user" => ChatRole::User,
            "assistant" => ChatRole::Assistant,
            _ => ChatRole::Tool,
        };
        Message::new(role, content)
    };
    Example::Chat(Conversation::new(turns.iter().map(turn).collect()))
}

fn two_turns() -> Example {
    chat(&[("user", "Hi"), ("assistant", "Hello!"), ("user", "Bye"), ("assistant", "Ciao ☂")])
}

#[test]
fn chatml_trains_every_answer_up_to_the_end_of_its_turn() {
    let tokenizer = tokenizer(Some(CHATML), "<s>", "<|im_end|>");
    insta::assert_snapshot!(show(&tokenizer, &two_turns()), @"<|im_start|>system⏎Be kind<|im_end|>⏎<|im_start|>user⏎Hi<|im_end|>⏎<|im_start|>assistant⏎[Hello!<|im_end|>]⏎<|im_start|>user⏎Bye<|im_end|>⏎<|im_start|>assistant⏎[Ciao ☂<|im_end|>]⏎");
    insta::assert_snapshot!(show(&tokenizer, &chat(&[("system", "Be brief"), ("user", "Hi"), ("assistant", "Yo")])), @"<|im_start|>system⏎Be brief<|im_end|>⏎<|im_start|>user⏎Hi<|im_end|>⏎<|im_start|>assistant⏎[Yo<|im_end|>]⏎");
}

#[test]
fn llama_3_has_one_bos_and_trains_the_end_of_turn() {
    let tokenizer = tokenizer(Some(LLAMA3), "<|begin_of_text|>", "<|end_of_text|>");
    insta::assert_snapshot!(show(&tokenizer, &two_turns()), @"<|begin_of_text|><|start_header_id|>user<|end_header_id|>⏎⏎Hi<|eot_id|><|start_header_id|>assistant<|end_header_id|>⏎⏎[Hello!<|eot_id|>]<|start_header_id|>user<|end_header_id|>⏎⏎Bye<|eot_id|><|start_header_id|>assistant<|end_header_id|>⏎⏎[Ciao ☂<|eot_id|>]");
}

#[test]
fn mistral_trains_the_end_of_text_after_each_answer() {
    let tokenizer = tokenizer(Some(MISTRAL), "<s>", "</s>");
    insta::assert_snapshot!(show(&tokenizer, &two_turns()), @"<s>[INST] Hi [/INST][ Hello!</s>][INST] Bye [/INST][ Ciao ☂</s>]");
    insta::assert_snapshot!(show(&tokenizer, &chat(&[("user", "a"), ("user", "b"), ("assistant", "c")])), @"error: roles must alternate user/assistant (line 1 of the template)");
}

#[test]
fn an_empty_reasoning_block_that_the_template_supplies_is_not_trained() {
    let tokenizer = tokenizer(Some(QWEN3), "<s>", "<|im_end|>");
    insta::assert_snapshot!(show(&tokenizer, &chat(&[("user", "Hi"), ("assistant", "think")])), @"<|im_start|>user⏎Hi<|im_end|>⏎<|im_start|>assistant⏎<think>⏎⏎</think>⏎⏎[think<|im_end|>]⏎");
    insta::assert_snapshot!(show(&tokenizer, &chat(&[("user", "Hi"), ("assistant", "<think>\nhm\n</think>\n\nYo")])), @"<|im_start|>user⏎Hi<|im_end|>⏎<|im_start|>assistant⏎[<think>⏎hm⏎</think>⏎⏎Yo<|im_end|>]⏎");
}

#[test]
fn a_row_with_the_placeholder_is_refused() {
    let tokenizer = tokenizer(Some(CHATML), "<s>", "<|im_end|>");
    insta::assert_snapshot!(show(&tokenizer, &chat(&[("user", "\u{F8F2}"), ("assistant", "Yo")])), @r"error: turn 0 has the private-use character \u{f8f2}, which marks turns while they are rendered: remove it");
}

#[test]
fn a_template_that_rewrites_earlier_turns_gives_a_row_for_each() {
    let tokenizer = tokenizer(Some(QWEN3), "<s>", "<|im_end|>");
    insta::assert_snapshot!(show(&tokenizer, &two_turns()), @"<|im_start|>user⏎Hi<|im_end|>⏎<|im_start|>assistant⏎<think>⏎⏎</think>⏎⏎[Hello!<|im_end|>]⏎ // <|im_start|>user⏎Hi<|im_end|>⏎<|im_start|>assistant⏎Hello!<|im_end|>⏎<|im_start|>user⏎Bye<|im_end|>⏎<|im_start|>assistant⏎<think>⏎⏎</think>⏎⏎[Ciao ☂<|im_end|>]⏎");
}

/// Ends turns only with a space, which forms one token with the space that starts the next turn.
const NO_END_OF_TURN: &str = "{% for m in messages %}{% if m.role == 'user' %}{{ ' Q:' + m.content + 'A:' }}\
    {% else %}{{ m.content + ' ' }}{% endif %}{% endfor %}";

#[test]
fn a_turn_whose_last_token_reaches_into_the_next_is_refused() {
    let tokenizer = tokenizer(Some(NO_END_OF_TURN), "<s>", "</s>");
    insta::assert_snapshot!(show(&tokenizer, &two_turns()), @"error: a token spans the border between turn 1 and what follows it, so the turn cannot be trained on alone");
    insta::assert_snapshot!(show(&tokenizer, &chat(&[("user", "Hi"), ("assistant", "Hello!")])), @" Q:HiA:[Hello! ]");
}

#[test]
fn generation_blocks_say_what_is_trained() {
    let tokenizer = tokenizer(Some(GENERATION), "<s>", "<|im_end|>");
    insta::assert_snapshot!(show(&tokenizer, &two_turns()), @"<|im_start|>user⏎⏎Hi<|im_end|>⏎⏎<|im_start|>assistant⏎⏎[Hello!<|im_end|>]⏎<|im_start|>user⏎⏎Bye<|im_end|>⏎⏎<|im_start|>assistant⏎⏎[Ciao ☂<|im_end|>]⏎");
}

#[test]
fn runs_of_spaces_in_an_answer_are_trained() {
    let code = chat(&[("user", "Hi"), ("assistant", "if x:\n    y\n        z")]);
    for template in [CHATML, GENERATION] {
        let tokenizer = tokenizer(Some(template), "<s>", "<|im_end|>");
        let shown = show(&tokenizer, &code);
        assert!(shown.contains("[if x:⏎    y⏎        z<|im_end|>]"), "{shown}");
    }
}

#[test]
fn text_and_pairs_start_with_bos_and_end_with_eos() {
    let tokenizer = tokenizer(None, "<s>", "</s>");
    insta::assert_snapshot!(show(&tokenizer, &Example::Text("Once".to_owned())), @"<s>[Once</s>]");
    let pair = Example::PromptCompletion { prompt: "2+2=".to_owned(), completion: "4".to_owned() };
    insta::assert_snapshot!(show(&tokenizer, &pair), @"<s>2+2=[4</s>]");
    insta::assert_snapshot!(show(&tokenizer, &two_turns()), @"error: the model has no chat template, so a conversation cannot be rendered: set dataset.chatTemplate (to chatml, alpaca, vicuna, a template's text or its URI), use an instruction-tuned model, or give rows of prompt and completion");
}

#[test]
fn instructions_have_alpacas_prompt_where_there_is_no_template() {
    let row = r#"{"instruction": "Add.", "input": "1 2", "output": "3"}"#;
    let options = ReadOptions::for_format(DatasetFormat::Auto);
    let (_, example) = formats::read(row, &options).unwrap();
    insta::assert_snapshot!(show(&tokenizer(None, "<s>", "</s>"), &example), @"<s>Below is an instruction that describes a task, paired with an input that provides further context. Write a response that appropriately completes the request.⏎⏎### Instruction:⏎Add.⏎⏎### Input:⏎1 2⏎⏎### Response:⏎[3</s>]");
    insta::assert_snapshot!(show(&tokenizer(Some(CHATML), "<s>", "<|im_end|>"), &example), @"<|im_start|>system⏎Be kind<|im_end|>⏎<|im_start|>user⏎Add.⏎⏎1 2<|im_end|>⏎<|im_start|>assistant⏎[3<|im_end|>]⏎");
}

#[test]
fn a_pair_is_a_question_and_its_answer_where_there_is_a_template() {
    let tokenizer = tokenizer(Some(CHATML), "<s>", "<|im_end|>");
    let pair = Example::PromptCompletion { prompt: "2+2=".to_owned(), completion: "4".to_owned() };
    insta::assert_snapshot!(show(&tokenizer, &pair), @"<|im_start|>system⏎Be kind<|im_end|>⏎<|im_start|>user⏎2+2=<|im_end|>⏎<|im_start|>assistant⏎[4<|im_end|>]⏎");
}
