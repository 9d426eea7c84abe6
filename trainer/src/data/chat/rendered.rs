//! What rendering made of the conversations of a split: counted, and said.

use std::collections::BTreeMap;

use crate::data::tokenizer::{Tokenized, Tokenizer, targets::End};

/// Counts over the rows of a split.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rendered {
    /// Rows that became more than one, and what all of them became.
    pub expanded: (u64, u64),
    /// Rows that are conversations.
    pub conversations: u64,
    /// Of those, the ones in which some turn ends where generation stops.
    pub stops: u64,
    /// And those whose turns end with a special token at which it does not, by that token.
    pub specials: BTreeMap<u32, u64>,
    /// Rows whose answers do not go on from what the generation prompt opens, and what that is.
    pub opened: Option<(String, u64)>,
}

impl Rendered {
    /// Counts a row.
    pub fn add(&mut self, tokenized: &Tokenized) {
        if tokenized.rows.len() > 1 {
            self.expanded.0 += 1;
            self.expanded.1 += tokenized.rows.len() as u64;
        }
        if let Some(end) = tokenized.end {
            self.conversations += 1;
            match end {
                End::Stop => self.stops += 1,
                End::Special(token) => *self.specials.entry(token).or_default() += 1,
                End::Open => {}
            }
        }
        if let Some(opened) = &tokenized.opened {
            let counted = self.opened.get_or_insert_with(|| (opened.clone(), 0));
            counted.1 += 1;
        }
    }

    /// Returns the special token with which most turns end, if generation stops at none of them.
    pub fn unlisted_end(&self) -> Option<u32> {
        let most = self.specials.iter().max_by_key(|(_, rows)| **rows).map(|(token, _)| *token);
        most.filter(|_| self.stops == 0)
    }

    /// Says what a user should know; one sentence each.
    pub fn remarks(&self, tokenizer: &Tokenizer) -> Vec<String> {
        let mut remarks = Vec::new();
        let (rows, parts) = self.expanded;
        if rows > 0 {
            remarks.push(format!(
                "the chat template prints earlier turns differently once more follow, so {rows} of {} conversations became {parts} rows, one for each assistant turn, each as a server would render it",
                self.conversations
            ));
        }
        if let Some(token) = self.unlisted_end() {
            remarks.push(format!(
                "answers end with {:?} (token {token}), but generation stops at {}: a full-parameter or merged result gets {token} added to eos_token_id in its generation_config.json; where an adapter is served, add it to the base model's generation_config.json or name it as stop token",
                tokenizer.written(token),
                stops(tokenizer)
            ));
        } else if self.conversations > 0 && self.stops == 0 {
            remarks.push(format!(
                "no answer ends with a token at which generation stops ({}), so the model does not learn when to stop: end each assistant turn with {{{{ eos_token }}}} in the template (dataset.chatTemplate), or make the text that ends it a token (model.addedTokens)",
                stops(tokenizer)
            ));
        }
        if let Some((opened, rows)) = &self.opened {
            remarks.push(format!(
                "the generation prompt ends in {opened:?}, which the answers of {rows} of {} conversations do not begin with: they are trained on as the template prints them, without it; a server that adds it asks for a thought first",
                self.conversations
            ));
        }
        remarks
    }
}

fn stops(tokenizer: &Tokenizer) -> String {
    let names: Vec<String> = tokenizer
        .eos_ids()
        .iter()
        .filter(|&&id| tokenizer.stops_at(id))
        .map(|&id| format!("{:?}", tokenizer.written(id)))
        .collect();
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}
