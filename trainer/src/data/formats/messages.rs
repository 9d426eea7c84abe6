//! Parses conversations: lists of turns under `messages` or `conversations`.

use serde_json::{Map, Value};

use crate::data::{
    conversation::{ChatRole, Conversation, Message},
    formats::{
        check_keys, content,
        error::RowError,
        fields::{as_text, is_empty, list, non_null, optional_text, required, shortened},
        keys::KeyScope,
        targets, tools,
    },
};

/// Parses the list of turns at `key`.
pub(super) fn read(value: &Value, key: &str) -> Result<Vec<Message>, RowError> {
    let turns = list(value, key)?;
    let mut messages: Vec<Message> = Vec::with_capacity(turns.len());
    for (index, turn) in turns.iter().enumerate() {
        let message = read_turn(turn).map_err(|error| error.at(key, index))?;
        if message.role == ChatRole::System && index > 0 {
            return Err(RowError::new("a system turn must be the first").at(key, index));
        }
        messages.push(message);
    }
    Ok(messages)
}

/// Builds a conversation from messages and the other keys of the row: system prompt, tools and template
/// variables.
pub(super) fn build_conversation(
    row: &Map<String, Value>,
    messages: Vec<Message>,
) -> Result<Conversation, RowError> {
    let mut conversation = Conversation::new(messages);
    if let Some(system) = system(row)? {
        insert_system_prompt(&mut conversation.messages, system)?;
    }
    conversation.tools = tools::read_tools(row)?;
    match non_null(row, "chat_template_kwargs") {
        None => {}
        Some(Value::Object(variables)) => conversation.variables.clone_from(variables),
        Some(other) => {
            return Err(RowError::of_kind(
                "chat_template_kwargs",
                format!(
                    "\"chat_template_kwargs\" is {}, but it must be an object",
                    shortened(other)
                ),
            ));
        }
    }
    if let Some(documents) = non_null(row, "documents").filter(|value| !is_empty(value)) {
        let documents = Value::Array(list(documents, "documents")?);
        conversation.variables.insert("documents".to_owned(), documents);
    }
    conversation.variables.retain(|_, value| !value.is_null());
    for always in ["messages", "tools", "add_generation_prompt", "continue_final_message"] {
        if conversation.variables.contains_key(always) {
            return Err(RowError::new(format!(
                "\"chat_template_kwargs\" sets {always:?}, which the row itself defines: remove it from there"
            )));
        }
    }
    Ok(conversation)
}

fn system(row: &Map<String, Value>) -> Result<Option<String>, RowError> {
    let mut found: Option<String> = None;
    for key in ["system", "system_prompt", "system_message"] {
        match (optional_text(row, key)?, &found) {
            (Some(text), Some(other)) if text != *other => {
                return Err(RowError::new(format!(
                    "{key:?} and another key give different system prompts: keep one"
                )));
            }
            (Some(text), _) => found = Some(text),
            (None, _) => {}
        }
    }
    Ok(found)
}

fn insert_system_prompt(messages: &mut Vec<Message>, system: String) -> Result<(), RowError> {
    match messages.first() {
        Some(first) if first.role == ChatRole::System && first.content == system => {}
        Some(first) if first.role == ChatRole::System && first.content.is_empty() => {
            messages[0].content = system;
        }
        Some(first) if first.role == ChatRole::System => {
            return Err(RowError::new(
                "the row has a system prompt and a different one as its first turn: keep one",
            ));
        }
        _ => messages.insert(0, Message::new(ChatRole::System, system)),
    }
    Ok(())
}

/// The kind of a turn, which its role determines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A message of this role.
    Message(ChatRole),
    /// The content is the JSON of tool calls.
    Calls,
}

/// Maps a role to that of chat templates; ShareGPT and the sites it was collected from use other names.
fn role(name: &str) -> Result<Kind, RowError> {
    Ok(match name {
        "system" | "developer" => Kind::Message(ChatRole::System),
        "user" | "human" => Kind::Message(ChatRole::User),
        "assistant" | "gpt" | "chatgpt" | "model" | "bot" | "bing" | "bard" | "claude"
        | "gemini" | "ai" => Kind::Message(ChatRole::Assistant),
        "tool" | "function" | "observation" | "tool_response" | "function_response"
        | "tool_result" | "ipython" => Kind::Message(ChatRole::Tool),
        "function_call" | "tool_call" => Kind::Calls,
        other => {
            return Err(RowError::of_kind(
                format!("role {other}"),
                format!("the role {other:?} is unknown: use system, user, assistant or tool"),
            ));
        }
    })
}

/// Returns the one of two synonymous keys that a turn uses.
fn resolve_key_pair<'a>(
    turn: &'a Map<String, Value>,
    key: &'static str,
    other: &'static str,
) -> Result<Option<(&'static str, &'a Value)>, RowError> {
    match (non_null(turn, key), non_null(turn, other)) {
        (Some(value), None) => Ok(Some((key, value))),
        (None, Some(value)) => Ok(Some((other, value))),
        (None, None) => Ok(None),
        (Some(one), Some(two)) if one == two => Ok(Some((key, one))),
        (Some(_), Some(_)) => Err(RowError::new(format!("{key:?} and {other:?} differ: keep one"))),
    }
}

fn read_turn(turn: &Value) -> Result<Message, RowError> {
    let Some(turn) = turn.as_object() else {
        return Err(RowError::new("a turn must be an object"));
    };
    let given_keys = turn.iter().filter(|(_, value)| !is_empty(value));
    let mut refused =
        given_keys.filter_map(|(key, _)| check_keys::refusal_of_key(KeyScope::Turn, key));
    if let Some(error) = refused.next() {
        return Err(error);
    }
    let Some((role_key, role_value)) = resolve_key_pair(turn, "role", "from")? else {
        let key = if turn.contains_key("value") { "from" } else { "role" };
        return Err(required(turn, key)
            .err()
            .unwrap_or_else(|| RowError::new(format!("{key:?} is null: a turn needs a role"))));
    };
    let kind = role(&as_text(role_value, role_key)?)?;
    let said = resolve_key_pair(turn, "content", "value")?;
    let (content_key, said) = said.map_or(("content", None), |(key, value)| (key, Some(value)));
    let content = said.map(|value| content::read(value, content_key)).transpose()?;
    let content = content.unwrap_or_default();
    let mut message = match kind {
        Kind::Message(role) => Message::new(role, content.text),
        Kind::Calls => {
            let mut message = Message::new(ChatRole::Assistant, "");
            message.tool_calls = tools::read_call_text(&content.text)?;
            message
        }
    };
    message.reasoning = reasoning(turn, content.reasoning)?;
    message.name = optional_text(turn, "name")?;
    message.tool_call_id = optional_text(turn, "tool_call_id")?;
    let calls = tools::read_calls(turn)?;
    if !calls.is_empty() && !message.tool_calls.is_empty() {
        return Err(RowError::new("the role of the turn and \"tool_calls\" both define calls"));
    }
    message.tool_calls.extend(calls);
    targets::apply_mark(&mut message, targets::training_mark(turn)?)?;
    check(&message, content_key, said.is_none() && !turn.contains_key(content_key), turn)?;
    Ok(message)
}

/// Checks that a turn has content and only what its role allows.
fn check(
    message: &Message,
    content_key: &str,
    is_silent: bool,
    turn: &Map<String, Value>,
) -> Result<(), RowError> {
    let role = message.role.as_str();
    if message.role != ChatRole::Assistant {
        for (what, is_there) in [
            ("reasoning", message.reasoning.is_some()),
            ("tool calls", !message.tool_calls.is_empty()),
        ] {
            if is_there {
                return Err(RowError::new(format!(
                    "the turn has {what}, but its role is {role}: only turns of the assistant can have them"
                )));
            }
        }
        if is_silent {
            let key = if turn.contains_key("from") { "value" } else { content_key };
            return required(turn, key).map(|_| ());
        }
        return Ok(());
    }
    let says_nothing = message.content.is_empty() && message.tool_calls.is_empty();
    if says_nothing && message.reasoning.is_none() && message.is_target {
        if is_silent {
            let key = if turn.contains_key("from") { "value" } else { content_key };
            return Err(required(turn, key)
                .err()
                .unwrap_or_else(|| RowError::new(format!("the assistant's {key} is empty"))));
        }
        return Err(RowError::new(format!("the assistant's {content_key} is empty")));
    }
    Ok(())
}

/// Returns the reasoning of a turn, under any of its keys or from a content part.
fn reasoning(turn: &Map<String, Value>, part: Option<String>) -> Result<Option<String>, RowError> {
    let mut found = part;
    for key in ["reasoning_content", "reasoning", "thinking"] {
        match (optional_text(turn, key)?, &found) {
            (Some(text), Some(other)) if text != *other => {
                return Err(RowError::new(format!(
                    "{key:?} and another key give different reasoning for one turn: keep one"
                )));
            }
            (Some(text), _) => found = Some(text),
            (None, _) => {}
        }
    }
    Ok(found)
}
