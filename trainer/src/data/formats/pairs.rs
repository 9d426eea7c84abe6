//! Parses a prompt and its completion, as texts or as messages.

use finetune_contract::DatasetFormat;
use serde_json::{Map, Value};

use crate::data::{
    conversation::{ChatRole, Conversation, Example, Message},
    formats::{
        error::RowError,
        fields::{non_empty_text, required, resolve_alias, text},
        messages,
    },
};

/// The keys of a prompt, and of a completion.
const PROMPTS: [&str; 3] = ["prompt", "question", "query"];
const COMPLETIONS: [&str; 3] = ["completion", "response", "answer"];

/// Returns whether a row is a prompt and its completion.
pub(super) fn is_pair(row: &Map<String, Value>) -> bool {
    let has = |keys: [&str; 3]| keys.iter().any(|key| row.contains_key(*key));
    row.contains_key("prompt") || (has(PROMPTS) && has(COMPLETIONS))
}

/// Parses a pair of texts, or of message lists as in TRL.
pub(super) fn read(row: &Map<String, Value>, format: DatasetFormat) -> Result<Example, RowError> {
    let (prompt_key, completion_key) =
        (resolve_alias(row, &PROMPTS)?, resolve_alias(row, &COMPLETIONS)?);
    let has_turns = matches!(row.get(prompt_key), Some(Value::Array(_)))
        || matches!(row.get(completion_key), Some(Value::Array(_)));
    if has_turns && format != DatasetFormat::Prerendered {
        return read_messages(row, prompt_key, completion_key);
    }
    let prompt = text(row, prompt_key)?;
    let completion = non_empty_text(row, completion_key)?;
    if format == DatasetFormat::Prerendered {
        return Ok(Example::Prerendered { prompt, completion });
    }
    let messages = vec![
        Message::new(ChatRole::User, prompt.as_str()),
        Message::new(ChatRole::Assistant, completion.as_str()),
    ];
    let conversation = messages::build_conversation(row, messages)?;
    let has_more_than_texts = conversation.messages.len() > 2
        || !conversation.tools.is_empty()
        || !conversation.variables.is_empty();
    // Two texts alone can be used without a chat template, too.
    Ok(if has_more_than_texts {
        Example::Chat(conversation)
    } else {
        Example::PromptCompletion { prompt, completion }
    })
}

/// Parses a pair of message lists; only messages of the completion are targets.
fn read_messages(
    row: &Map<String, Value>,
    prompt_key: &str,
    completion_key: &str,
) -> Result<Example, RowError> {
    let part = |key: &str, role: ChatRole| match required(row, key)? {
        Value::String(text) => Ok(vec![Message::new(role, text.as_str())]),
        value => messages::read(value, key),
    };
    let mut messages = part(prompt_key, ChatRole::User)?;
    for message in &mut messages {
        message.is_target = false;
    }
    let completion = part(completion_key, ChatRole::Assistant)?;
    if let Some(index) = completion.iter().position(|message| message.role == ChatRole::System)
        && !messages.is_empty()
    {
        return Err(RowError::new("a system turn must be the first").at(completion_key, index));
    }
    messages.extend(completion);
    let conversation: Conversation = messages::build_conversation(row, messages)?;
    Ok(Example::Chat(conversation))
}
