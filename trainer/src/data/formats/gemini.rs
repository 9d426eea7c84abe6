//! Parses conversations as Gemini's supervised tuning takes them: `contents` of turns with `parts`.
//!
//! # Source
//! Vertex AI, "Prepare supervised fine-tuning data": `systemInstruction`, and `contents` of the roles
//! `user` and `model`; a part with `thought: true` is reasoning. The texts of a turn's parts are
//! concatenated, as the SDK's `response.text` does.

use serde_json::{Map, Value};

use crate::data::{
    conversation::{ChatRole, Example, Message},
    formats::{
        error::RowError,
        fields::{as_text, is_empty, list, non_null, required, resolve_alias, text},
        messages,
    },
};

const TURNS: &str = "contents";
const SYSTEM: [&str; 2] = ["systemInstruction", "system_instruction"];

/// Returns whether a row has a key that only this format has.
pub(super) fn is_gemini(row: &Map<String, Value>) -> bool {
    [TURNS, SYSTEM[0], SYSTEM[1]].into_iter().any(|key| non_null(row, key).is_some())
}

/// Parses a row; every turn of the model is a target.
pub(super) fn read(row: &Map<String, Value>) -> Result<Example, RowError> {
    if non_null(row, "messages").is_some() {
        return Err(RowError::new("\"messages\" and \"contents\" both hold the turns: keep one"));
    }
    if non_null(row, "tools").is_some_and(|tools| !is_empty(tools)) {
        return Err(RowError::new(
            "\"tools\" of Gemini's rows cannot be used: convert the row to \"messages\" with \"tool_calls\"",
        ));
    }
    let mut turns = Vec::new();
    let system_key = resolve_alias(row, &SYSTEM)?;
    if let Some(system) = non_null(row, system_key).filter(|value| !is_empty(value)) {
        let system = object(system).and_then(|system| message(system, ChatRole::System));
        turns.push(system.map_err(|error| error.within(system_key))?);
    }
    for (index, turn) in list(required(row, TURNS)?, TURNS)?.iter().enumerate() {
        let turn = object(turn).and_then(|turn| message(turn, role(turn)?));
        turns.push(turn.map_err(|error| error.at(TURNS, index))?);
    }
    messages::build_conversation(row, turns).map(Example::Chat)
}

fn role(turn: &Map<String, Value>) -> Result<ChatRole, RowError> {
    match as_text(required(turn, "role")?, "role")?.as_str() {
        "user" => Ok(ChatRole::User),
        "model" => Ok(ChatRole::Assistant),
        other => Err(RowError::of_kind(
            format!("role {other}"),
            format!("the role {other:?} cannot be used in \"contents\": use user or model"),
        )),
    }
}

fn message(turn: &Map<String, Value>, role: ChatRole) -> Result<Message, RowError> {
    refuse_keys(turn, &["role", "parts"])?;
    let (mut said, mut thought) = (String::new(), String::new());
    for (index, part) in list(required(turn, "parts")?, "parts")?.iter().enumerate() {
        let part = object(part).and_then(read_part);
        let (is_thought, text) = part.map_err(|error| error.at("parts", index))?;
        if is_thought { thought += &text } else { said += &text }
    }
    if role != ChatRole::Assistant && !thought.is_empty() {
        return Err(RowError::new(format!(
            "a part of the {} is a thought: only the model can think",
            role.as_str()
        )));
    }
    if role == ChatRole::Assistant && said.is_empty() {
        return Err(RowError::new("the model's parts have no text"));
    }
    let mut message = Message::new(role, said);
    message.reasoning = Some(thought).filter(|thought| !thought.is_empty());
    Ok(message)
}

/// Returns whether a part is a thought, and its text.
fn read_part(part: &Map<String, Value>) -> Result<(bool, String), RowError> {
    refuse_keys(part, &["text", "thought"])?;
    let is_thought = match non_null(part, "thought") {
        None => false,
        Some(Value::Bool(is_thought)) => *is_thought,
        Some(_) => return Err(RowError::new("\"thought\" must be true or false")),
    };
    Ok((is_thought, text(part, "text")?))
}

fn object(value: &Value) -> Result<&Map<String, Value>, RowError> {
    value.as_object().ok_or_else(|| RowError::new("it must be an object"))
}

/// Refuses keys whose content would be lost.
fn refuse_keys(object: &Map<String, Value>, known: &[&str]) -> Result<(), RowError> {
    let mut keys = object.iter().filter(|(_, value)| !is_empty(value)).map(|(key, _)| key.as_str());
    match keys.find(|key| !known.contains(key)) {
        None => Ok(()),
        Some(key) => Err(RowError::of_kind(
            key,
            format!(
                "{key:?} cannot be used in rows of Gemini's format, of which only text can be trained on: remove the row, or convert it to \"messages\""
            ),
        )),
    }
}

#[cfg(test)]
mod tests {
    use finetune_contract::DatasetFormat;

    use crate::data::{
        conversation::Example,
        formats::{ReadOptions, read},
    };

    /// Shows the turns of a row, with its targets in brackets and its reasoning in braces.
    fn check(row: &str) -> String {
        let (format, example) = match read(row, &ReadOptions::for_format(DatasetFormat::Auto)) {
            Ok(read) => read,
            Err(errors) => return errors[0].to_string(),
        };
        assert_eq!(format, DatasetFormat::Messages);
        let Example::Chat(conversation) = example else { panic!("it is a conversation") };
        let turns = conversation.messages.iter().map(|turn| {
            let thought =
                turn.reasoning.as_ref().map_or(String::new(), |thought| format!("{{{thought}}}"));
            let said = format!("{}={thought}{}", turn.role.as_str(), turn.content);
            if turn.is_target { format!("[{said}]") } else { said }
        });
        turns.collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn turns_of_the_model_are_trained_on() {
        insta::assert_snapshot!(check(r#"{"contents": [{"role": "user", "parts": [{"text": "a"}]}, {"role": "model", "parts": [{"text": "b"}, {"text": "c"}]}]}"#), @"user=a [assistant=bc]");
        for key in ["systemInstruction", "system_instruction"] {
            let row = format!(
                r#"{{"{key}": {{"role": "system", "parts": [{{"text": "s"}}]}}, "contents": [{{"role": "user", "parts": [{{"text": "a"}}]}}, {{"role": "model", "parts": [{{"text": "hm", "thought": true}}, {{"text": "b", "thought": false}}]}}]}}"#
            );
            assert_eq!(check(&row), "system=s user=a [assistant={hm}b]");
        }
    }

    #[test]
    fn what_would_be_lost_is_refused() {
        insta::assert_snapshot!(check(r#"{"contents": [{"role": "user", "parts": [{"text": "a"}, {"inlineData": {"mimeType": "image/png", "data": "x"}}]}]}"#), @r#"contents[0]: parts[1]: "inlineData" cannot be used in rows of Gemini's format, of which only text can be trained on: remove the row, or convert it to "messages""#);
        insta::assert_snapshot!(check(r#"{"contents": [{"role": "assistant", "parts": [{"text": "b"}]}]}"#), @r#"contents[0]: the role "assistant" cannot be used in "contents": use user or model"#);
        insta::assert_snapshot!(check(r#"{"systemInstruction": {"parts": [{"text": "s"}, {"text": "hm", "thought": true}]}, "contents": [{"role": "model", "parts": [{"text": "b"}]}]}"#), @"systemInstruction: a part of the system is a thought: only the model can think");
        insta::assert_snapshot!(check(r#"{"contents": [{"role": "model", "parts": [{"text": "b"}]}], "mask": "model"}"#), @r#""mask" is "model", but only the user's turns can be left out that way: mark turns with "weight": 0 instead"#);
        insta::assert_snapshot!(check(r#"{"contents": [{"role": "model", "parts": []}]}"#), @"contents[0]: the model's parts have no text");
        insta::assert_snapshot!(check(r#"{"contents": [{"role": "model", "content": "b"}]}"#), @r#"contents[0]: "content" cannot be used in rows of Gemini's format, of which only text can be trained on: remove the row, or convert it to "messages""#);
        insta::assert_snapshot!(check(r#"{"contents": [{"role": "model", "parts": [{"text": "b"}]}], "tools": [{"functionDeclarations": []}]}"#), @r#""tools" of Gemini's rows cannot be used: convert the row to "messages" with "tool_calls""#);
        insta::assert_snapshot!(check(r#"{"contents": [{"role": "model", "parts": [{"text": "b"}]}], "messages": [{"role": "user", "content": "a"}]}"#), @r#""messages" and "contents" both hold the turns: keep one"#);
    }
}
