//! From a text and spans in it to tokens and targets.

use std::ops::Range;

use crate::data::{
    chat::turns::Text,
    tokenizer::{TokenRow, Tokenizer, byte_level::Encoded},
};

/// Tokens before a border that are tokenized again, where no added token is nearer.
const LOOK_BACK: usize = 256;
/// The last tokens of those, which do not depend on where the tokenization began.
const COMPARED: usize = 64;

/// How the turns of a row end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum End {
    /// Some turn ends with a token at which generation stops.
    Stop,
    /// Turns end with a special token, but generation does not stop there.
    Special(u32),
    /// Turns end with no special token.
    Open,
}

/// Tokenizes a text once and marks what the turns in it say.
///
/// # Errors
/// A text that names the turn that cannot be told from what is around it.
pub(crate) fn tokenize(tokenizer: &Tokenizer, text: &Text) -> Result<(TokenRow, End), String> {
    let Encoded { ids: tokens, offsets } = tokenizer.encoding(&text.text)?;
    let row = Row { tokenizer, text: &text.text, tokens: &tokens, offsets: &offsets };
    let mut targets = vec![false; tokens.len()];
    let mut end = End::Open;
    let mut from = 1;
    for turn in &text.turns {
        let span = &turn.span;
        // Tokens are in the order of the text, so each turn is looked for after the one before.
        let first_after =
            |place: usize| (from..tokens.len()).find(|&index| offsets[index].end > place);
        let (Some(next), Some(first)) = (first_after(turn.border), first_after(span.start)) else {
            continue;
        };
        let after = (first..tokens.len())
            .find(|&index| offsets[index].start >= span.end)
            .unwrap_or(tokens.len());
        from = after.max(1);
        if !text.is_marked
            && (offsets[next].start < turn.border || !row.is_border(next, turn.border))
        {
            return Err(format!(
                "a token spans the border between the prompt and turn {}, so the turn cannot be trained on alone",
                turn.index
            ));
        }
        // What follows the end of a turn is never generated: generation stops there.
        let stop = (first..after).rfind(|&index| tokenizer.stops_at(tokens[index]));
        let special = || {
            (first..after)
                .rfind(|&index| tokenizer.is_special(tokens[index]) && row.ends_turn(index, span))
        };
        let kept = match (stop, special()) {
            (Some(stop), _) => {
                end = End::Stop;
                stop + 1
            }
            (None, Some(special)) => {
                end = end.min(End::Special(tokens[special]));
                special + 1
            }
            (None, None) => {
                if !text.is_marked
                    && span.end < text.text.len()
                    && (offsets[after - 1].end > span.end || !row.is_border(after, span.end))
                {
                    return Err(format!(
                        "a token spans the border between turn {} and what follows it, so the turn cannot be trained on alone",
                        turn.index
                    ));
                }
                after
            }
        };
        targets[first..kept].fill(true);
    }
    Ok((TokenRow { tokens, targets }, end))
}

struct Row<'a> {
    tokenizer: &'a Tokenizer,
    text: &'a str,
    tokens: &'a [u32],
    offsets: &'a [Range<usize>],
}

impl Row<'_> {
    /// Tells whether the text up to a border is tokenized as it is inside the whole text, for that
    /// is what the model is given before it answers. `next` is the first token after the border.
    ///
    /// An added token is a border for every tokenizer, so what is before the last one does not
    /// matter; without one, some tokens back it does not either.
    fn is_border(&self, next: usize, border: usize) -> bool {
        let special = (next.saturating_sub(LOOK_BACK)..next)
            .rfind(|&index| self.tokenizer.is_added(self.tokens[index]));
        let first = special.unwrap_or(next.saturating_sub(LOOK_BACK));
        if special.is_some_and(|special| special + 1 == next) {
            return true;
        }
        let start = if first == 0 { 0 } else { self.offsets[first].start };
        let Ok(alone) = self.tokenizer.encode(&self.text[start..border], false) else {
            return false;
        };
        let inside = &self.tokens[first..next];
        if first == 0 || special.is_some() {
            return alone == inside;
        }
        let compared = COMPARED.min(inside.len());
        alone.len() >= compared
            && alone[alone.len() - compared..] == inside[inside.len() - compared..]
    }

    /// Tells whether nothing but white space follows a token in its turn.
    fn ends_turn(&self, index: usize, span: &Range<usize>) -> bool {
        self.text[self.offsets[index].end.min(span.end)..span.end].trim().is_empty()
    }
}
