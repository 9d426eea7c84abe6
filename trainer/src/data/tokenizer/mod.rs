//! Tokens of a row and which of them are predicted.

mod added_tokens;
mod byte_level;
pub mod targets;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::Path,
};

use finetune_contract::{FailureReason, OnOverflow, Reasoning};
use jiff::civil::Date;
use serde_json::Value;
use tokenizers::{AddedToken, PostProcessorWrapper};

use crate::{
    data::{
        chat::{
            alpaca_prompt::{self, Segment},
            check_rendered, reasoning,
            rendering::Rendering,
            template::{Chat, Sources, Template, message_value},
            template_source, turns,
        },
        conversation::{ChatRole, Conversation, Example, Message, is_in},
        tokenizer::{
            added_tokens::Declarations,
            byte_level::{ByteLevel, Encoded},
            targets::End,
        },
    },
    failure::Failure,
};

/// A row as tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenRow {
    /// The tokens.
    pub tokens: Vec<u32>,
    /// Whether each is predicted from those before it; the first never is.
    pub targets: Vec<bool>,
}

impl TokenRow {
    /// Returns how many of its tokens a context has; `None` if the row is left out, because it is too
    /// long or nothing of what is left is a target.
    pub fn trained_length(&self, context_length: u32, on_overflow: OnOverflow) -> Option<usize> {
        let context_length = context_length as usize;
        if self.tokens.len() > context_length && on_overflow != OnOverflow::Truncate {
            return None;
        }
        let length = self.tokens.len().min(context_length);
        self.targets[..length].iter().any(|&is_target| is_target).then_some(length)
    }
}

/// What a row of the dataset becomes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokenized {
    /// One, or one for each assistant turn where the template rewrites earlier turns.
    pub rows: Vec<TokenRow>,
    /// How its turns end; none of a row that is no conversation.
    pub end: Option<End>,
    /// What the generation prompt opens and an answer does not go on from, such as `<think>`.
    pub opened: Option<String>,
}

/// A model's tokenizer with its chat template.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Does the work of `inner` where it can.
    byte_level: Option<ByteLevel>,
    added: HashMap<u32, AddedToken>,
    template: Option<Template>,
    /// Special tokens the template itself prints.
    control_tokens: Vec<String>,
    reasoning: Reasoning,
    today: Date,
    /// What the tokenizer puts before a text of its own accord.
    bos_ids: Vec<u32>,
    /// And after it.
    closing_ids: Vec<u32>,
    eos_ids: Vec<u32>,
    stop_ids: HashSet<u32>,
    vocab_size: u32,
}

impl Tokenizer {
    /// Loads the tokenizer of a local Hugging Face directory.
    ///
    /// # Errors
    /// A [`Failure`] of reason `InvalidModel` if `tokenizer.json` or the chat template cannot be used.
    pub fn load(directory: &Path, rendering: &Rendering) -> Result<Self, Failure> {
        let invalid = |message: String| Failure::new(FailureReason::InvalidModel, message);
        let json = |name: &str| read_json(&directory.join(name));
        let (mut inner, declarations) = open(directory)?;
        // A row is never cut or padded behind our back.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|error| invalid(error.to_string()))?;
        let special_tokens = declare(&mut inner, &declarations, directory)?;
        let splits = declarations.settings.get("split_special_tokens").and_then(Value::as_bool);
        inner.set_encode_special_tokens(splits.unwrap_or(false));
        let configs = [json("generation_config.json")?, json("config.json")?];
        let eos = special_tokens.iter().find(|(name, _)| name == "eos_token");
        let eos = eos.and_then(|(_, token)| inner.token_to_id(token));

        let sources = match &rendering.chat_template {
            Some(source) => Some(Sources { default: source.clone(), tool_use: None }),
            None => template_source::of_model(
                directory,
                &declarations.settings,
                &json("chat_template.json")?,
            )
            .map_err(invalid)?,
        };
        let compile = |sources: &Sources| {
            Template::compile(sources, &special_tokens, rendering.today).map_err(|reason| {
                let whose = match &rendering.chat_template {
                    Some(_) => "dataset.chatTemplate".to_owned(),
                    None => format!("the chat template of {directory:?}"),
                };
                invalid(format!("{whose} cannot be used: {reason}"))
            })
        };
        let template = sources.as_ref().map(compile).transpose()?;
        let tokenizer = Self::from_parts(inner, template, eos_ids(eos, &configs));
        Ok(Self {
            reasoning: rendering.reasoning,
            today: rendering.today,
            stop_ids: stop_ids(eos, &configs).into_iter().collect(),
            ..tokenizer
        })
    }

    /// Makes a tokenizer from its parts; generation stops at all of `eos_ids`.
    pub fn from_parts(
        mut inner: tokenizers::Tokenizer,
        template: Option<Template>,
        eos_ids: Vec<u32>,
    ) -> Self {
        let vocab_size = inner.get_vocab_size(true) as u32;
        let added = inner.get_added_tokens_decoder().into_iter().collect();
        let (bos_ids, closing_ids) = surrounding_tokens(&inner);
        // Known now, and byte-level ones take spaces out of a token's offsets.
        inner.with_post_processor(None::<PostProcessorWrapper>);
        let mut tokenizer = Self {
            byte_level: ByteLevel::of(&inner),
            inner,
            added,
            template,
            control_tokens: Vec::new(),
            reasoning: Reasoning::Keep,
            today: Date::default(),
            bos_ids,
            closing_ids,
            stop_ids: eos_ids.iter().copied().collect(),
            eos_ids,
            vocab_size,
        };
        tokenizer.control_tokens = tokenizer.tokens_of_template();
        if let Some(template) = &tokenizer.template {
            template.forget_date();
        }
        tokenizer
    }

    /// Tells whether there is a chat template.
    pub fn has_template(&self) -> bool {
        self.template.is_some()
    }

    /// Returns the date that the chat template was told, if it printed it.
    pub fn printed_date(&self) -> Option<String> {
        self.template.as_ref().filter(|template| template.prints_date())?;
        Some(self.today.to_string())
    }

    /// Returns the number of tokens there are.
    pub fn vocab_size(&self) -> u32 {
        self.vocab_size
    }

    /// Returns the tokens that end a text or a turn.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }

    /// Tells whether generation stops at a token, with the configuration the model has.
    pub fn stops_at(&self, token: u32) -> bool {
        self.stop_ids.contains(&token)
    }

    /// Tells whether a token is a special one.
    pub fn is_special(&self, token: u32) -> bool {
        self.added.get(&token).is_some_and(|token| token.special)
    }

    /// Tells whether a token is found in a text before anything else.
    pub fn is_added(&self, token: u32) -> bool {
        self.added.get(&token).is_some_and(|token| !token.normalized)
    }

    /// Returns a token as it is written.
    pub fn written(&self, token: u32) -> String {
        self.inner.id_to_token(token).unwrap_or_default()
    }

    /// Turns a text into tokens.
    ///
    /// # Errors
    /// A text that says what the tokenizer refused.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, String> {
        let ids = if let Some(encoded) = self.encode_quickly(text)? {
            encoded.ids
        } else {
            let encoding = self.inner.encode_fast(text, false);
            encoding.map_err(|error| error.to_string())?.get_ids().to_vec()
        };
        if !add_special_tokens {
            return Ok(ids);
        }
        Ok([self.bos_ids.as_slice(), &ids, &self.closing_ids].concat())
    }

    /// Turns a text with all its special tokens into tokens and their offsets.
    pub(super) fn encoding(&self, text: &str) -> Result<Encoded, String> {
        if let Some(encoded) = self.encode_quickly(text)? {
            return Ok(encoded);
        }
        let encoding = self.inner.encode(text, false).map_err(|error| error.to_string())?;
        let offsets = encoding.get_offsets().iter().map(|&(start, end)| start..end).collect();
        Ok(Encoded { ids: encoding.get_ids().to_vec(), offsets })
    }

    fn encode_quickly(&self, text: &str) -> Result<Option<Encoded>, String> {
        let byte_level = self.byte_level.as_ref();
        byte_level.map_or(Ok(None), |byte_level| byte_level.encode(&self.inner, text))
    }

    /// Turns tokens into text.
    pub fn decode(&self, tokens: &[u32], skip_special_tokens: bool) -> String {
        self.inner.decode(tokens, skip_special_tokens).unwrap_or_default()
    }

    /// Renders messages with the chat template.
    ///
    /// # Errors
    /// A text: there is no template, or it refused.
    pub fn render_chat(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String, String> {
        self.render(&Conversation::new(messages.to_vec()), add_generation_prompt)
    }

    /// Renders a conversation with the chat template.
    ///
    /// # Errors
    /// A text: there is no template, or it refused.
    pub fn render(
        &self,
        conversation: &Conversation,
        add_generation_prompt: bool,
    ) -> Result<String, String> {
        let chat = Chat::new(conversation);
        let template = self.chat_template()?;
        Ok(template.render(&chat, chat.messages.clone(), add_generation_prompt)?.text)
    }

    /// Turns a row into tokens and targets.
    ///
    /// A prompt with its completion is a user turn with its answer where the model has a chat
    /// template, for that is how the model will be asked; else both are put one after the other.
    ///
    /// # Errors
    /// A text that says why this row cannot be trained on.
    pub fn tokenize(&self, example: &Example) -> Result<Tokenized, String> {
        let tokenized = match example {
            Example::Chat(conversation) => {
                let kept = reasoning::keep(conversation, self.reasoning);
                match alpaca_prompt::segments(&kept) {
                    Some(segments) if !self.has_template() => self.segments(&segments)?,
                    _ => self.chat(&kept)?,
                }
            }
            Example::PromptCompletion { prompt, completion } if self.has_template() => {
                let messages = vec![
                    Message::new(ChatRole::User, prompt),
                    Message::new(ChatRole::Assistant, completion),
                ];
                self.chat(&reasoning::keep(&Conversation::new(messages), self.reasoning))?
            }
            Example::PromptCompletion { prompt, completion } => {
                // Apart, so that no token spans the border.
                let mut tokens = self.encode_text(prompt)?;
                let border = tokens.len();
                tokens.extend(self.encode(completion, false)?);
                self.with_eos(tokens, border)
            }
            Example::Text(text) => self.with_eos(self.encode_text(text)?, 1),
            Example::Prerendered { prompt, completion } => {
                let mut tokens = self.encode(prompt, false)?;
                let border = tokens.len();
                tokens.extend(self.encode(completion, false)?);
                let targets = (0..tokens.len()).map(|at| at > 0 && at >= border).collect();
                let end = match tokens.last() {
                    Some(&last) if self.stops_at(last) => End::Stop,
                    Some(&last) if self.is_special(last) => End::Special(last),
                    _ => End::Open,
                };
                Tokenized { rows: vec![TokenRow { tokens, targets }], end: Some(end), opened: None }
            }
        };
        if tokenized.rows.iter().all(|row| row.targets.iter().any(|&is_target| is_target)) {
            Ok(tokenized)
        } else {
            Err("no token of the row would be trained on".to_owned())
        }
    }

    /// Turns a text into tokens as the tokenizer does, but never with a second BOS.
    fn encode_text(&self, text: &str) -> Result<Vec<u32>, String> {
        let tokens = self.encode(text, false)?;
        if tokens.starts_with(&self.bos_ids) {
            return Ok(tokens);
        }
        Ok(self.bos_ids.iter().copied().chain(tokens).collect())
    }

    /// Puts segments one after the other, apart, so that no token spans a border, and the end of text
    /// after each answer.
    fn segments(&self, segments: &[Segment]) -> Result<Tokenized, String> {
        let mut row = TokenRow { tokens: Vec::new(), targets: Vec::new() };
        for Segment { text, is_answer, is_target } in segments {
            let is_first = row.tokens.is_empty();
            let tokens = if is_first { self.encode_text(text) } else { self.encode(text, false) };
            row.tokens.extend(tokens?);
            if let Some(&eos) = self.eos_ids.first()
                && *is_answer
                && row.tokens.last() != Some(&eos)
            {
                row.tokens.push(eos);
            }
            row.targets.resize(row.tokens.len(), *is_target);
        }
        Ok(Tokenized { rows: vec![row], end: None, opened: None })
    }

    fn with_eos(&self, mut tokens: Vec<u32>, first_target: usize) -> Tokenized {
        // The text may have it already; twice would teach to go on after the end.
        if let Some(&eos) = self.eos_ids.first()
            && tokens.last() != Some(&eos)
        {
            tokens.push(eos);
        }
        let targets = (0..tokens.len()).map(|index| index > 0 && index >= first_target).collect();
        Tokenized { rows: vec![TokenRow { tokens, targets }], end: None, opened: None }
    }

    fn chat(&self, conversation: &Conversation) -> Result<Tokenized, String> {
        let template = self.chat_template()?;
        self.refuse_rendered(conversation)?;
        let rendered = turns::render(template, conversation)?;
        let mut rows = Vec::with_capacity(rendered.texts.len());
        let mut end = End::Open;
        for text in &rendered.texts {
            check_rendered::check(conversation, text)?;
            let (row, row_end) = targets::tokenize(self, text)?;
            end = end.min(row_end);
            rows.push(row);
        }
        Ok(Tokenized { rows, end: Some(end), opened: rendered.opened })
    }

    /// Refuses text that was rendered before: rendering it again would double what is around it.
    fn refuse_rendered(&self, conversation: &Conversation) -> Result<(), String> {
        let refuse = |place: &str, token: &str| {
            Err(format!(
                "{place} contains {token:?}, which the chat template itself puts around turns: if the row is rendered already, set dataset.format to prerendered (with prompt and completion); else take it out of the text"
            ))
        };
        for token in &self.control_tokens {
            let turn = conversation.messages.iter().position(|message| message.contains(token));
            if let Some(index) = turn {
                let role = conversation.messages[index].role.as_str();
                return refuse(&format!("turn {index} ({role})"), token);
            }
            if conversation.tools.iter().any(|tool| is_in(tool, token)) {
                return refuse("tools", token);
            }
        }
        Ok(())
    }

    fn chat_template(&self) -> Result<&Template, String> {
        self.template.as_ref().ok_or_else(|| {
            format!(
                "the model has no chat template, so a conversation cannot be rendered: set dataset.chatTemplate (to {}, a template's text or its URI), use an instruction-tuned model, or give rows of prompt and completion",
                template_source::names()
            )
        })
    }

    /// Finds the special tokens that the template prints around turns.
    fn tokens_of_template(&self) -> Vec<String> {
        let messages = [Message::new(ChatRole::User, "x"), Message::new(ChatRole::Assistant, "y")];
        let Some(template) = &self.template else { return Vec::new() };
        let chat = Chat::new(&Conversation::new(Vec::new()));
        let render = |count: usize, ask: bool| {
            let messages = messages[..count].iter().map(message_value).collect();
            let text = template.render(&chat, messages, ask).map(|rendered| rendered.text);
            text.and_then(|text| self.encode(&text, false)).unwrap_or_default()
        };
        let mut tokens: Vec<u32> = [render(1, true), render(2, false)].concat();
        tokens.retain(|&token| self.is_special(token));
        tokens.sort_unstable();
        tokens.dedup();
        tokens.into_iter().map(|token| self.written(token)).collect()
    }
}

/// Opens a tokenizer and adds special tokens, as `add_special_tokens` of transformers does; returns
/// it with those that are new, by id.
///
/// # Errors
/// As [`Tokenizer::load`].
pub fn with_added_tokens(
    directory: &Path,
    tokens: &[String],
) -> Result<(tokenizers::Tokenizer, BTreeMap<u32, AddedToken>), Failure> {
    let (mut inner, declarations) = open(directory)?;
    declare(&mut inner, &declarations, directory)?;
    let is_new = |token: &&String| inner.token_to_id(token).is_none();
    let new: Vec<&String> = tokens.iter().filter(is_new).collect();
    let added = tokens.iter().map(|token| AddedToken::from(token.as_str(), true));
    let added = inner.add_special_tokens(added.collect::<Vec<_>>());
    added.map_err(|error| Failure::new(FailureReason::InvalidModel, error.to_string()))?;
    let decoder = inner.get_added_tokens_decoder();
    let new = new.into_iter().filter_map(|token| {
        let id = inner.token_to_id(token)?;
        Some((id, decoder.get(&id)?.clone()))
    });
    let new = new.collect();
    Ok((inner, new))
}

/// Opens `tokenizer.json` and what is declared beside it.
fn open(directory: &Path) -> Result<(tokenizers::Tokenizer, Declarations), Failure> {
    let invalid = |message: String| Failure::new(FailureReason::InvalidModel, message);
    let path = directory.join("tokenizer.json");
    if !path.exists() {
        return Err(invalid(format!(
            "{path:?} is missing: a model needs its fast tokenizer (save it with transformers' save_pretrained)"
        )));
    }
    let inner = tokenizers::Tokenizer::from_file(&path)
        .map_err(|error| invalid(format!("{path:?} cannot be used: {error}")))?;
    let json = |name: &str| read_json(&directory.join(name));
    let declarations = Declarations {
        settings: json("tokenizer_config.json")?,
        special_tokens_map: json("special_tokens_map.json")?,
        added_tokens: json("added_tokens.json")?,
    };
    Ok((inner, declarations))
}

fn declare(
    inner: &mut tokenizers::Tokenizer,
    declarations: &Declarations,
    directory: &Path,
) -> Result<Vec<(String, String)>, Failure> {
    added_tokens::add(inner, declarations).map_err(|reason| {
        let message = format!("the tokens of {directory:?} cannot be used: {reason}");
        Failure::new(FailureReason::InvalidModel, message)
    })
}

/// Reads a JSON file; `null` if there is none.
pub(crate) fn read_json(path: &Path) -> Result<Value, Failure> {
    let invalid = |message: String| Failure::new(FailureReason::InvalidModel, message);
    match std::fs::read_to_string(path) {
        Ok(text) => serde_json::from_str(&text)
            .map_err(|error| invalid(format!("{path:?} is not JSON: {error}"))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Value::Null),
        Err(error) => Err(invalid(format!("{path:?} cannot be read: {error}"))),
    }
}

/// Finds what a tokenizer puts before and after a text of its own accord.
fn surrounding_tokens(inner: &tokenizers::Tokenizer) -> (Vec<u32>, Vec<u32>) {
    let ids = |add_special_tokens: bool| {
        let encoding = inner.encode_fast("a", add_special_tokens);
        encoding.map(|encoding| encoding.get_ids().to_vec()).unwrap_or_default()
    };
    let (with, without) = (ids(true), ids(false));
    let start = with.windows(without.len().max(1)).position(|window| window == without);
    start.map_or_else(Default::default, |start| {
        (with[..start].to_vec(), with[start + without.len()..].to_vec())
    })
}

/// Collects the tokens that end generation: the tokenizer's own first, then those of the configs.
fn eos_ids(eos: Option<u32>, configs: &[Value]) -> Vec<u32> {
    let mut ids: Vec<u32> = eos.into_iter().collect();
    for id in configs.iter().flat_map(listed_eos_ids) {
        if !ids.contains(&id) {
            ids.push(id);
        }
    }
    ids
}

/// Finds the tokens at which `generate` of transformers stops: those of `generation_config.json`,
/// else of `config.json`; the tokenizer's own is not asked.
fn stop_ids(eos: Option<u32>, configs: &[Value]) -> Vec<u32> {
    let listed = configs.iter().map(listed_eos_ids).find(|ids| !ids.is_empty());
    listed.unwrap_or_else(|| eos.into_iter().collect())
}

fn listed_eos_ids(config: &Value) -> Vec<u32> {
    match config.get("eos_token_id") {
        Some(Value::Array(list)) => {
            list.iter().filter_map(Value::as_u64).map(|id| id as u32).collect()
        }
        Some(value) => value.as_u64().map(|id| id as u32).into_iter().collect(),
        None => Vec::new(),
    }
}
