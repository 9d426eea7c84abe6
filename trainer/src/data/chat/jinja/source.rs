//! Prepares the source of a template for minijinja, which differs from Jinja2.
//!
//! Three differences are resolved before the template is compiled: Jinja2 reads every line ending as
//! `\n`; `{% generation %}` is a block that transformers adds; and `%` formats strings.

use std::borrow::Cow;

/// Replaces `{% generation %}` in rendered text. A private-use character; rows with it are refused.
pub(crate) const GENERATION_START: char = '\u{F8F0}';
/// Replaces `{% endgeneration %}`.
pub(crate) const GENERATION_END: char = '\u{F8F1}';
/// The filter that replaces the operator `%`.
pub(super) const PERCENT: &str = "__percent__";

/// The source of a template as minijinja needs it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Prepared {
    /// The source.
    pub source: String,
    /// Whether it has `{% generation %}` blocks outside of comments.
    pub marks_generation: bool,
}

/// Prepares the source of a template.
pub(super) fn prepare(source: &str) -> Prepared {
    let source = unix_line_ends(source);
    let mut prepared =
        Prepared { source: String::with_capacity(source.len()), marks_generation: false };
    let mut rest = source.as_ref();
    while let Some((before, tag, after)) = next_tag(rest) {
        rest = after;
        prepared.source.push_str(before);
        match tag {
            Tag::Comment(text) => prepared.source.push_str(text),
            Tag::Code(text) => match generation_mark(text) {
                Some(mark) => {
                    prepared.marks_generation = true;
                    rest = prepared.put_mark(mark, text, rest);
                }
                None if is_block(text, "raw") => {
                    let end = end_of_raw(rest).unwrap_or(rest.len());
                    prepared.source.push_str(text);
                    prepared.source.push_str(&rest[..end]);
                    rest = &rest[end..];
                }
                None => {
                    prepared.source.push_str(&format_with_filter(text));
                }
            },
        }
    }
    prepared.source.push_str(rest);
    prepared
}

/// Converts all line endings to `\n`.
///
/// # Source
/// The lexer of Jinja2 splits the source at `\r\n`, `\r` and `\n`, and joins the lines with `\n`.
fn unix_line_ends(source: &str) -> Cow<'_, str> {
    if source.contains('\r') {
        Cow::Owned(source.replace("\r\n", "\n").replace('\r', "\n"))
    } else {
        Cow::Borrowed(source)
    }
}

enum Tag<'a> {
    /// `{# … #}`.
    Comment(&'a str),
    /// `{% … %}` or `{{ … }}`.
    Code(&'a str),
}

/// Splits at the next tag; `None` without one. An unterminated tag is left to minijinja to reject.
fn next_tag(source: &str) -> Option<(&str, Tag<'_>, &str)> {
    let start = source
        .match_indices('{')
        .map(|(index, _)| index)
        .find(|index| source[index + 1..].starts_with(['%', '{', '#']))?;
    let (before, tag) = source.split_at(start);
    if tag.starts_with("{#") {
        let end = tag.find("#}")? + 2;
        return Some((before, Tag::Comment(&tag[..end]), &tag[end..]));
    }
    let end = if tag.starts_with("{%") { end_of_code(tag, "%}") } else { end_of_code(tag, "}}") }?;
    Some((before, Tag::Code(&tag[..end]), &tag[end..]))
}

/// Finds the end of a tag, skipping strings and nested brackets.
fn end_of_code(tag: &str, end: &str) -> Option<usize> {
    let mut depth = 0_usize;
    let mut index = 2;
    while index < tag.len() {
        let rest = &tag[index..];
        if depth == 0 && rest.starts_with(end) {
            return Some(index + 2);
        }
        let character = rest.chars().next()?;
        match character {
            '\'' | '"' => index += string_length(rest)?,
            '{' | '(' | '[' => {
                depth += 1;
                index += 1;
            }
            '}' | ')' | ']' => {
                depth = depth.saturating_sub(1);
                index += 1;
            }
            _ => index += character.len_utf8(),
        }
    }
    None
}

/// Returns the length of the string literal that `text` starts with.
fn string_length(text: &str) -> Option<usize> {
    let quote = text.chars().next()?;
    let mut escaped = false;
    text.char_indices().skip(1).find_map(|(index, character)| {
        let ends = character == quote && !escaped;
        escaped = character == '\\' && !escaped;
        ends.then_some(index + 1)
    })
}

fn is_block(tag: &str, name: &str) -> bool {
    tag.strip_prefix("{%")
        .and_then(|tag| tag.strip_suffix("%}"))
        .is_some_and(|inner| inner.trim_matches(['-', '+']).trim() == name)
}

fn end_of_raw(source: &str) -> Option<usize> {
    let mut from = 0;
    while let Some(start) = source[from..].find("{%").map(|start| from + start) {
        let end = start + source[start..].find("%}")? + 2;
        if is_block(&source[start..end], "endraw") {
            return Some(start);
        }
        from = start + 2;
    }
    None
}

fn generation_mark(tag: &str) -> Option<char> {
    if is_block(tag, "generation") {
        Some(GENERATION_START)
    } else {
        is_block(tag, "endgeneration").then_some(GENERATION_END)
    }
}

impl Prepared {
    /// Replaces a tag by an expression that prints a mark, and returns the source after it.
    ///
    /// A block tag removes white space before it on its line and the newline after it. An expression
    /// does not, so both are removed here.
    fn put_mark<'a>(&mut self, mark: char, tag: &str, rest: &'a str) -> &'a str {
        let inner = &tag[2..tag.len() - 2];
        if inner.starts_with('-') {
            self.source.truncate(self.source.trim_end().len());
        } else if !inner.starts_with('+') {
            let line = self.source.trim_end_matches([' ', '\t']).len();
            if line == 0 || self.source[..line].ends_with('\n') {
                self.source.truncate(line);
            }
        }
        self.source.push_str("{{ '");
        self.source.push(mark);
        self.source.push_str("' }}");
        if inner.ends_with('-') {
            rest.trim_start()
        } else if inner.ends_with('+') {
            rest
        } else {
            rest.strip_prefix('\n').unwrap_or(rest)
        }
    }
}

/// Rewrites `'…' % values` and `x % (…)` to a filter, because `%` of minijinja supports only numbers.
///
/// If neither side suggests a string, `%` stays: it is the remainder, and its left side may be a
/// product, of which a filter would take only the last factor.
fn format_with_filter(tag: &str) -> Cow<'_, str> {
    if !tag[2..tag.len() - 2].trim_matches(['-', '+']).contains('%') {
        return Cow::Borrowed(tag);
    }
    let mut result = String::with_capacity(tag.len() + 16);
    let (open, body) = tag.split_at(2);
    let (body, close) = body.split_at(body.len() - 2);
    result.push_str(open);
    let mut rest = body;
    let mut last_is_string = false;
    while let Some(character) = rest.chars().next() {
        let length = match character {
            '\'' | '"' => string_length(rest).unwrap_or(rest.len()),
            other => other.len_utf8(),
        };
        let after = &rest[length..];
        if character == '%' && (last_is_string || after.trim_start().starts_with('(')) {
            let operand = after.trim_start();
            let end = operand_length(operand);
            result.push_str(&format!("|{PERCENT}({})", format_inner(&operand[..end])));
            rest = &operand[end..];
            last_is_string = false;
            continue;
        }
        if !character.is_whitespace() {
            last_is_string = matches!(character, '\'' | '"');
        }
        result.push_str(&rest[..length]);
        rest = after;
    }
    result.push_str(close);
    Cow::Owned(result)
}

fn format_inner(operand: &str) -> String {
    let tag = format!("{{{{{operand}}}}}");
    let formatted = format_with_filter(&tag);
    formatted[2..formatted.len() - 2].to_owned()
}

/// Returns the length of an operand: a name, a literal or a bracket, with its attributes and filters.
fn operand_length(text: &str) -> usize {
    let mut index = 0;
    while let Some(character) = text[index..].chars().next() {
        let rest = &text[index..];
        match character {
            '\'' | '"' => index += string_length(rest).unwrap_or(rest.len()),
            '(' | '[' | '{' => index += bracket_length(rest),
            '.' | '_' | '|' => index += 1,
            other if other.is_alphanumeric() => index += other.len_utf8(),
            _ => break,
        }
    }
    index
}

fn bracket_length(text: &str) -> usize {
    let (mut depth, mut index) = (0_usize, 0);
    while let Some(character) = text[index..].chars().next() {
        index += match character {
            '\'' | '"' => string_length(&text[index..]).unwrap_or(text.len() - index),
            other => other.len_utf8(),
        };
        match character {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            break;
        }
    }
    index
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(source: &str) -> String {
        prepare(source).source.replace(GENERATION_START, "<").replace(GENERATION_END, ">")
    }

    #[test]
    fn line_ends_are_those_of_unix() {
        assert_eq!(check("a\r\nb\rc\n{{ '\r\n' }}"), "a\nb\nc\n{{ '\n' }}");
    }

    #[test]
    fn generation_blocks_become_marks() {
        assert_eq!(
            check("a\n  {% generation %}\nb{% endgeneration %}\nc"),
            "a\n{{ '<' }}b{{ '>' }}c"
        );
        assert_eq!(
            check("a {%- generation -%} b {%+ endgeneration +%}\nc"),
            "a{{ '<' }}b {{ '>' }}\nc"
        );
    }

    #[test]
    fn generation_in_comments_strings_and_raw_text_is_none() {
        for source in [
            "{# use {% generation %} here #}x",
            "{{ '{% generation %}' }}",
            "{% raw %}{% generation %}{% endraw %}x",
            "{{ {'a': {'%}': 1}} }}{{ \"it's {% generation %}\" }}",
        ] {
            let prepared = prepare(source);
            assert_eq!((prepared.source.as_str(), prepared.marks_generation), (source, false));
        }
    }

    #[test]
    fn percent_formats_where_a_string_is_meant() {
        assert_eq!(check("{{ '%s is %d' % ('a', 3) }}"), "{{ '%s is %d' |__percent__(('a', 3)) }}");
        assert_eq!(check("{{ form % (a, b) ~ x }}"), "{{ form |__percent__((a, b)) ~ x }}");
        assert_eq!(check("{{ '%s' % m.content|trim }}"), "{{ '%s' |__percent__(m.content|trim) }}");
        assert_eq!(
            check("{{ 'a%s' % ('%s' % x) }}"),
            "{{ 'a%s' |__percent__(('%s' |__percent__(x))) }}"
        );
    }

    #[test]
    fn the_remainder_is_left_alone() {
        for source in [
            "{% if loop.index0 % 2 == 0 %}x{% endif %}",
            "{{ 7*a % b }}%}",
            "{%- if a -%} 5 % {% endif %}",
        ] {
            assert_eq!(check(source), source);
        }
    }
}
