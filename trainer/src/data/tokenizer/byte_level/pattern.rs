//! Patterns that split text into words, run by a finite automaton.
//!
//! Tokenizers give theirs in the syntax of Oniguruma. A pattern is *plain* if it means the same in the
//! syntax of `regex`: literals, classes of Unicode, groups, alternatives and greedy repetitions. Of
//! looking ahead only the usual end is known, which takes white space but for the last before a word.

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

/// White space, but for its last character where a word follows; both ways to write what is left.
const ENDS: [&str; 2] = [r"|\s+(?!\S)|\s+", r"|\s+(?!\S)|\s"];

/// A compiled pattern.
#[derive(Debug)]
pub(super) struct Pattern {
    /// The alternatives before the end as pattern 0, then white space as pattern 1.
    regex: Regex,
}

impl Pattern {
    /// Compiles a pattern; `None` if it is not plain, or may match nothing.
    pub(super) fn new(pattern: &str) -> Option<Self> {
        let without_end = ENDS.iter().find_map(|end| pattern.strip_suffix(end));
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

    /// Splits a part of a text; tells of each piece whether it is a match.
    pub(super) fn split(
        &self,
        cache: &mut Cache,
        text: &str,
        range: Range<usize>,
        give: &mut dyn FnMut(Range<usize>, bool),
    ) {
        let text = &text[..range.end];
        let mut from = range.start;
        while from < range.end {
            let input = Input::new(text).range(from..);
            // Patterns mostly cover the text, and a search that must begin here is quicker.
            let here = self.regex.search_with(cache, &input.clone().anchored(Anchored::Yes));
            let Some(found) = here.or_else(|| self.regex.search_with(cache, &input)) else {
                return give(from..range.end, false);
            };
            if from < found.start() {
                give(from..found.start(), false);
            }
            let mut end = found.end();
            if found.pattern().as_usize() == 1 && end < range.end {
                let last = text[..end].char_indices().next_back().map_or(0, |(at, _)| at);
                if last > found.start() {
                    end = last;
                }
            }
            give(found.start()..end, true);
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
        // A second sign after a repetition makes it possessive there, and repeats it here.
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

/// `\p{…}` of a category or script.
fn is_plain_class(class: &ClassUnicode) -> bool {
    !matches!(class.kind, ClassUnicodeKind::NamedValue { .. })
}

/// `\s` and `\d`; what `\w` is differs.
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
