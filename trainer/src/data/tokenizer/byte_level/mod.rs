//! Byte-level BPE without the library's bookkeeping: the same tokens in a fraction of the time.
//!
//! `tokenizers` carries through every step where each character came from. A byte-level tokenizer
//! that only splits needs none of that: its words are slices of the text, and a word that was met
//! before has the tokens that it had. So words are found here, and the library's model is asked only
//! for words that are new. A tokenizer or a text with anything else (another normalizer, an added
//! token that takes in the spaces beside it, a pattern that is not [plain](pattern)) is left to the library.

mod pattern;

use std::{cell::RefCell, collections::HashMap, ops::Range};

use aho_corasick::{AhoCorasick, MatchKind};
use icu_normalizer::ComposingNormalizerBorrowed;
use regex_automata::meta::Cache;
use thread_local::ThreadLocal;
use tokenizers::{
    AddedToken, Model as _, ModelWrapper, NormalizerWrapper, PreTokenizerWrapper,
    SplitDelimiterBehavior,
    pre_tokenizers::split::{Split as LibrarySplit, SplitPattern},
};

use crate::data::tokenizer::byte_level::pattern::Pattern;

/// Words that a thread remembers; at one more it begins anew, which bounds memory.
const WORDS: usize = 1 << 16;
/// Longer words, in bytes, are not remembered.
const LONGEST: usize = 64;

/// Tokens of a text and where they are in it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Encoded {
    /// The tokens.
    pub ids: Vec<u32>,
    /// The bytes of the text that each is for, widened to whole characters.
    pub offsets: Vec<Range<usize>>,
}

/// What is known of a byte-level tokenizer.
#[derive(Debug)]
pub(crate) struct ByteLevel {
    /// Tokens that are found in the text as it is.
    raw: AddedTokens,
    /// Tokens that are found in the normalized text between those.
    normalized: AddedTokens,
    is_nfc: bool,
    splits: Vec<Split>,
    /// How a byte is written in the vocabulary.
    alphabet: [char; 256],
    memory: ThreadLocal<RefCell<Memory>>,
}

#[derive(Debug)]
struct AddedTokens {
    finder: AhoCorasick,
    ids: Vec<u32>,
}

/// A step that splits what the step before it left whole.
#[derive(Debug)]
enum Split {
    /// Before and after each digit, or each run of digits.
    Digits { each: bool },
    /// Around each match; what is between matches is a word too, or left out.
    Around { pattern: Pattern, leaves_gaps_out: bool },
}

/// What a thread remembers.
#[derive(Debug)]
struct Memory {
    /// What each pattern works with.
    caches: Vec<Cache>,
    words: WordCache,
}

/// Words, and the tokens of all of them.
#[derive(Debug, Default)]
struct WordCache {
    ranges: HashMap<Box<str>, Range<usize>, ahash::RandomState>,
    /// Each token, and where it ends in its word.
    tokens: Vec<(u32, usize)>,
    /// How many of them belong to a word that is remembered.
    remembered: usize,
}

impl ByteLevel {
    /// Returns what is needed to do a tokenizer's work; `None` if it does anything unknown here.
    pub(crate) fn of(tokenizer: &tokenizers::Tokenizer) -> Option<Self> {
        let ModelWrapper::BPE(model) = tokenizer.get_model() else { return None };
        if model.dropout.is_some_and(|dropout| dropout > 0.0)
            || tokenizer.get_encode_special_tokens()
        {
            return None;
        }
        let is_nfc = match tokenizer.get_normalizer() {
            None => false,
            Some(NormalizerWrapper::NFC(_)) => true,
            Some(_) => return None,
        };
        let added: Vec<(u32, AddedToken)> =
            tokenizer.get_added_tokens_decoder().into_iter().collect();
        let is_plain = |token: &AddedToken| {
            let is_normal = !token.normalized || !is_nfc || self::is_nfc(&token.content);
            !(token.single_word || token.lstrip || token.rstrip) && is_normal
        };
        if !added.iter().all(|(_, token)| is_plain(token)) {
            return None;
        }
        let (normalized, raw): (Vec<_>, Vec<_>) =
            added.into_iter().partition(|(_, token)| token.normalized);
        Some(Self {
            raw: AddedTokens::new(&raw)?,
            normalized: AddedTokens::new(&normalized)?,
            is_nfc,
            splits: splits(tokenizer.get_pre_tokenizer()?)?,
            alphabet: alphabet(),
            memory: ThreadLocal::new(),
        })
    }

    /// Turns a text into the tokens that `tokenizer` has for it, without special tokens around it;
    /// `None` if that is the library's to do.
    ///
    /// # Errors
    /// A text that says what the model refused.
    pub(crate) fn encode(
        &self,
        tokenizer: &tokenizers::Tokenizer,
        text: &str,
    ) -> Result<Option<Encoded>, String> {
        if self.is_nfc && !is_nfc(text) {
            return Ok(None);
        }
        let mut memory = self.memory.get_or(|| RefCell::new(self.new_memory())).borrow_mut();
        let Memory { caches, words } = &mut *memory;
        let mut encoded = Encoded::default();
        let mut fault = None;
        for (range, id) in self.raw.split(text, 0..text.len()) {
            if let Some(id) = id {
                encoded.push(id, range);
                continue;
            }
            for (range, id) in self.normalized.split(text, range) {
                if let Some(id) = id {
                    encoded.push(id, range);
                    continue;
                }
                split(&self.splits, caches, text, range, &mut |range| {
                    let word = &text[range.clone()];
                    match words.find(word, |tokens| self.tokenize(tokenizer, word, tokens)) {
                        Ok(tokens) => encoded.push_word(word, range.start, tokens),
                        Err(error) => fault = Some(error),
                    }
                });
            }
        }
        fault.map_or(Ok(Some(encoded)), Err)
    }

    fn new_memory(&self) -> Memory {
        let cache = |split: &Split| match split {
            Split::Digits { .. } => None,
            Split::Around { pattern, .. } => Some(pattern.new_cache()),
        };
        Memory {
            caches: self.splits.iter().filter_map(cache).collect(),
            words: WordCache::default(),
        }
    }

    /// Asks the library's model for the tokens of a word.
    fn tokenize(
        &self,
        tokenizer: &tokenizers::Tokenizer,
        word: &str,
        tokens: &mut Vec<(u32, usize)>,
    ) -> Result<(), String> {
        let written: String = word.bytes().map(|byte| self.alphabet[usize::from(byte)]).collect();
        let found = tokenizer.get_model().tokenize(&written).map_err(|error| error.to_string())?;
        let (mut characters, mut bytes) = (0, 0);
        for token in found {
            characters += written[bytes..token.offsets.1].chars().count();
            bytes = token.offsets.1;
            tokens.push((token.id, characters));
        }
        Ok(())
    }
}

impl WordCache {
    /// Returns the tokens of a word; `tokenize` adds those of a new one.
    fn find(
        &mut self,
        word: &str,
        tokenize: impl FnOnce(&mut Vec<(u32, usize)>) -> Result<(), String>,
    ) -> Result<&[(u32, usize)], String> {
        if let Some(place) = self.ranges.get(word) {
            return Ok(&self.tokens[place.clone()]);
        }
        if self.ranges.len() == WORDS {
            self.ranges.clear();
            self.remembered = 0;
        }
        // What is behind the last remembered word was of one too long to remember.
        self.tokens.truncate(self.remembered);
        tokenize(&mut self.tokens)?;
        let place = self.remembered..self.tokens.len();
        if word.len() <= LONGEST {
            self.remembered = place.end;
            self.ranges.insert(word.into(), place.clone());
        }
        Ok(&self.tokens[place])
    }
}

impl Encoded {
    fn push(&mut self, id: u32, range: Range<usize>) {
        self.ids.push(id);
        self.offsets.push(range);
    }

    fn push_word(&mut self, word: &str, start: usize, tokens: &[(u32, usize)]) {
        let mut from = 0;
        for &(id, to) in tokens {
            let widened = word.floor_char_boundary(from)..word.ceil_char_boundary(to);
            self.push(id, start + widened.start..start + widened.end);
            from = to;
        }
    }
}

impl AddedTokens {
    /// `None` if they are too many to be found at once.
    fn new(tokens: &[(u32, AddedToken)]) -> Option<Self> {
        let finder = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(tokens.iter().map(|(_, token)| &token.content))
            .ok()?;
        Some(Self { finder, ids: tokens.iter().map(|(id, _)| *id).collect() })
    }

    /// Splits a part of a text into added tokens and what is between them.
    fn split(&self, text: &str, range: Range<usize>) -> Vec<(Range<usize>, Option<u32>)> {
        let mut pieces = Vec::new();
        let mut from = range.start;
        for found in self.finder.find_iter(&text[range.clone()]) {
            let start = range.start + found.start();
            if from < start {
                pieces.push((from..start, None));
            }
            from = range.start + found.end();
            pieces.push((start..from, Some(self.ids[found.pattern().as_usize()])));
        }
        if from < range.end {
            pieces.push((from..range.end, None));
        }
        pieces
    }
}

/// Applies all splits to a part of a text, and gives each word.
fn split(
    splits: &[Split],
    caches: &mut [Cache],
    text: &str,
    range: Range<usize>,
    give: &mut dyn FnMut(Range<usize>),
) {
    let Some((first, rest)) = splits.split_first() else { return give(range) };
    match first {
        Split::Around { pattern, leaves_gaps_out } => {
            let (cache, caches) = caches.split_first_mut().expect("each pattern has a cache");
            pattern.split(cache, text, range, &mut |range, is_match| {
                if is_match || !leaves_gaps_out {
                    split(rest, caches, text, range, give);
                }
            });
        }
        Split::Digits { each } => {
            let Range { start: mut from, end } = range;
            let mut before = None;
            for (at, character) in text[range.clone()].char_indices() {
                let at = range.start + at;
                let is_digit = character.is_numeric();
                let is_border =
                    before.is_some_and(|before| before != is_digit || is_digit && *each);
                if is_border {
                    split(rest, caches, text, from..at, give);
                    from = at;
                }
                before = Some(is_digit);
            }
            if from < end {
                split(rest, caches, text, from..end, give);
            }
        }
    }
}

/// Reads the steps before the bytes are written in their alphabet, which must come last.
fn splits(pre_tokenizer: &PreTokenizerWrapper) -> Option<Vec<Split>> {
    let steps = match pre_tokenizer {
        PreTokenizerWrapper::Sequence(sequence) => sequence.as_ref(),
        one => std::slice::from_ref(one),
    };
    let (last, before) = steps.split_last()?;
    let mut splits: Vec<Split> = before.iter().map(split_of).collect::<Option<_>>()?;
    match last {
        PreTokenizerWrapper::ByteLevel(last) if !last.add_prefix_space => {
            if last.use_regex {
                let pattern = Pattern::new(pattern::GPT2)?;
                splits.push(Split::Around { pattern, leaves_gaps_out: false });
            }
            Some(splits)
        }
        _ => None,
    }
}

fn split_of(step: &PreTokenizerWrapper) -> Option<Split> {
    match step {
        PreTokenizerWrapper::Digits(digits) => {
            Some(Split::Digits { each: digits.individual_digits })
        }
        PreTokenizerWrapper::Split(LibrarySplit {
            pattern: SplitPattern::Regex(pattern),
            behavior,
            invert,
            ..
        }) => {
            let leaves_gaps_out = match (behavior, invert) {
                (SplitDelimiterBehavior::Isolated, _) => false,
                (SplitDelimiterBehavior::Removed, true) => true,
                _ => return None,
            };
            Some(Split::Around { pattern: Pattern::new(pattern)?, leaves_gaps_out })
        }
        _ => None,
    }
}

fn is_nfc(text: &str) -> bool {
    text.is_ascii() || ComposingNormalizerBorrowed::new_nfc().is_normalized(text)
}

/// How bytes are written: printable ones of Latin-1 as they are, the others from U+0100 on.
///
/// # Source
/// `bytes_to_unicode` of GPT-2's `encoder.py`.
fn alphabet() -> [char; 256] {
    let mut next = 0x100..;
    std::array::from_fn(|byte| {
        let is_printable = matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
        let code = if is_printable { byte as u32 } else { next.next().unwrap_or_default() };
        char::from_u32(code).unwrap_or_default()
    })
}

#[cfg(test)]
mod tests;
