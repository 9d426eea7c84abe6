//! A fast path for byte-level BPE: the tokens of the library `tokenizers` in a fraction of the time.
//!
//! The library tracks the origin of every character through every step. A byte-level tokenizer that only
//! splits does not need that: its words are slices of the text, and the same word always has the same
//! tokens. So this module finds the words, caches their tokens, and calls the BPE model of the library
//! only for new words. Everything else (another normalizer, an added token that strips spaces, a pattern
//! that is not [plain](pattern)) is left to the library.

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

/// The most words in the cache of a thread. A full cache is cleared, which bounds memory.
const MAX_CACHED_WORDS: usize = 1 << 16;
/// The most bytes of a word in the cache.
const MAX_CACHED_WORD_BYTES: usize = 64;

/// The tokens of a text and their offsets.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Encoded {
    /// The tokens.
    pub ids: Vec<u32>,
    /// The byte range of each token in the text, widened to whole characters.
    pub offsets: Vec<Range<usize>>,
}

/// A byte-level tokenizer that the fast path supports.
#[derive(Debug)]
pub(crate) struct ByteLevel {
    /// Added tokens that are matched in the raw text.
    raw: AddedTokens,
    /// Added tokens that are matched in the normalized text between those.
    normalized: AddedTokens,
    is_nfc: bool,
    splits: Vec<Split>,
    /// The character that represents each byte in the vocabulary.
    alphabet: [char; 256],
    thread_caches: ThreadLocal<RefCell<ThreadCache>>,
}

#[derive(Debug)]
struct AddedTokens {
    finder: AhoCorasick,
    ids: Vec<u32>,
}

/// A step that splits the pieces of the step before it.
#[derive(Debug)]
enum Split {
    /// Before and after each digit, or each run of digits.
    Digits { individually: bool },
    /// Around each match. The text between matches is a word too, or dropped.
    Around { pattern: Pattern, drops_gaps: bool },
}

/// The caches of one thread.
#[derive(Debug)]
struct ThreadCache {
    /// One regex cache per pattern.
    caches: Vec<Cache>,
    words: WordCache,
}

/// The tokens of words.
#[derive(Debug, Default)]
struct WordCache {
    ranges: HashMap<Box<str>, Range<usize>, ahash::RandomState>,
    /// The id of each token, and where the token ends in its word.
    tokens: Vec<(u32, usize)>,
    /// How many of `tokens` belong to a cached word.
    cached_tokens: usize,
}

impl ByteLevel {
    /// Returns the fast path for a tokenizer; `None` if the tokenizer does something unsupported.
    pub(crate) fn new(tokenizer: &tokenizers::Tokenizer) -> Option<Self> {
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
            thread_caches: ThreadLocal::new(),
        })
    }

    /// Turns a text into the tokens that `tokenizer` has for it, without special tokens around it;
    /// `None` if the text is unsupported.
    ///
    /// # Errors
    /// The message of the BPE model.
    pub(crate) fn encode(
        &self,
        tokenizer: &tokenizers::Tokenizer,
        text: &str,
    ) -> Result<Option<Encoded>, String> {
        if self.is_nfc && !is_nfc(text) {
            return Ok(None);
        }
        let mut thread_caches =
            self.thread_caches.get_or(|| RefCell::new(self.new_thread_cache())).borrow_mut();
        let ThreadCache { caches, words } = &mut *thread_caches;
        let mut encoded = Encoded::default();
        let mut failure = None;
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
                        Err(error) => failure = Some(error),
                    }
                });
            }
        }
        failure.map_or(Ok(Some(encoded)), Err)
    }

    fn new_thread_cache(&self) -> ThreadCache {
        let cache = |split: &Split| match split {
            Split::Digits { .. } => None,
            Split::Around { pattern, .. } => Some(pattern.new_cache()),
        };
        ThreadCache {
            caches: self.splits.iter().filter_map(cache).collect(),
            words: WordCache::default(),
        }
    }

    /// Tokenizes a word with the BPE model of the library.
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
    /// Returns the tokens of a word; calls `tokenize` to append those of a new one.
    fn find(
        &mut self,
        word: &str,
        tokenize: impl FnOnce(&mut Vec<(u32, usize)>) -> Result<(), String>,
    ) -> Result<&[(u32, usize)], String> {
        if let Some(place) = self.ranges.get(word) {
            return Ok(&self.tokens[place.clone()]);
        }
        if self.ranges.len() == MAX_CACHED_WORDS {
            self.ranges.clear();
            self.cached_tokens = 0;
        }
        // Tokens after the last cached word belong to a word that was too long for the cache.
        self.tokens.truncate(self.cached_tokens);
        tokenize(&mut self.tokens)?;
        let place = self.cached_tokens..self.tokens.len();
        if word.len() <= MAX_CACHED_WORD_BYTES {
            self.cached_tokens = place.end;
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
    /// Creates a finder; `None` if there are too many tokens for one.
    fn new(tokens: &[(u32, AddedToken)]) -> Option<Self> {
        let finder = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(tokens.iter().map(|(_, token)| &token.content))
            .ok()?;
        Some(Self { finder, ids: tokens.iter().map(|(id, _)| *id).collect() })
    }

    /// Splits a part of a text into added tokens and the text between them.
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

/// Applies all splits to a part of a text and calls `on_word` for each word.
fn split(
    splits: &[Split],
    caches: &mut [Cache],
    text: &str,
    range: Range<usize>,
    on_word: &mut dyn FnMut(Range<usize>),
) {
    let Some((first, rest)) = splits.split_first() else { return on_word(range) };
    match first {
        Split::Around { pattern, drops_gaps } => {
            let (cache, caches) = caches.split_first_mut().expect("each pattern has a cache");
            pattern.split(cache, text, range, &mut |range, is_match| {
                if is_match || !drops_gaps {
                    split(rest, caches, text, range, on_word);
                }
            });
        }
        Split::Digits { individually } => {
            let Range { start: mut from, end } = range;
            let mut before = None;
            for (at, character) in text[range.clone()].char_indices() {
                let at = range.start + at;
                let is_digit = character.is_numeric();
                let is_border =
                    before.is_some_and(|before| before != is_digit || is_digit && *individually);
                if is_border {
                    split(rest, caches, text, from..at, on_word);
                    from = at;
                }
                before = Some(is_digit);
            }
            if from < end {
                split(rest, caches, text, from..end, on_word);
            }
        }
    }
}

/// Converts the pre-tokenizers of the library to splits; `None` if one is unsupported. The last one must
/// map bytes to their alphabet.
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
                splits.push(Split::Around { pattern, drops_gaps: false });
            }
            Some(splits)
        }
        _ => None,
    }
}

fn split_of(step: &PreTokenizerWrapper) -> Option<Split> {
    match step {
        PreTokenizerWrapper::Digits(digits) => {
            Some(Split::Digits { individually: digits.individual_digits })
        }
        PreTokenizerWrapper::Split(LibrarySplit {
            pattern: SplitPattern::Regex(pattern),
            behavior,
            invert,
            ..
        }) => {
            let drops_gaps = match (behavior, invert) {
                (SplitDelimiterBehavior::Isolated, _) => false,
                (SplitDelimiterBehavior::Removed, true) => true,
                _ => return None,
            };
            Some(Split::Around { pattern: Pattern::new(pattern)?, drops_gaps })
        }
        _ => None,
    }
}

fn is_nfc(text: &str) -> bool {
    text.is_ascii() || ComposingNormalizerBorrowed::new_nfc().is_normalized(text)
}

/// Returns the character for each byte: printable Latin-1 stays, other bytes map to U+0100 and above.
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
