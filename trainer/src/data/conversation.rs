//! The content of a row, whatever its format: the interface between parsing rows and tokenizing them.
//!
//! Parsers produce an [`Example`], the tokenizer consumes it. This module knows neither the keys of
//! files nor chat templates.

use serde::{Serialize, Serializer, ser::SerializeMap};
use serde_json::{Map, Value, json};

/// A parsed row.
#[derive(Debug, Clone, PartialEq)]
pub enum Example {
    /// A conversation; the messages marked as targets are trained on.
    Chat(Conversation),
    /// A text and its continuation.
    PromptCompletion {
        /// The text before, which is not trained on.
        prompt: String,
        /// The text that is trained on.
        completion: String,
    },
    /// A text that is trained on completely.
    Text(String),
    /// A prompt and its completion that already contain the special tokens of a chat template. They are
    /// concatenated, and nothing is added.
    Prerendered {
        /// The text before, which is not trained on; may be empty.
        prompt: String,
        /// The text that is trained on.
        completion: String,
    },
}

/// A conversation with everything that its row passes to the chat template.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Conversation {
    /// The messages in order; only the first can be a system message.
    pub messages: Vec<Message>,
    /// The tools that the assistant may call, each as `{"type": "function", "function": {…}}` with its
    /// keys in the order of the row.
    pub tools: Vec<Value>,
    /// Other variables of the chat template, such as `enable_thinking` or `documents`; never one that
    /// is always set (`messages`, `tools`, `add_generation_prompt`).
    pub variables: Map<String, Value>,
    /// How the conversation is rendered for a model without a chat template.
    pub without_template: WithoutTemplate,
}

impl Conversation {
    /// Creates a conversation of messages alone.
    pub fn new(messages: Vec<Message>) -> Self {
        Self { messages, ..Self::default() }
    }
}

/// How a conversation is rendered for a model without a chat template.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum WithoutTemplate {
    /// The row is refused.
    #[default]
    Refused,
    /// With the prompt of Stanford Alpaca; see [`crate::data::chat::alpaca_prompt`].
    AlpacaPrompt {
        /// The input at the end of the last user message, after a blank line.
        input: Option<String>,
    },
}

/// The author of a message, as in chat templates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ChatRole {
    /// Instructions for the assistant; the first message only.
    System,
    /// The user of the assistant.
    User,
    /// The model, which answers or calls tools. Only its messages can be trained on.
    Assistant,
    /// The response of a tool.
    Tool,
}

impl ChatRole {
    /// Returns the role as chat templates name it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
        }
    }
}

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    /// The author.
    pub role: ChatRole,
    /// The text; empty if an assistant only calls tools.
    pub content: String,
    /// The reasoning of the assistant, which templates call `reasoning_content`; never empty.
    pub reasoning: Option<String>,
    /// The tool calls of the assistant.
    pub tool_calls: Vec<ToolCall>,
    /// The id of the call that a tool message answers.
    pub tool_call_id: Option<String>,
    /// The name of the author or, in a tool message, of the function.
    pub name: Option<String>,
    /// Whether the message is trained on; only those of the assistant can be.
    pub is_target: bool,
}

impl Message {
    /// Creates a message of text alone; one of the assistant is a target.
    pub fn new(role: ChatRole, content: impl Into<String>) -> Self {
        Self {
            role,
            content: content.into(),
            reasoning: None,
            tool_calls: Vec::new(),
            tool_call_id: None,
            name: None,
            is_target: role == ChatRole::Assistant,
        }
    }

    /// Returns the content and the reasoning.
    pub fn texts(&self) -> impl Iterator<Item = &str> {
        [Some(self.content.as_str()), self.reasoning.as_deref()].into_iter().flatten()
    }

    /// Returns whether the content, the reasoning or a call contains a text.
    pub fn contains(&self, text: &str) -> bool {
        let is_in_call =
            |call: &ToolCall| call.name.contains(text) || contains_text(&call.arguments, text);
        self.texts().any(|own| own.contains(text)) || self.tool_calls.iter().any(is_in_call)
    }
}

/// Returns whether a key or a string of a JSON value contains a text.
pub fn contains_text(value: &Value, text: &str) -> bool {
    match value {
        Value::String(string) => string.contains(text),
        Value::Array(items) => items.iter().any(|item| contains_text(item, text)),
        Value::Object(fields) => {
            fields.iter().any(|(key, item)| key.contains(text) || contains_text(item, text))
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}

/// A call of a tool.
#[derive(Debug, Clone, PartialEq)]
pub struct ToolCall {
    /// The id that the tool message refers to.
    pub id: Option<String>,
    /// The name of the function.
    pub name: String,
    /// The arguments: an object, as templates require, and not its JSON text.
    pub arguments: Value,
}

/// Serializes a message as chat templates see it; absent parts are absent keys. The keys of the reasoning
/// and their positions are those of transformers 5.23.
impl Serialize for Message {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self { role, content, reasoning, tool_calls, tool_call_id, name, is_target: _ } = self;
        let mut map = serializer.serialize_map(None)?;
        if let Some(reasoning) = reasoning {
            map.serialize_entry("thinking", reasoning)?;
        }
        map.serialize_entry("role", role.as_str())?;
        map.serialize_entry("content", content)?;
        if let Some(reasoning) = reasoning {
            map.serialize_entry("reasoning_content", reasoning)?;
        }
        if !tool_calls.is_empty() {
            map.serialize_entry("tool_calls", tool_calls)?;
        }
        if let Some(id) = tool_call_id {
            map.serialize_entry("tool_call_id", id)?;
        }
        if let Some(name) = name {
            map.serialize_entry("name", name)?;
        }
        map.end()
    }
}

impl Serialize for ToolCall {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self { id, name, arguments } = self;
        let mut map = serializer.serialize_map(None)?;
        if let Some(id) = id {
            map.serialize_entry("id", id)?;
        }
        map.serialize_entry("type", "function")?;
        map.serialize_entry("function", &json!({"name": name, "arguments": arguments}))?;
        map.end()
    }
}
