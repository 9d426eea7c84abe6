//! Checks that a rendered text contains everything its conversation says: chat templates drop parts
//! silently.

use serde_json::Value;

use crate::data::{
    chat::assistant_spans::RenderedText,
    conversation::{ChatRole, Conversation, Message},
};

/// Checks that a text contains its messages and the tools.
///
/// Reasoning in the content of an earlier turn may be missing, because templates drop it for servers
/// as well.
///
/// # Errors
/// A message that names the turn, its role and what is missing.
pub(crate) fn check(conversation: &Conversation, rendered: &RenderedText) -> Result<(), String> {
    let text = rendered.text.as_str();
    let mut finder = TextFinder::new(text);
    for (index, message) in conversation.messages[..rendered.message_count].iter().enumerate() {
        let span = rendered.spans.iter().find(|span| span.message_index == index);
        let missing = |what: &str| {
            let role = message.role.as_str();
            let consequence = if span.is_some() {
                "it would not be trained on"
            } else {
                "the model would never see it"
            };
            format!(
                "the chat template leaves out {what} of turn {index} ({role}), so {consequence}: {}",
                advice(message, what)
            )
        };
        let content = message.content.as_str();
        // With `{% generation %}` blocks, one turn may have several spans, so search the whole text.
        let searched = match span {
            Some(span) if !rendered.is_marked => &text[span.range.clone()],
            _ => text,
        };
        if span.is_some() {
            let mut finder = TextFinder::new(searched);
            for part in content.split("<think>").flat_map(|part| part.split("</think>")) {
                if !finder.find(part) {
                    return Err(missing(&quoted(part)));
                }
            }
            let reasoning = message.reasoning.as_deref().unwrap_or_default();
            if !TextFinder::new(searched).find(reasoning) {
                return Err(missing("the reasoning"));
            }
        } else {
            let answer = content.rsplit("</think>").next().unwrap_or_default();
            if !finder.find(answer) {
                return Err(missing(&quoted(answer)));
            }
        }
        for call in &message.tool_calls {
            let found = TextFinder::new(searched).find(&call.name)
                && contains_arguments(searched, &call.arguments);
            if !found {
                return Err(missing(&format!("the call of {:?}", call.name)));
            }
        }
    }
    for tool in &conversation.tools {
        let name = tool.pointer("/function/name").or_else(|| tool.get("name"));
        if let Some(name) = name.and_then(Value::as_str)
            && !TextFinder::new(text).find(name)
        {
            return Err(format!(
                "the chat template shows no tools, so the model would never see {name:?}: remove \"tools\", or set dataset.chatTemplate to a template with tools"
            ));
        }
    }
    Ok(())
}

fn advice(message: &Message, what: &str) -> &'static str {
    match message.role {
        ChatRole::Assistant if what == "the reasoning" || message.content.contains("</think>") => {
            "set dataset.reasoning to drop to train without reasoning, or dataset.chatTemplate to a template that prints it"
        }
        ChatRole::System => {
            "move it into the first user turn, or set dataset.chatTemplate to a template with a system turn"
        }
        _ => "remove it from the rows, or set dataset.chatTemplate to a template that prints it",
    }
}

fn quoted(part: &str) -> String {
    const MAX_CHARACTERS: usize = 40;
    let part = part.trim();
    if part.chars().count() <= MAX_CHARACTERS {
        return format!("{part:?}");
    }
    format!("{:?}…", part.chars().take(MAX_CHARACTERS).collect::<String>())
}

/// Returns whether a text contains every key and string in the arguments of a call.
fn contains_arguments(text: &str, value: &Value) -> bool {
    match value {
        Value::Array(items) => items.iter().all(|item| contains_arguments(text, item)),
        Value::Object(fields) => fields
            .iter()
            .all(|(key, item)| TextFinder::new(text).find(key) && contains_arguments(text, item)),
        Value::String(leaf) => TextFinder::new(text).find(leaf),
        // Not compared: `1.0` may be printed as `1`, and `true` as `True`.
        Value::Number(_) | Value::Bool(_) | Value::Null => true,
    }
}

/// Finds parts of a text, one after the other.
struct TextFinder<'a> {
    text: &'a str,
    from: usize,
    /// The letters and digits of the text, computed when they are first needed.
    alphanumeric: Option<String>,
}

impl<'a> TextFinder<'a> {
    fn new(text: &'a str) -> Self {
        Self { text, from: 0, alphanumeric: None }
    }

    /// Returns whether the text contains a part: preferably after the previous part, otherwise anywhere,
    /// escaped as JSON, or with other punctuation and white space.
    fn find(&mut self, part: &str) -> bool {
        let part = part.trim();
        if let Some(start) = self.text[self.from..].find(part) {
            self.from += start + part.len();
            return true;
        }
        if self.text.contains(part) {
            return true;
        }
        let escaped = Value::from(part).to_string();
        if self.text.contains(&escaped[1..escaped.len() - 1]) {
            return true;
        }
        let alphanumeric = alphanumeric(part);
        !alphanumeric.is_empty()
            && self
                .alphanumeric
                .get_or_insert_with(|| self::alphanumeric(self.text))
                .contains(&alphanumeric)
    }
}

fn alphanumeric(text: &str) -> String {
    text.chars().filter(|character| character.is_alphanumeric()).collect()
}
