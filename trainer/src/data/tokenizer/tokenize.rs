//! Turns an example into rows of tokens and marks the tokens that are trained on.

use crate::data::{
    chat::{
        alpaca_prompt::{self, Segment},
        assistant_spans, check_rendered, reasoning,
    },
    conversation::{ChatRole, Conversation, Example, Message, contains_text},
    tokenizer::{
        Tokenizer,
        targets::{self, TokenRow, TurnEnd},
    },
};

/// The tokens of one row of the dataset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokenized {
    /// One row, or one for each assistant turn if the template renders earlier turns differently once
    /// more turns follow.
    pub rows: Vec<TokenRow>,
    /// How the turns end; `None` for a row that is not a conversation.
    pub turn_end: Option<TurnEnd>,
    /// The end of the generation prompt that the answers do not start with, such as `<think>`.
    pub omitted_prompt_suffix: Option<String>,
}

impl Tokenized {
    /// Creates a single row that is not a conversation.
    fn from_row(row: TokenRow) -> Self {
        Self { rows: vec![row], turn_end: None, omitted_prompt_suffix: None }
    }
}

impl Tokenizer {
    /// Turns an example into tokens and targets.
    ///
    /// If the model has a chat template, a prompt and its completion become a user turn and its answer,
    /// because that is how the model will be used; otherwise they are concatenated.
    ///
    /// # Errors
    /// A message that says why the example cannot be trained on.
    pub fn tokenize(&self, example: &Example) -> Result<Tokenized, String> {
        let tokenized = match example {
            Example::Chat(conversation) => {
                let conversation = reasoning::apply(conversation, self.reasoning);
                match alpaca_prompt::segments(&conversation) {
                    Some(segments) if !self.has_template() => self.tokenize_segments(&segments)?,
                    _ => self.tokenize_chat(&conversation)?,
                }
            }
            Example::PromptCompletion { prompt, completion } if self.has_template() => {
                let messages = vec![
                    Message::new(ChatRole::User, prompt),
                    Message::new(ChatRole::Assistant, completion),
                ];
                let conversation = Conversation::new(messages);
                self.tokenize_chat(&reasoning::apply(&conversation, self.reasoning))?
            }
            Example::PromptCompletion { prompt, completion } => {
                // Encoded separately, so that no token crosses the border.
                let mut tokens = self.encode_with_bos(prompt)?;
                let first_target = tokens.len();
                tokens.extend(self.encode(completion, false)?);
                self.with_eos(tokens, first_target)
            }
            Example::Text(text) => self.with_eos(self.encode_with_bos(text)?, 1),
            Example::Prerendered { prompt, completion } => {
                self.tokenize_prerendered(prompt, completion)?
            }
        };
        if tokenized.rows.iter().all(|row| row.targets.iter().any(|&is_target| is_target)) {
            Ok(tokenized)
        } else {
            Err("no token of the row would be trained on".to_owned())
        }
    }

    /// Encodes a text with the BOS tokens of the tokenizer, unless it already starts with them.
    fn encode_with_bos(&self, text: &str) -> Result<Vec<u32>, String> {
        let tokens = self.encode(text, false)?;
        if tokens.starts_with(&self.bos_ids) {
            return Ok(tokens);
        }
        Ok(self.bos_ids.iter().copied().chain(tokens).collect())
    }

    /// Appends EOS, unless the tokens already end with it: a second one would teach the model to
    /// continue after the end.
    fn with_eos(&self, mut tokens: Vec<u32>, first_target: usize) -> Tokenized {
        if let Some(&eos) = self.eos_ids.first()
            && tokens.last() != Some(&eos)
        {
            tokens.push(eos);
        }
        let targets = (0..tokens.len()).map(|index| index > 0 && index >= first_target).collect();
        Tokenized::from_row(TokenRow { tokens, targets })
    }

    fn tokenize_prerendered(&self, prompt: &str, completion: &str) -> Result<Tokenized, String> {
        let mut tokens = self.encode(prompt, false)?;
        let first_target = tokens.len();
        tokens.extend(self.encode(completion, false)?);
        let targets = (0..tokens.len()).map(|index| index > 0 && index >= first_target).collect();
        let turn_end = match tokens.last() {
            Some(&last) if self.is_stop_token(last) => TurnEnd::StopToken,
            Some(&last) if self.is_special(last) => TurnEnd::SpecialToken(last),
            _ => TurnEnd::NoSpecialToken,
        };
        let row = TokenRow { tokens, targets };
        Ok(Tokenized { turn_end: Some(turn_end), ..Tokenized::from_row(row) })
    }

    /// Encodes segments separately, so that no token crosses a border, and appends EOS to each answer.
    fn tokenize_segments(&self, segments: &[Segment]) -> Result<Tokenized, String> {
        let mut row = TokenRow { tokens: Vec::new(), targets: Vec::new() };
        for Segment { text, is_answer, is_target } in segments {
            let is_first = row.tokens.is_empty();
            let tokens =
                if is_first { self.encode_with_bos(text) } else { self.encode(text, false) };
            row.tokens.extend(tokens?);
            if let Some(&eos) = self.eos_ids.first()
                && *is_answer
                && row.tokens.last() != Some(&eos)
            {
                row.tokens.push(eos);
            }
            row.targets.resize(row.tokens.len(), *is_target);
        }
        Ok(Tokenized::from_row(row))
    }

    fn tokenize_chat(&self, conversation: &Conversation) -> Result<Tokenized, String> {
        let template = self.chat_template()?;
        self.refuse_control_tokens(conversation)?;
        let rendered = assistant_spans::render(template, conversation)?;
        let mut rows = Vec::with_capacity(rendered.texts.len());
        let mut turn_end = TurnEnd::NoSpecialToken;
        for text in &rendered.texts {
            check_rendered::check(conversation, text)?;
            let (row, row_turn_end) = targets::tokenize(self, text)?;
            turn_end = turn_end.min(row_turn_end);
            rows.push(row);
        }
        let omitted_prompt_suffix = rendered.omitted_prompt_suffix;
        Ok(Tokenized { rows, turn_end: Some(turn_end), omitted_prompt_suffix })
    }

    /// Refuses rows with tokens that the chat template prints itself: such a row is already rendered,
    /// and rendering it again would repeat what surrounds its turns.
    fn refuse_control_tokens(&self, conversation: &Conversation) -> Result<(), String> {
        let refuse = |location: &str, token: &str| {
            Err(format!(
                "{location} contains {token:?}, which the chat template itself puts around turns: if the row is already rendered, set dataset.format to prerendered (with prompt and completion); otherwise remove it from the text"
            ))
        };
        for token in &self.control_tokens {
            let turn = conversation.messages.iter().position(|message| message.contains(token));
            if let Some(index) = turn {
                let role = conversation.messages[index].role.as_str();
                return refuse(&format!("turn {index} ({role})"), token);
            }
            if conversation.tools.iter().any(|tool| contains_text(tool, token)) {
                return refuse("tools", token);
            }
        }
        Ok(())
    }
}
