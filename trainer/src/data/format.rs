//! What a row says, in any of the shapes people have.

use finetune_contract::DatasetFormat;
use serde_json::{Map, Value};

use super::conversation::{ChatRole, Conversation, Example, Message, WithoutTemplate};

/// The shapes `auto` finds, with the key that gives each away.
const SIGNATURES: [(&str, DatasetFormat); 5] = [
    ("messages", DatasetFormat::Messages),
    ("conversations", DatasetFormat::Sharegpt),
    ("prompt", DatasetFormat::PromptCompletion),
    ("instruction", DatasetFormat::Alpaca),
    // Last: the original Alpaca rows have a `text` beside their parts.
    ("text", DatasetFormat::Text),
];

/// Parts of a turn or row that no template is given, so that training would silently lose them.
const UNSUPPORTED: [&str; 6] =
    ["tool_calls", "function_call", "reasoning_content", "thinking", "tools", "functions"];

/// Finds the shape of a row by its keys.
///
/// # Errors
/// A text that lists the keys seen and those known.
pub fn detect(row: &Map<String, Value>) -> Result<DatasetFormat, String> {
    if let Some((_, format)) = SIGNATURES.iter().find(|(key, _)| row.contains_key(*key)) {
        return Ok(*format);
    }
    let known: Vec<&str> = SIGNATURES.iter().map(|(key, _)| *key).collect();
    let near = row.keys().find_map(|key| nearest(key, &known).map(|known| (key, known)));
    let hint = near.map_or(String::new(), |(key, known)| {
        format!(" (did you mean {known:?} instead of {key:?}?)")
    });
    Err(format!(
        "the row has the keys {}, none of which is {}{hint}",
        list(row.keys().map(String::as_str)),
        list(known.into_iter()),
    ))
}

/// Reads a row of a shape; `Auto` is detected.
///
/// # Errors
/// A text that says what is wrong with it.
pub fn read(text: &str, format: DatasetFormat) -> Result<(DatasetFormat, Example), String> {
    let row = match serde_json::from_str(text) {
        Ok(Value::Object(row)) => row,
        Ok(Value::Array(_)) => {
            return Err(
                "the line is a JSON array: write one object `{…}` per line instead".to_owned()
            );
        }
        Ok(_) => return Err("the line is JSON but no object `{…}`".to_owned()),
        Err(error) if text.trim_start().starts_with('[') => {
            return Err(format!(
                "the line is not JSON by itself ({error}): this looks like a JSON array; write one object per line instead"
            ));
        }
        Err(error) => return Err(format!("the line is not JSON: {}", without_line(&error))),
    };
    let format = if format == DatasetFormat::Auto { detect(&row)? } else { format };
    let example = match format {
        DatasetFormat::Auto => return Err("the shape of the rows is unknown".to_owned()),
        DatasetFormat::Messages => {
            Example::Chat(Conversation::new(turns(&row, "messages", "role", "content")?))
        }
        DatasetFormat::Sharegpt => {
            Example::Chat(Conversation::new(turns(&row, "conversations", "from", "value")?))
        }
        DatasetFormat::PromptCompletion => {
            let (prompt, completion) = (string(&row, "prompt")?, string(&row, "completion")?);
            Example::PromptCompletion { prompt, completion: filled(completion, "completion")? }
        }
        DatasetFormat::Text => Example::Text(filled(string(&row, "text")?, "text")?),
        DatasetFormat::Alpaca => alpaca(&row)?,
    };
    Ok((format, example))
}

/// Every line of the file is on one line, so serde's "line 1" only confuses.
fn without_line(error: &serde_json::Error) -> String {
    error.to_string().replace("line 1 column", "column")
}

fn turns(
    row: &Map<String, Value>,
    key: &str,
    role_key: &str,
    content_key: &str,
) -> Result<Vec<Message>, String> {
    let Some(list) = field(row, key)?.as_array() else {
        return Err(format!("{key:?} must be a list of turns"));
    };
    refuse_unsupported(row)?;
    let messages = list
        .iter()
        .enumerate()
        .map(|(index, turn)| {
            let at = |reason: String| format!("{key}[{index}]: {reason}");
            let turn = turn.as_object().ok_or_else(|| at("it must be an object".to_owned()))?;
            refuse_unsupported(turn).map_err(at)?;
            let role = role(&string(turn, role_key).map_err(at)?).map_err(at)?;
            let content = string(turn, content_key).map_err(at)?;
            if content.is_empty() && role == ChatRole::Assistant {
                return Err(at(format!("the assistant's {content_key} is empty")));
            }
            Ok(Message::new(role, content))
        })
        .collect::<Result<Vec<_>, String>>()?;
    if let Some(index) =
        messages.iter().skip(1).position(|message| message.role == ChatRole::System)
    {
        return Err(format!("{key}[{}]: a system turn must be the first", index + 1));
    }
    if messages.iter().all(|message| message.role != ChatRole::Assistant) {
        return Err(format!("{key:?} has no assistant turn, so there is nothing to train on"));
    }
    Ok(messages)
}

fn refuse_unsupported(object: &Map<String, Value>) -> Result<(), String> {
    let is_empty = |value: &Value| {
        value.is_null() || value.as_array().is_some_and(Vec::is_empty) || value.as_str() == Some("")
    };
    let mut parts = UNSUPPORTED.iter().filter_map(|part| object.get_key_value(*part));
    if let Some((part, _)) = parts.find(|(_, value)| !is_empty(value)) {
        return Err(format!(
            "{part:?} is not supported and would be lost: leave the row out, or write what the model should say into the text"
        ));
    }
    // OpenAI's way of leaving an assistant turn out of the loss.
    match object.get("weight") {
        Some(weight) if weight.as_f64() != Some(1.0) => Err(format!(
            "\"weight\" is {weight}, but every assistant turn is trained on: only 1 is supported"
        )),
        _ => Ok(()),
    }
}

/// Names a role as chat templates do; ShareGPT has names of its own.
fn role(name: &str) -> Result<ChatRole, String> {
    match name {
        "system" | "developer" => Ok(ChatRole::System),
        "user" | "human" => Ok(ChatRole::User),
        "assistant" | "gpt" | "model" | "bot" => Ok(ChatRole::Assistant),
        "tool" | "function" | "observation" => Ok(ChatRole::Tool),
        other => Err(format!("the role {other:?} is unknown: use system, user, assistant or tool")),
    }
}

/// # Source
/// The prompt of Stanford Alpaca is a user turn here: instruction, then the input if there is one.
fn alpaca(row: &Map<String, Value>) -> Result<Example, String> {
    let instruction = filled(string(row, "instruction")?, "instruction")?;
    let input = if row.contains_key("input") { string(row, "input")? } else { String::new() };
    let content = if input.is_empty() { instruction } else { format!("{instruction}\n\n{input}") };
    let output = filled(string(row, "output")?, "output")?;
    let mut messages =
        vec![Message::new(ChatRole::User, content), Message::new(ChatRole::Assistant, output)];
    if row.contains_key("system") {
        let system = string(row, "system")?;
        if !system.is_empty() {
            messages.insert(0, Message::new(ChatRole::System, system));
        }
    }
    Ok(Example::Chat(Conversation {
        without_template: WithoutTemplate::AlpacaPrompt,
        ..Conversation::new(messages)
    }))
}

fn field<'a>(row: &'a Map<String, Value>, key: &str) -> Result<&'a Value, String> {
    row.get(key).ok_or_else(|| {
        let hint = row
            .keys()
            .find(|found| nearest(found, &[key]).is_some())
            .map_or(String::new(), |found| {
                format!(" (did you mean {key:?} instead of {found:?}?)")
            });
        format!("{key:?} is missing{hint}")
    })
}

fn string(row: &Map<String, Value>, key: &str) -> Result<String, String> {
    match field(row, key)? {
        Value::String(text) => Ok(text.clone()),
        Value::Null => Err(format!("{key:?} is null, it must be a string")),
        Value::Array(_) => {
            Err(format!("{key:?} is a list: only text can be trained on, so it must be a string"))
        }
        other => Err(format!("{key:?} is {other}, it must be a string")),
    }
}

fn filled(text: String, key: &str) -> Result<String, String> {
    if text.is_empty() { Err(format!("{key:?} is empty")) } else { Ok(text) }
}

/// Returns the known word a misspelt one most likely means.
pub fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    known
        .iter()
        .map(|known| (strsim::damerau_levenshtein(word, known), *known))
        .filter(|&(distance, known)| distance > 0 && distance <= 1 + known.len() / 5)
        .min()
        .map(|(_, known)| known)
}

fn list<'a>(words: impl Iterator<Item = &'a str>) -> String {
    words.take(12).map(|word| format!("{word:?}")).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str) -> String {
        check_as(text, DatasetFormat::Auto)
    }

    fn check_as(text: &str, format: DatasetFormat) -> String {
        match read(text, format) {
            Ok((format, Example::Chat(Conversation { messages, .. }))) => {
                let turns: Vec<_> = messages
                    .iter()
                    .map(|turn| format!("{}={}", turn.role.as_str(), turn.content))
                    .collect();
                format!("{format:?}: {}", turns.join(" "))
            }
            Ok((format, example)) => format!("{format:?}: {example:?}"),
            Err(reason) => reason,
        }
    }

    #[test]
    fn finds_every_shape_by_its_keys() {
        insta::assert_snapshot!(check(r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#), @"Messages: user=a assistant=b");
        insta::assert_snapshot!(check(r#"{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}"#), @"Sharegpt: user=a assistant=b");
        insta::assert_snapshot!(check(r#"{"instruction": "a", "input": "x", "output": "b"}"#), @r"
        Alpaca: user=a

        x assistant=b
        ");
        insta::assert_snapshot!(check(r#"{"prompt": "a", "completion": "b"}"#), @r#"PromptCompletion: PromptCompletion { prompt: "a", completion: "b" }"#);
        insta::assert_snapshot!(check(r#"{"text": "a"}"#), @r#"Text: Text("a")"#);
    }

    #[test]
    fn original_alpaca_rows_are_no_plain_text() {
        insta::assert_snapshot!(check(r#"{"instruction": "a", "input": "", "output": "b", "text": "Below is … a … b"}"#), @"Alpaca: user=a assistant=b");
    }

    #[test]
    fn never_loses_parts_of_a_turn_silently() {
        let turn = |extra: &str| {
            check(&format!(
                r#"{{"messages": [{{"role": "user", "content": "a"}}, {{"role": "assistant", "content": "b", {extra}}}]}}"#
            ))
        };
        insta::assert_snapshot!(turn(r#""tool_calls": [{"id": 1}]"#), @r#"messages[1]: "tool_calls" is not supported and would be lost: leave the row out, or write what the model should say into the text"#);
        insta::assert_snapshot!(turn(r#""weight": 0"#), @r#"messages[1]: "weight" is 0, but every assistant turn is trained on: only 1 is supported"#);
        insta::assert_snapshot!(turn(r#""weight": 1, "tool_calls": null, "name": "x""#), @"Messages: user=a assistant=b");
    }

    #[test]
    fn says_what_is_wrong_with_a_row() {
        insta::assert_snapshot!(check(r#"{"message": []}"#), @r#"the row has the keys "message", none of which is "messages", "conversations", "prompt", "instruction", "text" (did you mean "messages" instead of "message"?)"#);
        insta::assert_snapshot!(check_as(r#"{"message": []}"#, DatasetFormat::Messages), @r#""messages" is missing (did you mean "messages" instead of "message"?)"#);
        insta::assert_snapshot!(check("[{"), @r"the line is not JSON by itself (EOF while parsing an object at line 1 column 2): this looks like a JSON array; write one object per line instead");
        insta::assert_snapshot!(check(r#"{"text": "a",}"#), @"the line is not JSON: trailing comma at column 14");
        insta::assert_snapshot!(check(r#"[{"text": "a"}]"#), @"the line is a JSON array: write one object `{…}` per line instead");
        insta::assert_snapshot!(check("3"), @"the line is JSON but no object `{…}`");
        insta::assert_snapshot!(check(r#"{"text": ""}"#), @r#""text" is empty"#);
        insta::assert_snapshot!(check(r#"{"prompt": "a", "completion": null}"#), @r#""completion" is null, it must be a string"#);
    }

    #[test]
    fn says_what_is_wrong_with_a_conversation() {
        let turns = |list: &[(&str, &str)]| {
            let turns: Vec<_> = list
                .iter()
                .map(|(role, content)| format!(r#"{{"role": "{role}", "content": "{content}"}}"#))
                .collect();
            check(&format!(r#"{{"messages": [{}]}}"#, turns.join(", ")))
        };
        insta::assert_snapshot!(turns(&[("user", "a")]), @r#""messages" has no assistant turn, so there is nothing to train on"#);
        insta::assert_snapshot!(turns(&[("usr", "a")]), @r#"messages[0]: the role "usr" is unknown: use system, user, assistant or tool"#);
        insta::assert_snapshot!(turns(&[("user", "a"), ("system", "b"), ("assistant", "c")]), @"messages[1]: a system turn must be the first");
        insta::assert_snapshot!(turns(&[("user", "a"), ("assistant", "")]), @"messages[1]: the assistant's content is empty");
        insta::assert_snapshot!(check(r#"{"messages": [{"role": "user", "content": [{"type": "image"}]}]}"#), @r#"messages[0]: "content" is a list: only text can be trained on, so it must be a string"#);
        insta::assert_snapshot!(check(r#"{"messages": {}}"#), @r#""messages" must be a list of turns"#);
    }
}
