//! Parses rows of Stanford Alpaca, with the history that LLaMA-Factory added.

use serde_json::{Map, Value};

use crate::data::{
    conversation::{ChatRole, Conversation, Example, Message, WithoutTemplate},
    formats::{
        error::RowError,
        fields::{as_text, list, non_empty_text, non_null, optional_text, resolve_alias},
        messages,
    },
};

const INPUTS: [&str; 2] = ["input", "context"];
const OUTPUTS: [&str; 3] = ["output", "response", "answer"];

/// Parses a row. Instruction and input, if there is one, become the user turn.
pub(super) fn read(row: &Map<String, Value>) -> Result<Example, RowError> {
    let mut messages = history(row)?;
    let instruction = non_empty_text(row, "instruction")?;
    let input_key = resolve_alias(row, &INPUTS)?;
    let input = optional_text(row, input_key)?;
    let content = match &input {
        Some(input) => format!("{instruction}\n\n{input}"),
        None => instruction,
    };
    messages.push(Message::new(ChatRole::User, content));
    messages.push(Message::new(
        ChatRole::Assistant,
        non_empty_text(row, resolve_alias(row, &OUTPUTS)?)?,
    ));
    let conversation = messages::build_conversation(row, messages)?;
    let is_plain = conversation.tools.is_empty() && conversation.variables.is_empty();
    let without_template =
        if is_plain { WithoutTemplate::AlpacaPrompt { input } } else { WithoutTemplate::Refused };
    Ok(Example::Chat(Conversation { without_template, ..conversation }))
}

fn history(row: &Map<String, Value>) -> Result<Vec<Message>, RowError> {
    let Some(history) = non_null(row, "history") else { return Ok(Vec::new()) };
    let mut messages = Vec::new();
    for (index, exchange) in list(history, "history")?.iter().enumerate() {
        let both = exchange.as_array().and_then(|both| <&[Value; 2]>::try_from(&both[..]).ok());
        let Some([question, answer]) = both else {
            return Err(RowError::new("it must be a list of a question and its answer")
                .at("history", index));
        };
        let said = |value, what| as_text(value, what).map_err(|error| error.at("history", index));
        let (question, answer) = (said(question, "question")?, said(answer, "answer")?);
        if answer.is_empty() {
            return Err(RowError::new("the answer is empty").at("history", index));
        }
        messages.push(Message::new(ChatRole::User, question));
        messages.push(Message::new(ChatRole::Assistant, answer));
    }
    Ok(messages)
}
