//! Patterns that split text into words, executed as finite automata.
//!
//! Tokenizers define them in the syntax of Oniguruma. A pattern is *plain* if it has the same meaning in
//! the syntax of `regex`: literals, Unicode classes, groups, alternatives and greedy repetitions. The
//! only supported look-ahead is the usual end of such patterns, which matches white space except for
//! its last character before a word.

use std::ops::Range;

use regex_automata::{
    Anchored, Input,
    meta::{Cache, Regex},
};
use regex_syntax::ast::{
    Ast, ClassPerl, ClassPerlKind, ClassSet, ClassSetItem, ClassUnicode, ClassUnicodeKind, Flag,
    FlagsItemKind, GroupKind, Literal, LiteralKind, parse::Parser,
};

/// The pattern of GPT-2's tokenizer.
///
/// # Source
/// <https://github.com/openai/gpt-2/blob/master/src/encoder.py>, as `ByteLevel` of `tokenizers` has it.
pub(super) const GPT2: &str =
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// The two usual ends of a pattern: white space without its last character if a word follows, then the
/// remaining white space.
const WHITE_SPACE_ENDS: [&str; 2] = [r"|\s+(?!\S)|\s+", r"|\s+(?!\S)|\s"];

/// A compiled pattern.
#[derive(Debug)]
pub(super) struct Pattern {
    /// Pattern 0 is everything before the end, pattern 1 is white space.
    regex: Regex,
}

impl Pattern {
    /// Compiles a pattern; `None` if it is not plain or can match the empty string.
    pub(super) fn new(pattern: &str) -> Option<Self> {
        let without_end = WHITE_SPACE_ENDS.iter().find_map(|end| pattern.strip_suffix(end));
        let main = without_end.unwrap_or(pattern);
        is_plain(&Parser::new().parse(main).ok()?).then_some(())?;
        let hir = regex_syntax::parse(main).ok()?;
        if hir.properties().minimum_len()? == 0 {
            return None;
        }
        let mut patterns = vec![main];
        patterns.extend(without_end.map(|_| r"\s+"));
        let regex = Regex::new_many(&patterns).ok()?;
        Some(Self { regex })
    }

    pub(super) fn new_cache(&self) -> Cache {
        self.regex.create_cache()
    }

    /// Splits a part of a text; calls `on_word` with each piece and whether it is a match.
    pub(super) fn split(
        &self,
        cache: &mut Cache,
        text: &str,
        range: Range<usize>,
        on_word: &mut dyn FnMut(Range<usize>, bool),
    ) {
        let text = &text[..range.end];
        let mut from = range.start;
        while from < range.end {
            let input = Input::new(text).range(from..);
            // Matches are usually adjacent, and an anchored search is faster.
            let here = self.regex.search_with(cache, &input.clone().anchored(Anchored::Yes));
            let Some(found) = here.or_else(|| self.regex.search_with(cache, &input)) else {
                return on_word(from..range.end, false);
            };
            if from < found.start() {
                on_word(from..found.start(), false);
            }
            let mut end = found.end();
            if found.pattern().as_usize() == 1 && end < range.end {
                let last = text[..end].char_indices().next_back().map_or(0, |(at, _)| at);
                if last > found.start() {
                    end = last;
                }
            }
            on_word(found.start()..end, true);
            from = end;
        }
    }
}

fn is_plain(ast: &Ast) -> bool {
    match ast {
        Ast::Literal(literal) => is_plain_literal(literal),
        Ast::ClassUnicode(class) => is_plain_class(class),
        Ast::ClassPerl(class) => is_plain_escape(class),
        Ast::ClassBracketed(class) => is_plain_set(&class.kind),
        // A second operator after a repetition makes it possessive in Oniguruma, but repeats it here.
        Ast::Repetition(repetition) => {
            repetition.greedy
                && !matches!(*repetition.ast, Ast::Repetition(_))
                && is_plain(&repetition.ast)
        }
        Ast::Group(group) => {
            let is_known = match &group.kind {
                GroupKind::CaptureIndex(_) => true,
                GroupKind::CaptureName { .. } => false,
                GroupKind::NonCapturing(flags) => flags
                    .items
                    .iter()
                    .all(|item| matches!(item.kind, FlagsItemKind::Flag(Flag::CaseInsensitive))),
            };
            is_known && is_plain(&group.ast)
        }
        Ast::Alternation(alternation) => alternation.asts.iter().all(is_plain),
        Ast::Concat(concat) => concat.asts.iter().all(is_plain),
        Ast::Empty(_) | Ast::Flags(_) | Ast::Dot(_) | Ast::Assertion(_) => false,
    }
}

fn is_plain_literal(literal: &Literal) -> bool {
    matches!(literal.kind, LiteralKind::Verbatim | LiteralKind::Meta | LiteralKind::Superfluous)
        || matches!(literal.c, '\n' | '\r' | '\t')
}

/// Returns whether a class is `\p{…}` of a category or script.
fn is_plain_class(class: &ClassUnicode) -> bool {
    !matches!(class.kind, ClassUnicodeKind::NamedValue { .. })
}

/// Returns whether a class is `\s` or `\d`; `\w` has different meanings.
fn is_plain_escape(class: &ClassPerl) -> bool {
    matches!(class.kind, ClassPerlKind::Space | ClassPerlKind::Digit)
}

fn is_plain_set(set: &ClassSet) -> bool {
    let ClassSet::Item(item) = set else { return false };
    is_plain_item(item)
}

fn is_plain_item(item: &ClassSetItem) -> bool {
    match item {
        ClassSetItem::Literal(literal) => is_plain_literal(literal),
        ClassSetItem::Range(range) => {
            is_plain_literal(&range.start) && is_plain_literal(&range.end)
        }
        ClassSetItem::Unicode(class) => is_plain_class(class),
        ClassSetItem::Perl(class) => is_plain_escape(class),
        ClassSetItem::Bracketed(class) => is_plain_set(&class.kind),
        ClassSetItem::Union(union) => union.items.iter().all(is_plain_item),
        ClassSetItem::Empty(_) | ClassSetItem::Ascii(_) => false,
    }
}
