//! A model's chat template, rendered as transformers renders it.
//!
//! # Source
//! `transformers/utils/chat_template_utils.py`, 5.23: Jinja with `trim_blocks` and `lstrip_blocks`,
//! Python's string methods, `raise_exception`, `tojson` without HTML escapes, and the
//! `{% generation %}` block. Differs: `strftime_now` does not exist, so that templates which ask
//! whether it does take their fixed date and the same row is the same tokens tomorrow.

use std::{collections::BTreeMap, ops::Range};

use minijinja::{Environment, Error, ErrorKind, Value, syntax::SyntaxConfig, value::Serde};

use super::conversation::Message;

/// Stands for `{% generation %}` in rendered text; private use, and rows that have it are refused.
const GENERATION_START: char = '\u{F8F0}';
/// Stands for `{% endgeneration %}`.
const GENERATION_END: char = '\u{F8F1}';

/// A compiled chat template.
#[derive(Debug)]
pub struct Template {
    environment: Environment<'static>,
    special_tokens: Vec<(String, String)>,
    marks_generation: bool,
}

/// What a template makes of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// The text.
    pub text: String,
    /// Byte ranges inside `{% generation %}` blocks; empty if the template has none.
    pub generation: Vec<Range<usize>>,
}

impl Template {
    /// Compiles a template; `special_tokens` are variables such as (`bos_token`, `<s>`).
    ///
    /// # Errors
    /// A text that says what is wrong with it, and where.
    pub fn compile(source: &str, special_tokens: Vec<(String, String)>) -> Result<Self, String> {
        let (source, marks_generation) = mark_generation(source);
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .map_err(|error| explain(&error))?;
        environment.set_syntax(syntax);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_filter("tojson", to_json);
        environment.add_template_owned("chat", source).map_err(|error| explain(&error))?;
        Ok(Self { environment, special_tokens, marks_generation })
    }

    /// Tells whether the template says itself what the assistant generates.
    pub fn marks_generation(&self) -> bool {
        self.marks_generation
    }

    /// Renders a conversation.
    ///
    /// # Errors
    /// A text: what the template refused, what it could not do, or that a turn has a mark.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<Rendered, String> {
        if self.marks_generation {
            refuse_marks(messages, &[GENERATION_START, GENERATION_END])?;
        }
        let template = self.environment.get_template("chat").map_err(|error| explain(&error))?;
        let mut variables: BTreeMap<&str, Value> = self
            .special_tokens
            .iter()
            .map(|(name, token)| (name.as_str(), Value::from(token.as_str())))
            .collect();
        variables.insert("messages", Value::from(Serde(messages)));
        variables.insert("add_generation_prompt", Value::from(add_generation_prompt));
        // transformers always passes both; templates ask `tools is not none`.
        variables.insert("tools", Value::from(()));
        variables.insert("documents", Value::from(()));
        let variables = Value::from_pairs(variables);
        let text = template.render(variables).map_err(|error| explain(&error))?;
        if self.marks_generation {
            Ok(take_marks(&text))
        } else {
            Ok(Rendered { text, generation: Vec::new() })
        }
    }
}

/// Refuses turns with a character that is used as a mark: it would be taken for one.
///
/// # Errors
/// A text that names the turn and the character.
pub fn refuse_marks(messages: &[Message], marks: &[char]) -> Result<(), String> {
    for (index, message) in messages.iter().enumerate() {
        if let Some(mark) = message.content.chars().find(|character| marks.contains(character)) {
            return Err(format!(
                "turn {index} has the private-use character {}, which marks turns while they are rendered: remove it",
                mark.escape_unicode()
            ));
        }
    }
    Ok(())
}

fn explain(error: &Error) -> String {
    let line = error.line().map_or(String::new(), |line| format!(" (line {line} of the template)"));
    format!("{}{line}", error.detail().map_or_else(|| error.kind().to_string(), str::to_owned))
}

/// Replaces `{% generation %}` tags by expressions that print a mark.
///
/// A block tag swallows white space before it on its line and the newline after it; an expression
/// does not, so both are taken out here.
fn mark_generation(source: &str) -> (String, bool) {
    let mut result = String::with_capacity(source.len());
    let mut rest = source;
    let mut found = false;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else { break };
        let end = start + length + 2;
        let inner = &rest[start + 2..end - 2];
        let mark = match inner.trim_matches(['-', '+']).trim() {
            "generation" => GENERATION_START,
            "endgeneration" => GENERATION_END,
            _ => {
                result.push_str(&rest[..end]);
                rest = &rest[end..];
                continue;
            }
        };
        found = true;
        result.push_str(&rest[..start]);
        if inner.starts_with('-') {
            result.truncate(result.trim_end().len());
        } else {
            let line = result.trim_end_matches([' ', '\t']).len();
            if result[..line].ends_with('\n') || line == 0 {
                result.truncate(line);
            }
        }
        result.push_str("{{ '");
        result.push(mark);
        result.push_str("' }}");
        rest = &rest[end..];
        rest = if inner.ends_with('-') {
            rest.trim_start()
        } else {
            rest.strip_prefix('\n').unwrap_or(rest)
        };
    }
    result.push_str(rest);
    (result, found)
}

fn take_marks(marked: &str) -> Rendered {
    let mut text = String::with_capacity(marked.len());
    let mut generation = Vec::new();
    let mut start = None;
    for character in marked.chars() {
        match character {
            GENERATION_START => start = Some(text.len()),
            GENERATION_END => generation.extend(start.take().map(|start| start..text.len())),
            other => text.push(other),
        }
    }
    generation.extend(start.map(|start| start..text.len()));
    Rendered { text, generation }
}

/// Python's `json.dumps(value, ensure_ascii=False)`: a space after commas and colons.
fn to_json(value: &Value, indent: Option<usize>) -> Result<Value, Error> {
    let invalid =
        |error: serde_json::Error| Error::new(ErrorKind::InvalidOperation, error.to_string());
    // Straight from the template's value: a detour through `serde_json::Value` may sort the keys.
    let mut bytes = Vec::new();
    let spaces = " ".repeat(indent.unwrap_or(0));
    if indent.is_some() {
        let formatter = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
        serde::Serialize::serialize(
            value,
            &mut serde_json::Serializer::with_formatter(&mut bytes, formatter),
        )
        .map_err(invalid)?;
    } else {
        serde::Serialize::serialize(
            value,
            &mut serde_json::Serializer::with_formatter(&mut bytes, PythonFormatter),
        )
        .map_err(invalid)?;
    }
    Ok(Value::from_safe_string(String::from_utf8_lossy(&bytes).into_owned()))
}

struct PythonFormatter;

impl serde_json::ser::Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
    ) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::conversation::ChatRole;

    fn render(source: &str) -> String {
        render_answer(source, "c")
    }

    fn render_answer(source: &str, answer: &str) -> String {
        let special = vec![("bos_token".to_owned(), "<s>".to_owned())];
        let rendered = Template::compile(source, special).and_then(|template| {
            template.render(
                &[Message::new(ChatRole::User, " a<b "), Message::new(ChatRole::Assistant, answer)],
                false,
            )
        });
        match rendered {
            Ok(Rendered { text, generation }) => {
                let generated: Vec<&str> =
                    generation.into_iter().map(|range| &text[range]).collect();
                format!("{text:?} {generated:?}")
            }
            Err(reason) => reason,
        }
    }

    #[test]
    fn renders_as_transformers_does() {
        insta::assert_snapshot!(render("{{ bos_token }}\n{% for m in messages %}\n  {% if m.role == 'user' %}\n[{{ m['content'].strip() }}]\n{% endif %}\n{% endfor %}"), @r#""<s>\n[a<b]\n" []"#);
        insta::assert_snapshot!(render("{{ messages[0] | tojson }}"), @r#""{\"role\": \"user\", \"content\": \" a<b \"}" []"#);
        insta::assert_snapshot!(render("{% for m in messages %}{% if loop.last %}{% continue %}{% endif %}{{ m.content.upper() }}{% endfor %}"), @r#"" A<B " []"#);
    }

    #[test]
    fn generation_blocks_leave_no_trace_in_the_text() {
        insta::assert_snapshot!(render("{% for m in messages %}\n{% if m.role == 'assistant' %}\n{% generation %}\n{{ m.content }}!\n{% endgeneration %}\n{% else %}\n{{ m.content }}\n{% endif %}\n{% endfor %}"), @r#"" a<b \nc!\n" ["c!\n"]"#);
        insta::assert_snapshot!(render("x {%- generation -%} y {%- endgeneration -%} z"), @r#""xyz" ["y"]"#);
    }

    #[test]
    fn marks_in_a_row_are_kept_or_refused_but_never_lost() {
        insta::assert_snapshot!(render_answer("{{ messages[1].content }}", "a\u{F8F0}b"), @r#""a\u{f8f0}b" []"#);
        insta::assert_snapshot!(render_answer("{% generation %}{{ messages[1].content }}{% endgeneration %}", "a\u{F8F0}b"), @r"turn 1 has the private-use character \u{f8f0}, which marks turns while they are rendered: remove it");
    }

    #[test]
    fn says_what_a_template_refuses() {
        insta::assert_snapshot!(render("{{ raise_exception('roles must alternate') }}"), @"roles must alternate (line 1 of the template)");
        insta::assert_snapshot!(render("{% for m in %}"), @"unexpected end of block (line 1 of the template)");
    }
}
