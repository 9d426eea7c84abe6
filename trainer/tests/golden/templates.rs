//! Chat templates against the results of transformers, which `templates.py` writes.
//!
//! Those of our own templates are in `templates/`. Templates of real models are fetched and not
//! stored here; their results are in the directory that `FINETUNE_TEMPLATES` names (`cargo xtask
//! parity` runs both steps).

use std::{collections::BTreeMap, fs, path::Path};

use finetune_contract::Reasoning;
use finetune_trainer::{
    data::{
        chat::rendering::Rendering,
        conversation::{ChatRole, Conversation, Example, Message, ToolCall},
        tokenizer::Tokenizer,
    },
    hex,
};
use jiff::civil::date;
use serde::Deserialize;
use serde_json::Value;
use sha2::{Digest, Sha256};

/// Parts of our own error messages.
const REFUSED: [&str; 3] = ["the chat template leaves", "shows no tools", "puts around turns"];

#[derive(Deserialize)]
struct Talk {
    messages: Vec<Value>,
    tools: Option<Vec<Value>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Case {
    template: String,
    conversation: String,
    ask: bool,
    refused: Option<String>,
    #[serde(default)]
    text: String,
    #[serde(default)]
    ids_sha256: String,
    /// The ranges of tokens that the assistant generates.
    #[serde(default)]
    generated: Vec<[usize; 2]>,
}

#[test]
fn our_own_templates_render_as_in_transformers() {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/templates");
    assert_eq!(compare_all(&own), (11, 286, 24));
}

#[test]
fn templates_of_real_models_render_as_in_transformers() {
    let Ok(directory) = std::env::var("FINETUNE_TEMPLATES") else {
        println!("skipped: FINETUNE_TEMPLATES is not set; cargo xtask parity sets it");
        return;
    };
    let (templates, renderings, masks) = compare_all(Path::new(&directory));
    println!("{templates} templates, {renderings} renderings, {masks} masks");
    assert!(templates >= 40);
}

/// Compares every case of a directory; returns how many templates, renderings and masks there are.
fn compare_all(directory: &Path) -> (usize, usize, usize) {
    let read = |name: &str| fs::read_to_string(directory.join(name)).unwrap();
    let talks: BTreeMap<String, Talk> = serde_json::from_str(&read("conversations.json")).unwrap();
    let mut tokenizers: BTreeMap<String, Result<Tokenizer, String>> = BTreeMap::new();
    let (mut compared, mut masks, mut faults) = (0, 0, Vec::new());
    for line in read("cases.jsonl").lines() {
        let case: Case = serde_json::from_str(line).unwrap();
        let tokenizer = tokenizers.entry(case.template.clone()).or_insert_with(|| {
            let rendering = Rendering {
                chat_template: Some(read(&case.template)),
                reasoning: Reasoning::Keep,
                today: date(2026, 1, 31),
            };
            Tokenizer::load(&directory.join("tokenizer"), &rendering)
                .map_err(|failure| failure.message)
        });
        let fault = match tokenizer {
            Err(reason) => Some(reason.clone()),
            Ok(tokenizer) => {
                masks += usize::from(!case.generated.is_empty());
                compare(tokenizer, &case, &talks[&case.conversation])
            }
        };
        compared += 1;
        if let Some(fault) = fault {
            let Case { template, conversation, ask, .. } = &case;
            faults.push(format!("{template}, {conversation}, ask {ask}: {fault}"));
        }
    }
    assert!(faults.is_empty(), "{} faults\n{}", faults.len(), faults.join("\n"));
    (tokenizers.len(), compared, masks)
}

fn compare(tokenizer: &Tokenizer, case: &Case, talk: &Talk) -> Option<String> {
    let conversation = conversation(talk);
    let rendered = tokenizer.render(&conversation, case.ask);
    let text = match (&case.refused, rendered) {
        (Some(_), Err(_)) => return None,
        (Some(reason), Ok(text)) => {
            return Some(format!("transformers refuses ({reason}), ours gives {text:?}"));
        }
        (None, Err(reason)) => return Some(format!("ours refuses: {reason}")),
        (None, Ok(text)) => text,
    };
    if text != case.text {
        return Some(format!("ours\n  {text:?}\ntheirs\n  {:?}", case.text));
    }
    let ids = tokenizer.encode(&text, false).unwrap();
    let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    if hex(&Sha256::digest(bytes))[..16] != case.ids_sha256 {
        return Some("the ids differ".to_owned());
    }
    if case.generated.is_empty() {
        return None;
    }
    let is_generated = |index| case.generated.iter().any(|[from, to]| (from..to).contains(&&index));
    let mask: Vec<bool> = (0..ids.len()).map(is_generated).collect();
    match tokenizer.tokenize(&Example::Chat(conversation)) {
        // Rows whose template omits something are refused on purpose.
        Err(reason) if REFUSED.iter().any(|words| reason.contains(words)) => None,
        Err(reason) => Some(format!("ours trains on nothing: {reason}")),
        Ok(tokenized) => {
            let found = &tokenized.rows[0].targets;
            let show = |mask: &[bool]| -> String {
                let marked = ids.iter().zip(mask).filter(|(_, is_marked)| **is_marked);
                tokenizer.decode(&marked.map(|(id, _)| *id).collect::<Vec<_>>(), false)
            };
            // Tokens after the end of a turn are never generated, so we do not train on them.
            let (ours, theirs) = (show(found), show(&mask));
            let is_right = *found == mask || without_ends(&ours) == without_ends(&theirs);
            (!is_right)
                .then(|| format!("we train on\n  {ours:?}\nthe template marks\n  {theirs:?}"))
        }
    }
}

fn without_ends(text: &str) -> String {
    text.replace('\n', "")
}

fn conversation(talk: &Talk) -> Conversation {
    let text = |message: &Value, key: &str| message[key].as_str().map(str::to_owned);
    let messages = talk.messages.iter().map(|message| {
        let role = match message["role"].as_str().unwrap() {
            "system" => ChatRole::System,
            "user" => ChatRole::User,
            "assistant" => ChatRole::Assistant,
            _ => ChatRole::Tool,
        };
        let calls = message["tool_calls"].as_array().into_iter().flatten();
        Message {
            reasoning: text(message, "reasoning_content"),
            tool_call_id: text(message, "tool_call_id"),
            name: text(message, "name"),
            tool_calls: calls
                .map(|call| ToolCall {
                    id: text(call, "id"),
                    name: text(&call["function"], "name").unwrap(),
                    arguments: call["function"]["arguments"].clone(),
                })
                .collect(),
            ..Message::new(role, message["content"].as_str().unwrap())
        }
    });
    Conversation {
        tools: talk.tools.clone().unwrap_or_default(),
        ..Conversation::new(messages.collect())
    }
}
