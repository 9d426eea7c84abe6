//! Counts over the rendered conversations of a split, and the warnings that follow from them.

use std::collections::BTreeMap;

use crate::data::tokenizer::{Tokenizer, targets::TurnEnd, tokenize::Tokenized};

/// Counts over the rows of a split.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RenderingStats {
    /// Conversations that became more than one row.
    pub split_conversations: u64,
    /// The rows that these conversations became.
    pub rows_of_split_conversations: u64,
    /// Rows that are conversations.
    pub conversations: u64,
    /// Conversations in which some turn ends with a token at which generation stops.
    pub with_stop_token: u64,
    /// Conversations whose turns end with a special token at which generation does not stop, by token.
    pub with_other_special_token: BTreeMap<u32, u64>,
    /// The end of the generation prompt that answers do not start with, and the number of conversations
    /// with such answers.
    pub omitted_prompt_suffix: Option<(String, u64)>,
}

impl RenderingStats {
    /// Counts a row.
    pub fn add(&mut self, tokenized: &Tokenized) {
        if tokenized.rows.len() > 1 {
            self.split_conversations += 1;
            self.rows_of_split_conversations += tokenized.rows.len() as u64;
        }
        if let Some(turn_end) = tokenized.turn_end {
            self.conversations += 1;
            match turn_end {
                TurnEnd::StopToken => self.with_stop_token += 1,
                TurnEnd::SpecialToken(token) => {
                    *self.with_other_special_token.entry(token).or_default() += 1;
                }
                TurnEnd::NoSpecialToken => {}
            }
        }
        if let Some(suffix) = &tokenized.omitted_prompt_suffix {
            let (_, rows) = self.omitted_prompt_suffix.get_or_insert_with(|| (suffix.clone(), 0));
            *rows += 1;
        }
    }

    /// Returns the special token with which most turns end, if generation never stops at the end of a
    /// turn.
    pub fn unlisted_end_token(&self) -> Option<u32> {
        let counts = self.with_other_special_token.iter();
        let most = counts.max_by_key(|(_, rows)| **rows).map(|(token, _)| *token);
        most.filter(|_| self.with_stop_token == 0)
    }

    /// Returns what the user should know, one sentence each.
    pub fn warnings(&self, tokenizer: &Tokenizer) -> Vec<String> {
        let mut warnings = Vec::new();
        if self.split_conversations > 0 {
            warnings.push(format!(
                "the chat template renders earlier turns differently once more turns follow, so {} of {} conversations became {} rows, one for each assistant turn, each as a server would render it",
                self.split_conversations, self.conversations, self.rows_of_split_conversations
            ));
        }
        if let Some(token) = self.unlisted_end_token() {
            warnings.push(format!(
                "answers end with {:?} (token {token}), but generation stops at {}: for a full-parameter or merged result, {token} will be added to eos_token_id in its generation_config.json; to serve an adapter, add it to generation_config.json of the base model or set it as a stop token",
                tokenizer.token_text(token),
                stop_tokens(tokenizer)
            ));
        } else if self.conversations > 0 && self.with_stop_token == 0 {
            warnings.push(format!(
                "no answer ends with a token at which generation stops ({}), so the model does not learn when to stop: end each assistant turn with {{{{ eos_token }}}} in the template (dataset.chatTemplate), or make the text that ends it a token (model.addedTokens)",
                stop_tokens(tokenizer)
            ));
        }
        if let Some((suffix, rows)) = &self.omitted_prompt_suffix {
            warnings.push(format!(
                "the generation prompt ends with {suffix:?}, but the answers of {rows} of {} conversations do not start with it: they are trained on as the template renders them, without it, while a server that adds it asks for reasoning first",
                self.conversations
            ));
        }
        warnings
    }
}

fn stop_tokens(tokenizer: &Tokenizer) -> String {
    let names: Vec<String> = tokenizer
        .eos_ids()
        .iter()
        .filter(|&&id| tokenizer.is_stop_token(id))
        .map(|&id| format!("{:?}", tokenizer.token_text(id)))
        .collect();
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}
