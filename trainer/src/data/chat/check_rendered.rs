//! What was given, looked for in what was rendered: templates leave things out without a word.

use serde_json::Value;

use crate::data::{
    chat::turns::Text,
    conversation::{ChatRole, Conversation, Message},
};

/// Checks that a text has what its messages say, and the tools.
///
/// A thought inside the content of an earlier turn may be missing: templates leave old thoughts out
/// for servers too.
///
/// # Errors
/// A text that names the turn, its role and what is missing.
pub(crate) fn check(conversation: &Conversation, rendered: &Text) -> Result<(), String> {
    let text = rendered.text.as_str();
    let mut finder = Finder::new(text);
    for (index, message) in conversation.messages[..rendered.until].iter().enumerate() {
        let turn = rendered.turns.iter().find(|turn| turn.index == index);
        let missing = |what: &str| {
            let role = message.role.as_str();
            let consequence = if turn.is_some() {
                "it would not be trained on"
            } else {
                "the model would never see it"
            };
            format!(
                "the chat template leaves {what} of turn {index} ({role}) out, so {consequence}: {}",
                advice(message, what)
            )
        };
        let content = message.content.as_str();
        // A template that marks what is generated may do so in several blocks for one turn.
        let place = match turn {
            Some(turn) if !rendered.is_marked => &text[turn.span.clone()],
            _ => text,
        };
        if turn.is_some() {
            let mut finder = Finder::new(place);
            for part in content.split("<think>").flat_map(|part| part.split("</think>")) {
                if !finder.finds(part) {
                    return Err(missing(&quoted(part)));
                }
            }
            let thought = message.reasoning.as_deref().unwrap_or_default();
            if !Finder::new(place).finds(thought) {
                return Err(missing("the reasoning"));
            }
        } else {
            let said = content.rsplit("</think>").next().unwrap_or_default();
            if !finder.finds(said) {
                return Err(missing(&quoted(said)));
            }
        }
        for call in &message.tool_calls {
            let found = Finder::new(place).finds(&call.name) && has_leaves(place, &call.arguments);
            if !found {
                return Err(missing(&format!("the call of {:?}", call.name)));
            }
        }
    }
    for tool in &conversation.tools {
        let name = tool.pointer("/function/name").or_else(|| tool.get("name"));
        if let Some(name) = name.and_then(Value::as_str)
            && !Finder::new(text).finds(name)
        {
            return Err(format!(
                "the chat template shows no tools, so the model would never see {name:?}: leave \"tools\" out, or set dataset.chatTemplate to a template with tools"
            ));
        }
    }
    Ok(())
}

fn advice(message: &Message, what: &str) -> &'static str {
    match message.role {
        ChatRole::Assistant if what == "the reasoning" || message.content.contains("</think>") => {
            "set dataset.reasoning to drop to train without thoughts, or dataset.chatTemplate to a template that prints them"
        }
        ChatRole::System => {
            "put it into the first user turn, or set dataset.chatTemplate to a template with a system turn"
        }
        _ => "leave it out of the rows, or set dataset.chatTemplate to a template that prints it",
    }
}

fn quoted(part: &str) -> String {
    const SHOWN: usize = 40;
    let part = part.trim();
    if part.chars().count() <= SHOWN {
        return format!("{part:?}");
    }
    format!("{:?}…", part.chars().take(SHOWN).collect::<String>())
}

/// Tells whether each text and number in the arguments of a call is printed.
fn has_leaves(text: &str, value: &Value) -> bool {
    match value {
        Value::Array(items) => items.iter().all(|item| has_leaves(text, item)),
        Value::Object(fields) => {
            fields.iter().all(|(key, item)| Finder::new(text).finds(key) && has_leaves(text, item))
        }
        Value::String(leaf) => Finder::new(text).finds(leaf),
        // `1.0` may be printed as `1`, `true` as `True`.
        Value::Number(_) | Value::Bool(_) | Value::Null => true,
    }
}

/// Finds one part after the other.
struct Finder<'a> {
    text: &'a str,
    from: usize,
    /// The letters and digits of the text, made when they are first needed.
    bare: Option<String>,
}

impl<'a> Finder<'a> {
    fn new(text: &'a str) -> Self {
        Self { text, from: 0, bare: None }
    }

    /// Tells whether the text has a part: after the parts before if it can be, else anywhere, and
    /// at last as JSON, quoted or indented in another way.
    fn finds(&mut self, part: &str) -> bool {
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
        let bare = bare(part);
        !bare.is_empty() && self.bare.get_or_insert_with(|| self::bare(self.text)).contains(&bare)
    }
}

fn bare(text: &str) -> String {
    text.chars().filter(|character| character.is_alphanumeric()).collect()
}
