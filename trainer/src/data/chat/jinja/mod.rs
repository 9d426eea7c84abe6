//! Jinja as transformers runs it: sandboxed Jinja2 with additional filters and functions.
//!
//! # Source
//! `transformers/utils/chat_template_utils.py`, 5.23: `trim_blocks`, `lstrip_blocks`, loop controls,
//! `raise_exception`, `strftime_now`, `tojson` without HTML escapes, `{% generation %}`.

mod json;
mod source;
mod strings;

use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use jiff::{civil::Date, fmt::strtime};
use minijinja::{
    Environment, Error, ErrorKind, Value,
    formatting::{FormatStyle, format},
    syntax::SyntaxConfig,
    value::{Kwargs, Rest},
};

pub(crate) use source::{GENERATION_END, GENERATION_START};

/// The name of the only template of an environment.
const TEMPLATE_NAME: &str = "chat";

/// A compiled template.
#[derive(Debug)]
pub(crate) struct Program {
    environment: Environment<'static>,
    /// Whether it has `{% generation %}` blocks.
    pub(crate) marks_generation: bool,
    /// The date in every format that the template has requested.
    dates: Arc<Mutex<BTreeSet<String>>>,
    /// Whether a rendered text contains one of them.
    has_printed_date: AtomicBool,
}

impl Program {
    /// Compiles a template with a fixed date.
    ///
    /// # Errors
    /// A message that says what is wrong, and on which line.
    pub(crate) fn compile(source: &str, today: Date) -> Result<Self, String> {
        let source::Prepared { source, marks_generation } = source::prepare(source);
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .map_err(|error| explain(&error))?;
        environment.set_syntax(syntax);
        environment.set_unknown_method_callback(strings::call_method);
        environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        let dates: Arc<Mutex<BTreeSet<String>>> = Arc::default();
        let requested = Arc::clone(&dates);
        environment.add_function("strftime_now", move |format: &str| {
            // A time without a zone: midnight of that day.
            let date = strtime::format(format, today.at(0, 0, 0, 0)).map_err(|error| {
                Error::new(
                    ErrorKind::InvalidOperation,
                    format!("strftime_now({format:?}): {error}"),
                )
            })?;
            requested.lock().unwrap_or_else(PoisonError::into_inner).insert(date.clone());
            Ok(date)
        });
        let to_json = |value: Value, positional: Rest<Value>, keywords: Kwargs| {
            json::to_json(&value, &positional, &keywords)
        };
        environment.add_filter("tojson", to_json);
        environment.add_filter(source::PERCENT, percent);
        environment.add_test("iterable", is_iterable);
        environment.add_template_owned(TEMPLATE_NAME, source).map_err(|error| explain(&error))?;
        Ok(Self { environment, marks_generation, dates, has_printed_date: AtomicBool::new(false) })
    }

    /// Renders the template with variables.
    ///
    /// # Errors
    /// A message that says which error the template raised or ran into, and on which line.
    pub(crate) fn render(&self, variables: Value) -> Result<String, String> {
        let template =
            self.environment.get_template(TEMPLATE_NAME).map_err(|error| explain(&error))?;
        let text = template.render(variables).map_err(|error| explain(&error))?;
        if !self.has_printed_date() {
            let dates = self.dates.lock().unwrap_or_else(PoisonError::into_inner);
            if dates.iter().any(|date| !date.is_empty() && text.contains(date)) {
                self.has_printed_date.store(true, Ordering::Relaxed);
            }
        }
        Ok(text)
    }

    /// Returns whether a text rendered since the last reset contains the date.
    pub(crate) fn has_printed_date(&self) -> bool {
        self.has_printed_date.load(Ordering::Relaxed)
    }

    /// Forgets whether the date was printed.
    pub(crate) fn reset_printed_date(&self) {
        self.has_printed_date.store(false, Ordering::Relaxed);
    }
}

/// The test `iterable`. As in Python, none is not iterable; templates test `tools` for it.
fn is_iterable(value: &Value) -> bool {
    !value.is_none() && (value.as_str().is_some() || value.try_iter().is_ok())
}

/// Python's `%`: formats a string, or computes the remainder of numbers.
fn percent(left: &Value, right: &Value) -> Result<Value, Error> {
    let Some(text) = left.as_str() else {
        return match (left.as_i64(), right.as_i64()) {
            (Some(left), Some(right)) if right != 0 => {
                let remainder = left.wrapping_rem(right);
                let other_sign = remainder != 0 && (remainder < 0) != (right < 0);
                Ok(Value::from(if other_sign { remainder + right } else { remainder }))
            }
            _ => Err(Error::new(
                ErrorKind::InvalidOperation,
                format!("{} % {} is not possible", left.kind(), right.kind()),
            )),
        };
    };
    let is_tuple = right.downcast_object_ref::<minijinja::value::Tuple>().is_some();
    let arguments: Vec<Value> =
        if is_tuple { right.try_iter()?.collect() } else { vec![right.clone()] };
    format(FormatStyle::Printf, text, &arguments).map(Value::from)
}

fn explain(error: &Error) -> String {
    let line = error.line().map_or(String::new(), |line| format!(" (line {line} of the template)"));
    format!("{}{line}", error.detail().map_or_else(|| error.kind().to_string(), str::to_owned))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(source: &str) -> String {
        let variables = Value::from_pairs([("name", Value::from("Ann"))]);
        Program::compile(source, jiff::civil::date(2025, 3, 9))
            .and_then(|program| program.render(variables))
            .unwrap_or_else(|reason| format!("error: {reason}"))
    }

    /// Each expected text is the output of Jinja2 3.1.6.
    #[test]
    fn does_what_jinja2_does() {
        let cases = [
            ("{{ '%s is %d' % ('a', 3) }}", "a is 3"),
            ("{{ '%s' % name }}{{ '%5.1f%%' % 2.25 }}", "Ann  2.2%"),
            ("{{ '%s' % [1, 2] }}", "[1, 2]"),
            ("{{ (7 % (4)) ~ (-7 % (4)) ~ 7 % 4 }}", "313"),
            (
                "{{ strftime_now('%d %b %Y') }} {{ strftime_now('%B %-d, %A') }}",
                "09 Mar 2025 March 9, Sunday",
            ),
            ("{% if strftime_now is defined %}x{% endif %}", "x"),
            ("{# {% generation %} #}x", "x"),
            ("a\r\n{% if true %}\r\nb\r\n{% endif %}\r\n", "a\nb\n"),
            (
                "{{ [1, none, true, 'a', 1.5] }}{{ {'a': 'b'} }}",
                "[1, None, True, 'a', 1.5]{'a': 'b'}",
            ),
            (
                "{% macro m(a, b='x') %}{{ a ~ b }}{% endmacro %}{{ m('1') }}{{ m('1', b='2') }}",
                "1x12",
            ),
            (
                "{% set ns = namespace(n=0) %}{% for i in range(5) %}{% if i == 3 %}{% break %}{% endif %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}",
                "3",
            ),
            ("{{ 'abc'[::-1] }}{{ [1, 2, 3][1:] }}{{ 'abc'[-1] }}", "cba[2, 3]c"),
            (
                "{% for k, v in {'b': 1, 'a': 2}.items() %}{{ k }}{{ v }}{% endfor %}{{ {'b': 1, 'a': 2} | dictsort }}",
                "b1a2[('a', 2), ('b', 1)]",
            ),
            (
                "{{ undefined_name }}{{ undefined_name is defined }}{{ name is string }}{{ {} is mapping }}",
                "FalseTrueTrue",
            ),
            (
                "{{ [{'a': 1}, {'a': 2}] | map(attribute='a') | join(',') }}{{ [1, 2] | selectattr('x', 'defined') | list }}",
                "1,2[]",
            ),
            ("{{ 'x' if false }}{{ 3 // 2 }}{{ 2 ** 3 }}{{ 7 / 2 }}", "183.5"),
            ("{% filter upper %}a{% endfilter %}{% set x %}b{% endset %}{{ x }}", "Ab"),
            ("{{ dict(a=1) }}{{ ('a', 'b') }}{{ 'a' in ('a', 'b') }}", "{'a': 1}('a', 'b')True"),
            ("{{ 'a\\qb' }}{{ '\\u00e9\\x41' }}", "a\\qbéA"),
            (
                "{{ ['a', 'b'] | last }}{{ 'abc' | first }}{{ [] | length }}{{ '  a ' | trim }}",
                "ba0a",
            ),
            (
                "{%- call(x) outer() %}[{{ x }}]{% endcall -%}{% macro outer() %}{{ caller(1) }}{% endmacro %}",
                "error: outer is unknown (line 1 of the template)",
            ),
            (
                "{{ none is iterable }}{{ [] is iterable }}{{ 'a' is iterable }}{{ 1 is iterable }}",
                "FalseTrueTrueFalse",
            ),
            ("{{ 'a' 'b' }}", "ab"),
            ("{{ raise_exception('no ' ~ name) }}", "error: no Ann (line 1 of the template)"),
            ("{{ strftime_now('%Q') }}", "error:"),
        ];
        for (source, expected) in cases {
            let found = check(source);
            assert!(
                found == expected || expected == "error:" && found.starts_with(expected),
                "{source}\n  {found:?}\n  {expected:?}"
            );
        }
    }
}
