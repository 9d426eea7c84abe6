//! A compiled chat template, rendered as in transformers.

use std::{collections::BTreeMap, ops::Range};

use jiff::civil::Date;
use minijinja::{Value, value::Serde};

use crate::data::{
    chat::jinja::{GENERATION_END, GENERATION_START, Program},
    conversation::{Conversation, Message},
};

/// The sources of the chat templates of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sources {
    /// The template for conversations.
    pub default: String,
    /// The template for conversations with tools, if the model has a separate one.
    pub tool_use: Option<String>,
}

/// A compiled chat template.
#[derive(Debug)]
pub struct Template {
    default: Program,
    tool_use: Option<Program>,
    special_tokens: Vec<(String, Value)>,
}

/// A rendered conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// The text.
    pub text: String,
    /// Byte ranges inside `{% generation %}` blocks; empty if the template has none.
    pub generation: Vec<Range<usize>>,
}

/// A conversation converted to template values once, so that parts of it can be rendered cheaply.
#[derive(Debug, Clone)]
pub struct Chat {
    /// The messages.
    pub messages: Vec<Value>,
    tools: Value,
    variables: Vec<(String, Value)>,
    has_tools: bool,
}

impl Chat {
    /// Converts a conversation.
    pub fn new(conversation: &Conversation) -> Self {
        let Conversation { messages, tools, variables, .. } = conversation;
        let variables =
            variables.iter().map(|(name, value)| (name.clone(), Value::from(Serde(value))));
        Self {
            messages: messages.iter().map(message_value).collect(),
            // As transformers: templates test `tools is not none`.
            tools: if tools.is_empty() { Value::from(()) } else { Value::from(Serde(tools)) },
            variables: variables.collect(),
            has_tools: !tools.is_empty(),
        }
    }
}

/// Converts a message.
pub fn message_value(message: &Message) -> Value {
    Value::from(Serde(message))
}

impl Template {
    /// Compiles a template with a fixed date; `special_tokens` are variables such as
    /// (`bos_token`, `<s>`).
    ///
    /// # Errors
    /// A message that says what is wrong, and on which line.
    pub fn compile(
        sources: &Sources,
        special_tokens: &[(String, String)],
        today: Date,
    ) -> Result<Self, String> {
        let tool_use = sources.tool_use.as_deref();
        let special_tokens =
            special_tokens.iter().map(|(name, token)| (name.clone(), Value::from(token.as_str())));
        Ok(Self {
            default: Program::compile(&sources.default, today)?,
            tool_use: tool_use.map(|source| Program::compile(source, today)).transpose()?,
            special_tokens: special_tokens.collect(),
        })
    }

    /// Returns whether the template marks what the assistant generates, with `{% generation %}` blocks.
    pub fn marks_generation(&self, chat: &Chat) -> bool {
        self.program(chat).marks_generation
    }

    fn programs(&self) -> impl Iterator<Item = &Program> {
        [Some(&self.default), self.tool_use.as_ref()].into_iter().flatten()
    }

    /// Returns whether a text rendered since [`Template::reset_printed_date`] contains the date.
    pub fn has_printed_date(&self) -> bool {
        self.programs().any(Program::has_printed_date)
    }

    /// Forgets whether the date was printed.
    pub fn reset_printed_date(&self) {
        self.programs().for_each(Program::reset_printed_date);
    }

    fn program(&self, chat: &Chat) -> &Program {
        self.tool_use.as_ref().filter(|_| chat.has_tools).unwrap_or(&self.default)
    }

    /// Renders messages with the tools and variables of the conversation.
    ///
    /// # Errors
    /// The message of an error that the template raised or ran into.
    pub fn render(
        &self,
        chat: &Chat,
        messages: Vec<Value>,
        add_generation_prompt: bool,
    ) -> Result<Rendered, String> {
        let program = self.program(chat);
        let all_variables = self.special_tokens.iter().chain(&chat.variables);
        let mut variables: BTreeMap<&str, Value> =
            all_variables.map(|(name, value)| (name.as_str(), value.clone())).collect();
        variables.insert("messages", Value::from(messages));
        variables.insert("add_generation_prompt", Value::from(add_generation_prompt));
        variables.insert("tools", chat.tools.clone());
        variables.entry("documents").or_insert_with(|| Value::from(()));
        let text = program.render(Value::from_pairs(variables))?;
        if program.marks_generation {
            Ok(extract_marks(&text))
        } else {
            Ok(Rendered { text, generation: Vec::new() })
        }
    }
}

/// Refuses turns that contain a character which serves as a mark during rendering.
///
/// # Errors
/// A message that names the turn and the character.
pub fn refuse_marks(messages: &[Message], marks: &[char]) -> Result<(), String> {
    for (index, message) in messages.iter().enumerate() {
        let mut characters = message.texts().flat_map(str::chars);
        if let Some(mark) = characters.find(|character| marks.contains(character)) {
            return Err(format!(
                "turn {index} has the private-use character {}, which marks turns while they are rendered: remove it",
                mark.escape_unicode()
            ));
        }
    }
    Ok(())
}

/// The marks of `{% generation %}` blocks.
pub const GENERATION_MARKS: [char; 2] = [GENERATION_START, GENERATION_END];

fn extract_marks(marked: &str) -> Rendered {
    let mut text = String::with_capacity(marked.len());
    let mut generation = Vec::new();
    let mut start = None;
    for character in marked.chars() {
        match character {
            GENERATION_START => start = Some(text.len()),
            GENERATION_END => generation.extend(start.take().map(|start| start..text.len())),
            other => text.push(other),
        }
    }
    generation.extend(start.map(|start| start..text.len()));
    Rendered { text, generation }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::conversation::ChatRole;

    fn render(source: &str) -> String {
        let special = [("bos_token".to_owned(), "<s>".to_owned())];
        let sources = Sources { default: source.to_owned(), tool_use: None };
        let conversation = Conversation::new(vec![
            Message::new(ChatRole::User, " a<b "),
            Message::new(ChatRole::Assistant, "c"),
        ]);
        let chat = Chat::new(&conversation);
        let rendered = Template::compile(&sources, &special, jiff::civil::date(2025, 1, 1))
            .and_then(|template| template.render(&chat, chat.messages.clone(), false));
        match rendered {
            Ok(Rendered { text, generation }) => {
                let generated: Vec<&str> =
                    generation.into_iter().map(|range| &text[range]).collect();
                format!("{text:?} {generated:?}")
            }
            Err(reason) => reason,
        }
    }

    #[test]
    fn renders_as_transformers_does() {
        insta::assert_snapshot!(render("{{ bos_token }}\n{% for m in messages %}\n  {% if m.role == 'user' %}\n[{{ m['content'].strip() }}]\n{% endif %}\n{% endfor %}"), @r#""<s>\n[a<b]\n" []"#);
        insta::assert_snapshot!(render("{{ messages[0] | tojson }}"), @r#""{\"role\": \"user\", \"content\": \" a<b \"}" []"#);
        insta::assert_snapshot!(render("{% for m in messages %}{% if loop.last %}{% continue %}{% endif %}{{ m.content.upper() }}{% endfor %}"), @r#"" A<B " []"#);
    }

    #[test]
    fn generation_blocks_leave_no_trace_in_the_text() {
        insta::assert_snapshot!(render("{% for m in messages %}\n{% if m.role == 'assistant' %}\n{% generation %}\n{{ m.content }}!\n{% endgeneration %}\n{% else %}\n{{ m.content }}\n{% endif %}\n{% endfor %}"), @r#"" a<b \nc!\n" ["c!\n"]"#);
        insta::assert_snapshot!(render("x {%- generation -%} y {%- endgeneration -%} z"), @r#""xyz" ["y"]"#);
    }

    #[test]
    fn reports_errors_of_templates() {
        insta::assert_snapshot!(render("{{ raise_exception('roles must alternate') }}"), @"roles must alternate (line 1 of the template)");
        insta::assert_snapshot!(render("{% for m in %}"), @"unexpected end of block (line 1 of the template)");
    }
}
