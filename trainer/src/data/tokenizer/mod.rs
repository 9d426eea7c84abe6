//! The tokenizer of a model, with its chat template.

mod added_tokens;
mod byte_level;
pub mod files;
pub mod targets;
pub mod tokenize;

use std::{
    collections::{HashMap, HashSet},
    path::Path,
};

use finetune_contract::{FailureReason, Reasoning};
use jiff::civil::Date;
use serde_json::Value;
use tokenizers::{AddedToken, PostProcessorWrapper};

use crate::{
    data::{
        chat::{
            rendering::Rendering,
            template::{Chat, Sources, Template, message_value},
            template_source,
        },
        conversation::{ChatRole, Conversation, Message},
        tokenizer::byte_level::{ByteLevel, Encoded},
    },
    failure::Failure,
};

/// A tokenizer and a chat template.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// A faster encoder for the texts and tokenizers that it supports.
    byte_level: Option<ByteLevel>,
    added_tokens: HashMap<u32, AddedToken>,
    template: Option<Template>,
    /// The special tokens that the template prints.
    control_tokens: Vec<String>,
    reasoning: Reasoning,
    today: Date,
    /// The tokens that the tokenizer puts before a text, usually BOS.
    bos_ids: Vec<u32>,
    /// The tokens that the tokenizer puts after a text.
    suffix_ids: Vec<u32>,
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
        let json = |name: &str| files::read_json(&directory.join(name));
        let (mut inner, declarations) = files::open(directory)?;
        // Rows are truncated and padded nowhere else than in our own code.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|error| invalid(error.to_string()))?;
        let special_tokens = files::add_declared_tokens(&mut inner, &declarations, directory)?;
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
                let origin = match &rendering.chat_template {
                    Some(_) => "dataset.chatTemplate".to_owned(),
                    None => format!("the chat template of {directory:?}"),
                };
                invalid(format!("{origin} cannot be used: {reason}"))
            })
        };
        let template = sources.as_ref().map(compile).transpose()?;
        let tokenizer = Self::from_parts(inner, template, files::eos_ids(eos, &configs));
        Ok(Self {
            reasoning: rendering.reasoning,
            today: rendering.today,
            stop_ids: files::stop_ids(eos, &configs).into_iter().collect(),
            ..tokenizer
        })
    }

    /// Creates a tokenizer from its parts; generation stops at all of `eos_ids`.
    pub fn from_parts(
        mut inner: tokenizers::Tokenizer,
        template: Option<Template>,
        eos_ids: Vec<u32>,
    ) -> Self {
        let vocab_size = inner.get_vocab_size(true) as u32;
        let added_tokens = inner.get_added_tokens_decoder().into_iter().collect();
        let (bos_ids, suffix_ids) = surrounding_tokens(&inner);
        // Its tokens are known now, and a byte-level one removes spaces from the offsets of tokens.
        inner.with_post_processor(None::<PostProcessorWrapper>);
        let mut tokenizer = Self {
            byte_level: ByteLevel::new(&inner),
            inner,
            added_tokens,
            template,
            control_tokens: Vec::new(),
            reasoning: Reasoning::Keep,
            today: Date::default(),
            bos_ids,
            suffix_ids,
            stop_ids: eos_ids.iter().copied().collect(),
            eos_ids,
            vocab_size,
        };
        tokenizer.control_tokens = tokenizer.template_control_tokens();
        if let Some(template) = &tokenizer.template {
            template.reset_printed_date();
        }
        tokenizer
    }

    /// Returns whether there is a chat template.
    pub fn has_template(&self) -> bool {
        self.template.is_some()
    }

    /// Returns the date that the chat template was given, if it printed it.
    pub fn printed_date(&self) -> Option<String> {
        self.template.as_ref().filter(|template| template.has_printed_date())?;
        Some(self.today.to_string())
    }

    /// Returns the number of tokens in the vocabulary, with the added ones.
    pub fn vocab_size(&self) -> u32 {
        self.vocab_size
    }

    /// Returns the tokens that end a text or a turn.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }

    /// Returns whether generation stops at a token, according to the configuration of the model.
    pub fn is_stop_token(&self, token: u32) -> bool {
        self.stop_ids.contains(&token)
    }

    /// Returns whether a token is special.
    pub fn is_special(&self, token: u32) -> bool {
        self.added_tokens.get(&token).is_some_and(|token| token.special)
    }

    /// Returns whether a token is matched in the raw text, before normalization and splitting.
    pub fn is_matched_first(&self, token: u32) -> bool {
        self.added_tokens.get(&token).is_some_and(|token| !token.normalized)
    }

    /// Returns the text of a token as the vocabulary has it.
    pub fn token_text(&self, token: u32) -> String {
        self.inner.id_to_token(token).unwrap_or_default()
    }

    /// Turns a text into tokens.
    ///
    /// # Errors
    /// The message of the tokenizer.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, String> {
        let ids = if let Some(encoded) = self.encode_byte_level(text)? {
            encoded.ids
        } else {
            let encoding = self.inner.encode_fast(text, false);
            encoding.map_err(|error| error.to_string())?.get_ids().to_vec()
        };
        if !add_special_tokens {
            return Ok(ids);
        }
        Ok([self.bos_ids.as_slice(), &ids, &self.suffix_ids].concat())
    }

    /// Turns a text that contains its special tokens into tokens and their offsets.
    pub(super) fn encode_with_offsets(&self, text: &str) -> Result<Encoded, String> {
        if let Some(encoded) = self.encode_byte_level(text)? {
            return Ok(encoded);
        }
        let encoding = self.inner.encode(text, false).map_err(|error| error.to_string())?;
        let offsets = encoding.get_offsets().iter().map(|&(start, end)| start..end).collect();
        Ok(Encoded { ids: encoding.get_ids().to_vec(), offsets })
    }

    fn encode_byte_level(&self, text: &str) -> Result<Option<Encoded>, String> {
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
    /// A message: there is no template, or it raised an error.
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
    /// A message: there is no template, or it raised an error.
    pub fn render(
        &self,
        conversation: &Conversation,
        add_generation_prompt: bool,
    ) -> Result<String, String> {
        let chat = Chat::new(conversation);
        let template = self.chat_template()?;
        Ok(template.render(&chat, chat.messages.clone(), add_generation_prompt)?.text)
    }

    fn chat_template(&self) -> Result<&Template, String> {
        self.template.as_ref().ok_or_else(|| {
            format!(
                "the model has no chat template, so a conversation cannot be rendered: set dataset.chatTemplate (to {}, a template's text or its URI), use an instruction-tuned model, or give rows of prompt and completion",
                template_source::names()
            )
        })
    }

    /// Returns the special tokens that the template prints around turns.
    fn template_control_tokens(&self) -> Vec<String> {
        let messages = [Message::new(ChatRole::User, "x"), Message::new(ChatRole::Assistant, "y")];
        let Some(template) = &self.template else { return Vec::new() };
        let chat = Chat::new(&Conversation::new(Vec::new()));
        let render = |count: usize, add_generation_prompt: bool| {
            let messages = messages[..count].iter().map(message_value).collect();
            let rendered = template.render(&chat, messages, add_generation_prompt);
            let text = rendered.map(|rendered| rendered.text);
            text.and_then(|text| self.encode(&text, false)).unwrap_or_default()
        };
        let mut tokens: Vec<u32> = [render(1, true), render(2, false)].concat();
        tokens.retain(|&token| self.is_special(token));
        tokens.sort_unstable();
        tokens.dedup();
        tokens.into_iter().map(|token| self.token_text(token)).collect()
    }
}

/// Returns the tokens that a tokenizer puts before and after every text.
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
