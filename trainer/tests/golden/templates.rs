//! Chat templates against transformers: `templates.py` left what it makes of them in the directory
//! that `FINETUNE_TEMPLATES` names (`cargo xtask parity` does both).

use std::{collections::BTreeMap, fs, path::Path};

use finetune_contract::Reasoning;
use finetune_trainer::data::{
    Rendering, Tokenizer,
    conversation::{ChatRole, Conversation, Example, Message, ToolCall},
};
use serde::Deserialize;
use serde_json::Value;

/// Words of our own refusals.
const REFUSED: [&str; 3] = ["the chat template leaves", "shows no tools", "puts around turns"];

#[derive(Deserialize)]
struct Case {
    template: String,
    source: String,
    conversation: String,
    messages: Vec<Value>,
    tools: Option<Vec<Value>>,
    ask: bool,
    refused: Option<String>,
    #[serde(default)]
    text: String,
    #[serde(default)]
    ids: Vec<u32>,
    mask: Option<Vec<u32>>,
}

#[test]
fn templates_render_as_in_transformers() {
    let Ok(directory) = std::env::var("FINETUNE_TEMPLATES") else {
        println!("skipped: FINETUNE_TEMPLATES is not set; cargo xtask parity sets it");
        return;
    };
    let directory = Path::new(&directory);
    let mut tokenizers: BTreeMap<String, Result<Tokenizer, String>> = BTreeMap::new();
    let (mut compared, mut masks, mut faults) = (0, 0, Vec::new());
    for line in fs::read_to_string(directory.join("cases.jsonl")).unwrap().lines() {
        let case: Case = serde_json::from_str(line).unwrap();
        let tokenizer = tokenizers.entry(case.template.clone()).or_insert_with(|| {
            let rendering = Rendering {
                chat_template: Some(case.source.clone()),
                reasoning: Reasoning::Keep,
                ..Rendering::of_model()
            };
            Tokenizer::load(&directory.join("tokenizer"), &rendering)
                .map_err(|failure| failure.message)
        });
        let fault = match tokenizer {
            Err(reason) => Some(reason.clone()),
            Ok(tokenizer) => {
                masks += u32::from(case.mask.is_some());
                compare(tokenizer, &case)
            }
        };
        compared += 1;
        if let Some(fault) = fault {
            let Case { template, conversation, ask, .. } = &case;
            faults.push(format!("{template}, {conversation}, ask {ask}: {fault}"));
        }
    }
    println!("{} templates, {compared} renderings, {masks} masks", tokenizers.len());
    assert!(compared > 0);
    assert!(faults.is_empty(), "{} faults\n{}", faults.len(), faults.join("\n"));
}

fn compare(tokenizer: &Tokenizer, case: &Case) -> Option<String> {
    let conversation = conversation(case);
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
    if ids != case.ids {
        return Some("the ids differ".to_owned());
    }
    let mask = case.mask.as_ref().filter(|mask| mask.contains(&1))?;
    match tokenizer.tokenize(&Example::Chat(conversation)) {
        // Rows of which a template leaves something out are refused on purpose.
        Err(reason) if REFUSED.iter().any(|words| reason.contains(words)) => None,
        Err(reason) => Some(format!("ours trains on nothing: {reason}")),
        Ok(tokenized) => {
            let found: Vec<u32> =
                tokenized.rows[0].targets.iter().map(|&is_target| u32::from(is_target)).collect();
            let show = |mask: &[u32]| -> String {
                let marked = ids.iter().zip(mask).filter(|(_, mask)| **mask == 1);
                tokenizer.decode(&marked.map(|(id, _)| *id).collect::<Vec<_>>(), false)
            };
            // What follows the token that ends a turn is never generated, so we do not train on it.
            let (ours, theirs) = (show(&found), show(mask));
            let is_right = found == *mask || without_ends(&ours) == without_ends(&theirs);
            (!is_right)
                .then(|| format!("we train on\n  {ours:?}\nthe template marks\n  {theirs:?}"))
        }
    }
}

fn without_ends(text: &str) -> String {
    text.replace('\n', "")
}

fn conversation(case: &Case) -> Conversation {
    let text = |message: &Value, key: &str| message[key].as_str().map(str::to_owned);
    let messages = case.messages.iter().map(|message| {
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
        tools: case.tools.clone().unwrap_or_default(),
        ..Conversation::new(messages.collect())
    }
}
