//! Tokenizes a rendered text and marks the tokens of its spans as targets.

use std::ops::Range;

use finetune_contract::OnOverflow;

use crate::data::{
    chat::assistant_spans::RenderedText,
    tokenizer::{Tokenizer, byte_level::Encoded},
};

/// How many tokens before a border are tokenized again, if no added token is closer.
const LOOK_BACK_TOKENS: usize = 256;
/// How many of those, counted from the border, are compared: the last ones do not depend on where the
/// tokenization starts.
const COMPARED_TOKENS: usize = 64;

/// A row as tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenRow {
    /// The tokens.
    pub tokens: Vec<u32>,
    /// Whether each token is a target, which is predicted from those before it; the first never is.
    pub targets: Vec<bool>,
}

impl TokenRow {
    /// Returns how many of the tokens fit a context; `None` if the row is skipped, because it is too
    /// long or because no target remains.
    pub fn trained_length(&self, context_length: u32, on_overflow: OnOverflow) -> Option<usize> {
        let context_length = context_length as usize;
        if self.tokens.len() > context_length && on_overflow != OnOverflow::Truncate {
            return None;
        }
        let length = self.tokens.len().min(context_length);
        self.targets[..length].iter().any(|&is_target| is_target).then_some(length)
    }
}

/// How the turns of a row end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum TurnEnd {
    /// Some turn ends with a token at which generation stops.
    StopToken,
    /// Turns end with a special token, but generation does not stop at it.
    SpecialToken(u32),
    /// Turns do not end with a special token.
    NoSpecialToken,
}

/// Tokenizes a text once and marks the tokens of its spans.
///
/// # Errors
/// A message that names the turn that shares a token with its surroundings.
pub(super) fn tokenize(
    tokenizer: &Tokenizer,
    text: &RenderedText,
) -> Result<(TokenRow, TurnEnd), String> {
    let Encoded { ids: tokens, offsets } = tokenizer.encode_with_offsets(&text.text)?;
    let row = EncodedText { tokenizer, text: &text.text, tokens: &tokens, offsets: &offsets };
    let mut targets = vec![false; tokens.len()];
    let mut turn_end = TurnEnd::NoSpecialToken;
    let mut from = 1;
    for span in &text.spans {
        let range = &span.range;
        // Tokens and spans are in the order of the text: search after the previous span.
        let first_after =
            |position: usize| (from..tokens.len()).find(|&index| offsets[index].end > position);
        let (Some(next), Some(first)) = (first_after(span.prompt_end), first_after(range.start))
        else {
            continue;
        };
        let after = (first..tokens.len())
            .find(|&index| offsets[index].start >= range.end)
            .unwrap_or(tokens.len());
        from = after.max(1);
        if !text.is_marked
            && (offsets[next].start < span.prompt_end
                || !row.is_token_border(next, span.prompt_end))
        {
            return Err(format!(
                "a token spans the border between the prompt and turn {}, so the turn cannot be trained on alone",
                span.message_index
            ));
        }
        // Generation stops at the end of a turn, so the tokens after it are not targets.
        let stop = (first..after).rfind(|&index| tokenizer.is_stop_token(tokens[index]));
        let special = || {
            (first..after)
                .rfind(|&index| tokenizer.is_special(tokens[index]) && row.is_last(index, range))
        };
        let end = match (stop, special()) {
            (Some(stop), _) => {
                turn_end = TurnEnd::StopToken;
                stop + 1
            }
            (None, Some(special)) => {
                turn_end = turn_end.min(TurnEnd::SpecialToken(tokens[special]));
                special + 1
            }
            (None, None) => {
                if !text.is_marked
                    && range.end < text.text.len()
                    && (offsets[after - 1].end > range.end
                        || !row.is_token_border(after, range.end))
                {
                    return Err(format!(
                        "a token spans the border between turn {} and what follows it, so the turn cannot be trained on alone",
                        span.message_index
                    ));
                }
                after
            }
        };
        targets[first..end].fill(true);
    }
    Ok((TokenRow { tokens, targets }, turn_end))
}

struct EncodedText<'a> {
    tokenizer: &'a Tokenizer,
    text: &'a str,
    tokens: &'a [u32],
    offsets: &'a [Range<usize>],
}

impl EncodedText<'_> {
    /// Returns whether the text before a border has the same tokens alone as inside the whole text. A
    /// model that is asked for the turn after the border gets them alone. `next` is the first token
    /// after the border.
    ///
    /// Every tokenizer splits at added tokens, so the text before the last one does not matter; if
    /// there is none, it is enough to look back a bounded number of tokens.
    fn is_token_border(&self, next: usize, border: usize) -> bool {
        let added = (next.saturating_sub(LOOK_BACK_TOKENS)..next)
            .rfind(|&index| self.tokenizer.is_matched_first(self.tokens[index]));
        let first = added.unwrap_or(next.saturating_sub(LOOK_BACK_TOKENS));
        if added.is_some_and(|added| added + 1 == next) {
            return true;
        }
        let start = if first == 0 { 0 } else { self.offsets[first].start };
        let Ok(alone) = self.tokenizer.encode(&self.text[start..border], false) else {
            return false;
        };
        let inside = &self.tokens[first..next];
        if first == 0 || added.is_some() {
            return alone == inside;
        }
        let compared = COMPARED_TOKENS.min(inside.len());
        alone.len() >= compared
            && alone[alone.len() - compared..] == inside[inside.len() - compared..]
    }

    /// Returns whether only white space follows a token in a range.
    fn is_last(&self, index: usize, range: &Range<usize>) -> bool {
        self.text[self.offsets[index].end.min(range.end)..range.end].trim().is_empty()
    }
}
