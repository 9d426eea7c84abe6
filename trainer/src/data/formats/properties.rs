//! Property tests with random rows: no content is lost, and no text makes the parser panic.

use proptest::prelude::*;
use serde_json::json;

use crate::data::formats::{
    keys::{KEY_RULES, KeyScope, KeyUse},
    *,
};

/// Returns all texts of an example, concatenated.
fn haystack(example: &Example) -> String {
    match example {
        Example::Text(text) => text.clone(),
        Example::PromptCompletion { prompt, completion }
        | Example::Prerendered { prompt, completion } => format!("{prompt}\n{completion}"),
        Example::Chat(conversation) => {
            let mut texts = Vec::new();
            for message in &conversation.messages {
                texts.extend(message.texts().map(str::to_owned));
                texts.extend(message.name.clone());
                texts.extend(message.tool_call_id.clone());
                for call in &message.tool_calls {
                    texts.extend(call.id.clone());
                    texts.push(call.name.clone());
                    texts.extend(leaves(&call.arguments));
                }
            }
            conversation.tools.iter().for_each(|tool| texts.extend(leaves(tool)));
            texts.extend(leaves(&Value::Object(conversation.variables.clone())));
            texts.join("\n")
        }
    }
}

/// Returns all strings in a value.
fn leaves(value: &Value) -> Vec<String> {
    match value {
        Value::String(text) => vec![text.clone()],
        Value::Array(list) => list.iter().flat_map(leaves).collect(),
        Value::Object(object) => object.values().flat_map(leaves).collect(),
        _ => Vec::new(),
    }
}

/// Generates texts with characters that JSON escapes and with multi-byte characters.
fn text() -> impl Strategy<Value = String> {
    prop_oneof!["\\PC{1,12}", "[\"\\\\\n\t{}\\[\\],:]{1,8}", Just("☂ 你好".to_owned())]
}

#[derive(Debug, Clone)]
struct Turn {
    question: String,
    answer: String,
    reasoning: Option<String>,
    argument: Option<String>,
    is_target: bool,
}

fn turns() -> impl Strategy<Value = Vec<Turn>> {
    let turn = (text(), text(), prop::option::of(text()), prop::option::of(text()), any::<bool>());
    let turn = turn.prop_map(|(question, answer, reasoning, argument, is_target)| Turn {
        question,
        answer,
        reasoning,
        argument,
        is_target,
    });
    prop::collection::vec(turn, 1..4)
}

/// Writes a conversation with one of the spellings that datasets use.
fn row(turns: &[Turn], spelling: usize, system: &str) -> Value {
    let list = ["messages", "conversations", "conversation"][spelling % 3];
    let (role, content) = [("role", "content"), ("from", "value")][spelling / 3 % 2];
    let user = ["user", "human"][spelling / 6 % 2];
    let assistant = ["assistant", "gpt", "chatgpt", "model"][spelling / 12 % 4];
    let training_mark = ["weight", "train", "loss", "loss_mask"][spelling / 3 % 4];
    let reasoning_key = ["reasoning_content", "reasoning", "thinking"][spelling / 5 % 3];
    let mut written = Vec::new();
    for turn in turns {
        written.push(json!({role: user, content: [{"type": "text", "text": turn.question}]}));
        let mut answer =
            json!({role: assistant, content: turn.answer, training_mark: u8::from(turn.is_target)});
        if let Some(reasoning) = &turn.reasoning {
            answer[reasoning_key] = json!(reasoning);
        }
        if let Some(argument) = &turn.argument {
            let arguments = json!({"x": argument});
            let arguments =
                if spelling.is_multiple_of(2) { arguments } else { json!(arguments.to_string()) };
            answer["tool_calls"] =
                json!([{"id": "c", "function": {"name": "f", "arguments": arguments}}]);
        }
        written.push(answer);
        if turn.argument.is_some() {
            written.push(json!({role: "tool", content: "returned", "tool_call_id": "c"}));
        }
    }
    json!({"system": system, list: written, "id": 1})
}

proptest! {
    #[test]
    fn every_content_of_a_conversation_is_found_again(turns in turns(), spelling in 0_usize..48, system in text()) {
        let row = row(&turns, spelling, &system);
        let read = read(&row.to_string(), &ReadOptions::for_format(DatasetFormat::Auto));
        if turns.iter().all(|turn| !turn.is_target) {
            prop_assert!(read.is_err());
            return Ok(());
        }
        let (_, example) = read.map_err(|errors| TestCaseError::fail(format!("{errors:?} of {row}")))?;
        let Example::Chat(Conversation { messages, .. }) = &example else { panic!("{example:?}") };
        prop_assert_eq!(&messages[0].content, &system);
        let mut rest = messages[1..].iter();
        for turn in &turns {
            prop_assert_eq!(&rest.next().unwrap().content, &turn.question);
            let answer = rest.next().unwrap();
            prop_assert_eq!(&answer.content, &turn.answer);
            prop_assert_eq!(&answer.reasoning, &turn.reasoning);
            prop_assert_eq!(answer.is_target, turn.is_target);
            if let Some(argument) = &turn.argument {
                prop_assert_eq!(&answer.tool_calls[0].arguments["x"], argument);
                let returned = rest.next().unwrap();
                prop_assert_eq!(returned.content.as_str(), "returned");
                prop_assert!(!returned.is_target);
            }
        }
        prop_assert!(rest.next().is_none());
    }

    #[test]
    fn other_formats_keep_every_text(texts in prop::array::uniform5(text())) {
        let [a, b, c, d, e] = texts;
        for row in [
            json!({"instruction": a, "input": b, "output": c, "history": [[d, e]]}),
            json!({"prompt": a, "completion": b}),
            json!({"question": a, "answer": b}),
            json!({"prompt": [{"role": "user", "content": a}], "completion": [{"role": "assistant", "content": b}], "system": c}),
            json!({"text": a}),
        ] {
            let (_, example) = read(&row.to_string(), &ReadOptions::for_format(DatasetFormat::Auto))
                .map_err(|errors| TestCaseError::fail(format!("{errors:?} of {row}")))?;
            let found = haystack(&example);
            for text in leaves(&row).iter().filter(|text| !["user", "assistant"].contains(&text.as_str())) {
                prop_assert!(found.contains(text.as_str()), "{text:?} of {row} is not in {example:?}");
            }
        }
    }

    #[test]
    fn what_is_read_of_any_object_loses_no_text(row in any_row()) {
        let Ok((_, example)) = read(&row.to_string(), &ReadOptions::for_format(DatasetFormat::Auto)) else { return Ok(()) };
        let found = haystack(&example);
        let mut non_null = Vec::new();
        meaningful(KeyScope::Row, &row, &mut non_null);
        for text in non_null {
            prop_assert!(is_kept(&found, &text), "{text:?} of {row} is not in {example:?}");
        }
    }

    #[test]
    fn no_text_makes_the_reader_panic(text in "\\PC{0,40}", json in "[\\[\\]{}\",:0-9a-z\\\\ ]{0,40}") {
        for format in [DatasetFormat::Auto, DatasetFormat::Messages, DatasetFormat::Alpaca, DatasetFormat::Text, DatasetFormat::Prerendered] {
            let _ = read(&text, &ReadOptions::for_format(format));
            let _ = read(&json, &ReadOptions::for_format(format));
        }
    }
}

/// Generates objects of known and unknown keys with values of every kind, many of which are valid.
fn any_row() -> impl Strategy<Value = Value> {
    let names = |scope: KeyScope| -> Vec<&'static str> {
        let known = KEY_RULES.iter().filter(move |known| known.scope == scope);
        known.flat_map(|known| known.names.iter().copied()).chain(["other"]).collect()
    };
    let value = || {
        prop_oneof![
            4 => text().prop_map(Value::from),
            1 => Just(Value::Null),
            1 => any::<bool>().prop_map(Value::from),
            1 => (0..2).prop_map(Value::from),
            1 => Just(json!([])),
            1 => text().prop_map(|text| json!([{"type": "text", "text": text}])),
        ]
    };
    let extra =
        move |scope| prop::collection::vec((prop::sample::select(names(scope)), value()), 0..3);
    let role = prop::sample::select(vec!["user", "human", "assistant", "gpt", "tool", "system"]);
    let turn = (role, text(), extra(KeyScope::Turn)).prop_map(|(role, content, extra)| {
        let mut turn = json!({"role": role, "content": content});
        for (key, value) in extra {
            turn[key] = value;
        }
        turn
    });
    let list =
        prop::sample::select(vec!["messages", "conversations", "prompt", "text", "instruction"]);
    let turns = prop::collection::vec(turn, 1..4);
    (list, turns, text(), text(), extra(KeyScope::Row)).prop_map(
        |(list, turns, first, second, extra)| {
            let mut row = match list {
                "prompt" => json!({"prompt": first, "completion": second}),
                "text" => json!({"text": first}),
                "instruction" => json!({"instruction": first, "output": second}),
                list => json!({list: turns}),
            };
            for (key, value) in extra {
                row[key] = value;
            }
            row
        },
    )
}

/// Returns whether a text is in the parsed content, or consists of it and punctuation.
fn is_kept(found: &str, text: &str) -> bool {
    let is_between =
        |character: char| character.is_whitespace() || character.is_ascii_punctuation();
    found.contains(text.trim())
        || text.split(is_between).all(|format_name| found.contains(format_name))
}

/// Collects the texts of keys that are neither ignored nor part of the format.
fn meaningful(scope: KeyScope, value: &Value, non_null: &mut Vec<String>) {
    match value {
        Value::Object(object) => {
            for (key, value) in object {
                let known = KEY_RULES
                    .iter()
                    .find(|known| known.scope == scope && known.names.contains(&key.as_str()));
                let is_word = ["role", "from", "type", "mask", "label"].contains(&key.as_str());
                if is_word || known.is_some_and(|known| known.key_use == KeyUse::Ignored) {
                    continue;
                }
                let inner = match (scope, value) {
                    (KeyScope::Row, Value::Array(_)) => KeyScope::Turn,
                    (KeyScope::Turn, Value::Array(_)) => KeyScope::Part,
                    (scope, _) => scope,
                };
                meaningful(inner, value, non_null);
            }
        }
        Value::Array(list) => list.iter().for_each(|value| meaningful(scope, value, non_null)),
        Value::String(text) => non_null.push(text.clone()),
        _ => {}
    }
}

/// Returns values of which at least one changes the result, whatever the key.
fn distinctive_values() -> Vec<Value> {
    vec![
        json!("telling"),
        json!("user"),
        json!([["telling", "telling"]]),
        json!([{"role": "user", "content": "telling"}, {"role": "assistant", "content": "b"}]),
        json!([{"name": "telling"}]),
        json!({"telling": 1}),
        json!(false),
        json!(true),
    ]
}

#[test]
fn every_key_that_is_said_to_be_used_makes_a_difference() {
    let turns = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]);
    let base = |format| match format {
        DatasetFormat::Messages | DatasetFormat::Auto => json!({"messages": turns}),
        DatasetFormat::Sharegpt => json!({"conversations": turns}),
        DatasetFormat::Alpaca => json!({"instruction": "a", "output": "b"}),
        DatasetFormat::PromptCompletion | DatasetFormat::Prerendered => {
            json!({"prompt": "a", "completion": "b"})
        }
        DatasetFormat::Text => json!({"text": "a"}),
    };
    for known in KEY_RULES.iter().filter(|known| known.scope == KeyScope::Row) {
        let KeyUse::Used(formats) = known.key_use else { continue };
        for (&format, name) in
            formats.iter().flat_map(|format| known.names.iter().map(move |name| (format, name)))
        {
            let options = ReadOptions::for_format(format);
            let mut plain = base(format);
            // A synonym replaces the key.
            plain
                .as_object_mut()
                .unwrap()
                .retain(|key, _| key == name || !known.names.contains(&key.as_str()));
            let read_plain = read(&plain.to_string(), &options).ok();
            let differs = distinctive_values().into_iter().any(|value| {
                let mut row = plain.clone();
                row[*name] = value;
                read(&row.to_string(), &options).ok() != read_plain
            });
            assert!(differs, "{name:?} of {format:?} changes nothing");
        }
    }
    for known in KEY_RULES.iter().filter(|known| known.scope == KeyScope::Turn) {
        let KeyUse::Used(_) = known.key_use else { continue };
        for name in known.names {
            let row = |value: Value| {
                let mut turn = json!({"role": "assistant", "content": "b"});
                turn.as_object_mut().unwrap().retain(|key, _| !known.names.contains(&key.as_str()));
                turn[*name] = value;
                let row = json!({"messages": [{"role": "user", "content": "a"}, turn, {"role": "assistant", "content": "c"}]});
                read(&row.to_string(), &ReadOptions::for_format(DatasetFormat::Messages)).ok()
            };
            assert!(
                distinctive_values().into_iter().any(|value| row(value) != row(Value::Null)),
                "{name:?} changes nothing"
            );
        }
    }
}
