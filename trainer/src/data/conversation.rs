//! What a row says, whatever its format: the seam between reading rows and tokenizing them.
//!
//! Readers produce an [`Example`]; tokenizers consume it. Nothing here knows keys of files or
//! chat templates.

use serde::{Serialize, Serializer, ser::SerializeMap};
use serde_json::{Map, Value, json};

/// A row, understood.
#[derive(Debug, Clone, PartialEq)]
pub enum Example {
    /// A conversation; the messages marked as targets are trained on.
    Chat(Conversation),
    /// A text to continue and its continuation.
    PromptCompletion {
        /// Not trained on.
        prompt: String,
        /// Trained on.
        completion: String,
    },
    /// A text, all of it trained on.
    Text(String),
    /// A prompt and its completion with a chat template's special tokens already in them: they are
    /// put one after the other, and nothing is added.
    Prerendered {
        /// Not trained on; may be empty.
        prompt: String,
        /// Trained on.
        completion: String,
    },
}

/// A conversation with everything that its row gives to a chat template.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Conversation {
    /// The turns in order; a system message is the first.
    pub messages: Vec<Message>,
    /// The tools the assistant may call, each as `{"type": "function", "function": {…}}` with its
    /// keys in the row's order; empty for none.
    pub tools: Vec<Value>,
    /// Further variables of the chat template, such as `enable_thinking` or `documents`; never one
    /// of those that are always set (`messages`, `tools`, `add_generation_prompt`).
    pub variables: Map<String, Value>,
    /// What a model without a chat template makes of it.
    pub without_template: WithoutTemplate,
}

impl Conversation {
    /// Makes a conversation of messages alone.
    pub fn new(messages: Vec<Message>) -> Self {
        Self { messages, ..Self::default() }
    }
}

/// How a conversation becomes text for a model that has no chat template.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum WithoutTemplate {
    /// It does not: the row is refused.
    #[default]
    Refused,
    /// With the prompt of Stanford Alpaca, see [`crate::data::chat::alpaca_prompt`].
    AlpacaPrompt {
        /// The input with which the last user message ends, after a blank line.
        input: Option<String>,
    },
}

/// Who speaks, in the words of chat templates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ChatRole {
    /// Sets the scene; the first message only.
    System,
    /// Asks.
    User,
    /// Answers or calls tools: what can be trained on.
    Assistant,
    /// What a tool returned.
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

/// One turn.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    /// Who speaks.
    pub role: ChatRole,
    /// What is said; empty where an assistant only calls tools.
    pub content: String,
    /// What the assistant thought before, as the field of its own that templates know as
    /// `reasoning_content`; never empty.
    pub reasoning: Option<String>,
    /// The tools the assistant calls.
    pub tool_calls: Vec<ToolCall>,
    /// The call a tool's message answers.
    pub tool_call_id: Option<String>,
    /// The name of the speaker or, of a tool's message, of the function.
    pub name: Option<String>,
    /// Whether it is trained on; only the assistant's messages can be.
    pub is_target: bool,
}

impl Message {
    /// Makes a message of text alone; the assistant's is a target.
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

    /// Returns what the message says, as it must be found again in what is trained on.
    pub fn texts(&self) -> impl Iterator<Item = &str> {
        [Some(self.content.as_str()), self.reasoning.as_deref()].into_iter().flatten()
    }

    /// Tells whether a text is in what the message says or in its calls.
    pub fn contains(&self, text: &str) -> bool {
        let is_in_call = |call: &ToolCall| call.name.contains(text) || is_in(&call.arguments, text);
        self.texts().any(|said| said.contains(text)) || self.tool_calls.iter().any(is_in_call)
    }
}

/// Tells whether a text is in a key or a text of a JSON value.
pub fn is_in(value: &Value, text: &str) -> bool {
    match value {
        Value::String(said) => said.contains(text),
        Value::Array(items) => items.iter().any(|item| is_in(item, text)),
        Value::Object(fields) => {
            fields.iter().any(|(key, item)| key.contains(text) || is_in(item, text))
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}

/// A call of a function.
#[derive(Debug, Clone, PartialEq)]
pub struct ToolCall {
    /// The id that a tool's message refers to.
    pub id: Option<String>,
    /// The function's name.
    pub name: String,
    /// The arguments, as templates want them: an object, not its JSON text.
    pub arguments: Value,
}

/// What chat templates see: absent parts are absent keys. `reasoning` has the names, and
/// they the places, that transformers 5.23 gives it.
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
