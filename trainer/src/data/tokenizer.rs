//! Tokens of a row and which of them are predicted.

use std::path::Path;

use finetune_contract::FailureReason;
use serde_json::Value;

use super::{
    alpaca_prompt::{self, Segment},
    conversation::{ChatRole, Example, Message},
    template::{Rendered, Template, refuse_marks},
};
use crate::failure::Failure;

/// Stands for what the assistant says when looking for where a template puts it; private use, and
/// rows that have it are refused.
const CONTENT: char = '\u{F8F2}';

/// A row as tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenRow {
    /// The tokens.
    pub tokens: Vec<u32>,
    /// Whether each is predicted from those before it; the first never is.
    pub targets: Vec<bool>,
}

/// A model's tokenizer with its chat template.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    template: Option<Template>,
    eos_ids: Vec<u32>,
    vocab_size: u32,
}

impl Tokenizer {
    /// Loads the tokenizer of a local Hugging Face directory.
    ///
    /// # Errors
    /// A [`Failure`] of reason `InvalidModel` if `tokenizer.json` or the chat template cannot be used.
    pub fn load(directory: &Path) -> Result<Self, Failure> {
        let invalid = |message: String| Failure::new(FailureReason::InvalidModel, message);
        let path = directory.join("tokenizer.json");
        if !path.exists() {
            return Err(invalid(format!(
                "{path:?} is missing: a model needs its fast tokenizer (save it with transformers' save_pretrained)"
            )));
        }
        let mut inner = tokenizers::Tokenizer::from_file(&path)
            .map_err(|error| invalid(format!("{path:?} cannot be used: {error}")))?;
        // A row is never cut or padded behind our back.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|error| invalid(error.to_string()))?;
        let json = |name: &str| -> Result<Value, Failure> {
            let path = directory.join(name);
            match std::fs::read_to_string(&path) {
                Ok(text) => serde_json::from_str(&text)
                    .map_err(|error| invalid(format!("{path:?} is not JSON: {error}"))),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Value::Null),
                Err(error) => Err(invalid(format!("{path:?} cannot be read: {error}"))),
            }
        };
        let settings = json("tokenizer_config.json")?;
        let special_tokens = special_tokens(&settings, &json("special_tokens_map.json")?);
        let configs = [json("generation_config.json")?, json("config.json")?];
        let eos_ids = eos_ids(&inner, &special_tokens, &configs);
        let template = match template_source(directory, &settings, &json("chat_template.json")?) {
            None => None,
            Some(source) => Some(Template::compile(&source, special_tokens).map_err(|reason| {
                invalid(format!("the chat template of {directory:?} cannot be used: {reason}"))
            })?),
        };
        let vocab_size = inner.get_vocab_size(true) as u32;
        Ok(Self { inner, template, eos_ids, vocab_size })
    }

    /// Makes a tokenizer from its parts, for tests.
    pub fn from_parts(
        inner: tokenizers::Tokenizer,
        template: Option<Template>,
        eos_ids: Vec<u32>,
    ) -> Self {
        let vocab_size = inner.get_vocab_size(true) as u32;
        Self { inner, template, eos_ids, vocab_size }
    }

    /// Tells whether there is a chat template.
    pub fn has_template(&self) -> bool {
        self.template.is_some()
    }

    /// Returns the number of tokens there are.
    pub fn vocab_size(&self) -> u32 {
        self.vocab_size
    }

    /// Returns the tokens that end a text or a turn.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }

    /// Turns a text into tokens.
    ///
    /// # Errors
    /// A text that says what the tokenizer refused.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, String> {
        let encoding =
            self.inner.encode(text, add_special_tokens).map_err(|error| error.to_string())?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Turns tokens into text.
    pub fn decode(&self, tokens: &[u32], skip_special_tokens: bool) -> String {
        self.inner.decode(tokens, skip_special_tokens).unwrap_or_default()
    }

    /// Renders a conversation with the chat template.
    ///
    /// # Errors
    /// A text: there is no template, or it refused.
    pub fn render_chat(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String, String> {
        Ok(self.template()?.render(messages, add_generation_prompt)?.text)
    }

    /// Turns a row into tokens and targets.
    ///
    /// A prompt with its completion is a user turn with its answer where the model has a chat
    /// template, for that is how the model will be asked; else both are put one after the other.
    ///
    /// # Errors
    /// A text that says why this row cannot be trained on.
    pub fn tokenize(&self, example: &Example) -> Result<TokenRow, String> {
        let row = match example {
            Example::Chat(conversation) => match alpaca_prompt::segments(conversation) {
                Some(segments) if !self.has_template() => self.segments(&segments)?,
                _ => self.chat(&conversation.messages)?,
            },
            Example::PromptCompletion { prompt, completion } if self.has_template() => {
                self.chat(&[
                    Message::new(ChatRole::User, prompt),
                    Message::new(ChatRole::Assistant, completion),
                ])?
            }
            Example::PromptCompletion { prompt, completion } => {
                // Apart, so that no token spans the border.
                let mut tokens = self.encode(prompt, true)?;
                let border = tokens.len();
                tokens.extend(self.encode(completion, false)?);
                self.with_eos(tokens, border)
            }
            Example::Text(text) => self.with_eos(self.encode(text, true)?, 1),
            Example::Prerendered { prompt, completion } => {
                let mut tokens = self.encode(prompt, false)?;
                let border = tokens.len();
                tokens.extend(self.encode(completion, false)?);
                let targets = (0..tokens.len()).map(|at| at > 0 && at >= border).collect();
                TokenRow { tokens, targets }
            }
        };
        if row.targets.iter().any(|&is_target| is_target) {
            Ok(row)
        } else {
            Err("no token of the row would be trained on".to_owned())
        }
    }

    /// Puts segments one after the other, apart, so that no token spans a border, and the end of text
    /// after each answer.
    fn segments(&self, segments: &[Segment]) -> Result<TokenRow, String> {
        let mut row = TokenRow { tokens: Vec::new(), targets: Vec::new() };
        for Segment { text, is_answer, is_target } in segments {
            row.tokens.extend(self.encode(text, row.tokens.is_empty())?);
            if *is_answer {
                row.tokens.extend(self.eos_ids.first());
            }
            row.targets.resize(row.tokens.len(), *is_target);
        }
        Ok(row)
    }

    fn with_eos(&self, mut tokens: Vec<u32>, first_target: usize) -> TokenRow {
        // A template may have put it there already; twice would teach to go on after the end.
        if let Some(&eos) = self.eos_ids.first()
            && tokens.last() != Some(&eos)
        {
            tokens.push(eos);
        }
        let targets = (0..tokens.len()).map(|index| index > 0 && index >= first_target).collect();
        TokenRow { tokens, targets }
    }

    fn chat(&self, messages: &[Message]) -> Result<TokenRow, String> {
        let template = self.template()?;
        let Rendered { text, generation } = template.render(messages, false)?;
        // The text has the special tokens already.
        let encoding =
            self.inner.encode(text.as_str(), false).map_err(|error| error.to_string())?;
        let (tokens, offsets) = (encoding.get_ids().to_vec(), encoding.get_offsets());
        let spans = if template.marks_generation() {
            generation
        } else {
            self.assistant_spans(template, messages, &text, &tokens)?
        };
        let mut targets = vec![false; tokens.len()];
        // Byte-level post-processors take leading spaces out of a token's range, all of it when the
        // token is only spaces: a token really starts where the one before it ends.
        let start = |index: usize| offsets[index].0.min(offsets[index - 1].1);
        for span in spans {
            let inside: Vec<usize> = (1..tokens.len())
                .filter(|&index| offsets[index].1 > span.start && start(index) < span.end)
                .collect();
            // What follows the end of a turn is never generated: generation stops there.
            let last_eos = inside.iter().rposition(|&index| self.eos_ids.contains(&tokens[index]));
            let kept = last_eos.map_or(inside.len(), |position| position + 1);
            inside[..kept].iter().for_each(|&index| targets[index] = true);
        }
        Ok(TokenRow { tokens, targets })
    }

    /// Finds what the assistant says by rendering the conversation up to each of its turns.
    ///
    /// Both renderings must be prefixes of the whole, in tokens too as far as they are trained on; a
    /// template for which they are not rewrites earlier turns, and a guess would train on the wrong
    /// tokens.
    fn assistant_spans(
        &self,
        template: &Template,
        messages: &[Message],
        text: &str,
        tokens: &[u32],
    ) -> Result<Vec<std::ops::Range<usize>>, String> {
        refuse_marks(messages, &[CONTENT])?;
        let mut spans = Vec::new();
        for index in (0..messages.len()).filter(|&index| messages[index].is_target) {
            let rewrites = || {
                format!(
                    "the chat template renders turn {index} differently when more turns follow, so what to train on is \
                     unclear: split the conversation after each assistant turn, or use a template with {{% generation %}}"
                )
            };
            let prompt = template.render(&messages[..index], true)?.text;
            let with_turn = template.render(&messages[..=index], false)?.text;
            if !text.starts_with(&prompt) || !text.starts_with(&with_turn) {
                return Err(rewrites());
            }
            let prompt_tokens = self.encode(&prompt, false)?;
            if !tokens.starts_with(&prompt_tokens) {
                return Err(format!(
                    "a token spans the border between the prompt and turn {index}, so the turn cannot be trained on alone"
                ));
            }
            if with_turn.len() < text.len() {
                let turn_tokens = self.encode(&with_turn, false)?;
                let is_eos = |token| self.eos_ids.contains(token);
                // Beyond the end of turn nothing is trained on, so it may differ.
                let end = turn_tokens[prompt_tokens.len().min(turn_tokens.len())..]
                    .iter()
                    .rposition(is_eos)
                    .map_or(turn_tokens.len(), |position| prompt_tokens.len() + position + 1);
                if !tokens.starts_with(&turn_tokens[..end]) {
                    return Err(format!(
                        "a token spans the border between turn {index} and what follows it, so the turn cannot be trained on alone"
                    ));
                }
            }
            let turn = &text[prompt.len()..with_turn.len()];
            let supplied = supplied(template, messages, index, &prompt)?;
            let start = if turn.starts_with(&supplied) { supplied.len() } else { 0 };
            spans.push(prompt.len() + start..with_turn.len());
        }
        Ok(spans)
    }

    fn template(&self) -> Result<&Template, String> {
        self.template.as_ref().ok_or_else(|| {
            "the model has no chat template, so a conversation cannot be rendered: use an instruction-tuned model, put a \
             chat_template.jinja beside its tokenizer, or give rows of prompt and completion"
                .to_owned()
        })
    }
}

/// Returns what a template puts between its generation prompt and what the assistant says, such as
/// an empty `<think>` block: the template supplies it, so the model need not learn to say it.
fn supplied(
    template: &Template,
    messages: &[Message],
    index: usize,
    prompt: &str,
) -> Result<String, String> {
    let mut until_turn = messages[..=index].to_vec();
    until_turn[index].content = CONTENT.to_string();
    let rendered = template.render(&until_turn, false)?.text;
    let before = rendered.strip_prefix(prompt).and_then(|turn| turn.split_once(CONTENT));
    Ok(before.map_or(String::new(), |(before, _)| before.to_owned()))
}

/// Finds the chat template: in a file of its own, in the tokenizer's settings, or in
/// `chat_template.json`, where older processors saved it.
fn template_source(directory: &Path, settings: &Value, processor: &Value) -> Option<String> {
    if let Ok(source) = std::fs::read_to_string(directory.join("chat_template.jinja")) {
        return Some(source);
    }
    [settings, processor].into_iter().find_map(|file| template_in(file.get("chat_template")?))
}

/// Takes the template, of several named ones the default, or the only one.
fn template_in(value: &Value) -> Option<String> {
    match value {
        Value::String(source) => Some(source.clone()),
        Value::Array(named) => {
            let is_default =
                |entry: &&Value| entry.get("name").and_then(Value::as_str) == Some("default");
            let only = if named.len() == 1 { named.first() } else { None };
            let entry = named.iter().find(is_default).or(only)?;
            entry.get("template")?.as_str().map(str::to_owned)
        }
        _ => None,
    }
}

fn special_tokens(settings: &Value, map: &Value) -> Vec<(String, String)> {
    let text = |value: &Value| {
        value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
    };
    ["bos_token", "eos_token", "unk_token", "pad_token"]
        .into_iter()
        .filter_map(|name| {
            let token =
                settings.get(name).and_then(text).or_else(|| map.get(name).and_then(text))?;
            Some((name.to_owned(), token))
        })
        .collect()
}

/// Collects the tokens that end generation: the tokenizer's own first, then those of the configs.
fn eos_ids(
    inner: &tokenizers::Tokenizer,
    special: &[(String, String)],
    configs: &[Value],
) -> Vec<u32> {
    let named = special.iter().find(|(name, _)| name == "eos_token");
    let mut ids: Vec<u32> =
        named.and_then(|(_, token)| inner.token_to_id(token)).into_iter().collect();
    for config in configs {
        let listed = match config.get("eos_token_id") {
            Some(Value::Array(list)) => list.iter().filter_map(Value::as_u64).collect(),
            Some(value) => value.as_u64().into_iter().collect::<Vec<_>>(),
            None => Vec::new(),
        };
        for id in listed {
            if !ids.contains(&(id as u32)) {
                ids.push(id as u32);
            }
        }
    }
    ids
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn finds_the_chat_template_wherever_it_was_saved() {
        let directory = tempfile::tempdir().unwrap();
        let check = |settings: Value, processor: Value| {
            let found = template_source(directory.path(), &settings, &processor);
            found.unwrap_or_else(|| "none".to_owned())
        };
        let named = |name: &str| json!({"name": name, "template": name});
        let in_settings = |template: Value| check(json!({"chat_template": template}), Value::Null);
        assert_eq!(in_settings(json!("a")), "a");
        assert_eq!(in_settings(json!([named("rag"), named("default")])), "default");
        assert_eq!(in_settings(json!([named("rag")])), "rag");
        assert_eq!(in_settings(json!([named("rag"), named("tool_use")])), "none");
        assert_eq!(check(json!({}), json!({"chat_template": "old"})), "old");
        assert_eq!(check(json!({"chat_template": "a"}), json!({"chat_template": "old"})), "a");
        std::fs::write(directory.path().join("chat_template.jinja"), "file").unwrap();
        assert_eq!(in_settings(json!("a")), "file");
    }
}
