//! The `tojson` filter of transformers: Python's `json.dumps` with its keywords.

use std::io::{self, Write};

use minijinja::{
    Error, ErrorKind, Value,
    value::{Kwargs, ValueKind},
};

/// `tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
///
/// Differs from the filter of Jinja: nothing is escaped for HTML.
pub(super) fn to_json(
    value: &Value,
    positional: &[Value],
    keywords: &Kwargs,
) -> Result<Value, Error> {
    let invalid = |message: String| Error::new(ErrorKind::InvalidOperation, message);
    let argument = |index: usize, name: &str| -> Result<Option<Value>, Error> {
        let given = keywords.get::<Option<Value>>(name)?.or_else(|| positional.get(index).cloned());
        Ok(given.filter(|value| !value.is_none() && !value.is_undefined()))
    };
    let ensure_ascii = argument(0, "ensure_ascii")?.is_some_and(|value| value.is_true());
    let indent = argument(1, "indent")?.map(|value| match value.as_str() {
        Some(text) => text.to_owned(),
        None => " ".repeat(value.as_usize().unwrap_or(0)),
    });
    let separators = match argument(2, "separators")? {
        None => {
            let comma = if indent.is_some() { "," } else { ", " };
            [comma.to_owned(), ": ".to_owned()]
        }
        Some(value) => {
            let pair: Vec<Value> = value.try_iter()?.collect();
            match pair.as_slice() {
                [comma, colon] => [comma.to_string(), colon.to_string()],
                _ => {
                    return Err(invalid("separators of tojson are a comma and a colon".to_owned()));
                }
            }
        }
    };
    let sort_keys = argument(3, "sort_keys")?.is_some_and(|value| value.is_true());
    keywords.assert_all_used()?;
    let style = Style { ensure_ascii, indent, separators, sort_keys };
    let mut bytes = Vec::new();
    style.write(value, 0, &mut bytes)?;
    Ok(Value::from_safe_string(String::from_utf8_lossy(&bytes).into_owned()))
}

struct Style {
    ensure_ascii: bool,
    indent: Option<String>,
    separators: [String; 2],
    sort_keys: bool,
}

impl Style {
    fn write(&self, value: &Value, depth: usize, out: &mut Vec<u8>) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => out.extend(b"null"),
            ValueKind::Bool => out.extend(if value.is_true() { &b"true"[..] } else { b"false" }),
            ValueKind::String => self.write_string(value.as_str().unwrap_or_default(), out)?,
            // Infinities and NaN are written as in Python, although JSON does not have them.
            ValueKind::Number => out.extend(number(value).into_bytes()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.write_all(*b"[]", depth, &items, out, |item, out| {
                    self.write(item, depth + 1, out)
                })?;
            }
            ValueKind::Map => {
                let mut items: Vec<(String, Value)> = Vec::new();
                for key in value.try_iter()? {
                    items.push((json_key(&key), value.get_item(&key)?));
                }
                if self.sort_keys {
                    items.sort_by(|one, other| one.0.cmp(&other.0));
                }
                self.write_all(*b"{}", depth, &items, out, |(key, item), out| {
                    self.write_string(key, out)?;
                    out.extend(self.separators[1].as_bytes());
                    self.write(item, depth + 1, out)
                })?;
            }
            kind => {
                let message = format!("a value of kind {kind} has no JSON");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        }
        Ok(())
    }

    fn write_all<T>(
        &self,
        brackets: [u8; 2],
        depth: usize,
        items: &[T],
        out: &mut Vec<u8>,
        mut write: impl FnMut(&T, &mut Vec<u8>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        out.push(brackets[0]);
        for (index, item) in items.iter().enumerate() {
            if index > 0 {
                out.extend(self.separators[0].as_bytes());
            }
            self.write_line_break(depth + 1, out);
            write(item, out)?;
        }
        if !items.is_empty() {
            self.write_line_break(depth, out);
        }
        out.push(brackets[1]);
        Ok(())
    }

    fn write_line_break(&self, depth: usize, out: &mut Vec<u8>) {
        if let Some(indent) = &self.indent {
            out.push(b'\n');
            out.extend(indent.repeat(depth).into_bytes());
        }
    }

    fn write_string(&self, text: &str, out: &mut Vec<u8>) -> Result<(), Error> {
        let written = if self.ensure_ascii {
            let mut serializer = serde_json::Serializer::with_formatter(&mut *out, Ascii);
            serde::Serialize::serialize(text, &mut serializer)
        } else {
            serde_json::to_writer(&mut *out, text)
        };
        written.map_err(|error| Error::new(ErrorKind::InvalidOperation, error.to_string()))?;
        Ok(())
    }
}

/// Converts a key to a string, as Python's `json.dumps` does.
fn json_key(key: &Value) -> String {
    match key.kind() {
        ValueKind::None => "null".to_owned(),
        ValueKind::Bool => key.is_true().to_string(),
        ValueKind::Number => number(key),
        _ => key.to_string(),
    }
}

fn number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    match f64::try_from(value.clone()) {
        Ok(number) if number.is_nan() => "NaN".to_owned(),
        Ok(number) if number.is_infinite() => {
            if number > 0.0 {
                "Infinity".to_owned()
            } else {
                "-Infinity".to_owned()
            }
        }
        Ok(number) => float(number),
        Err(_) => value.to_string(),
    }
}

/// Formats a float as Python's `repr`: the shortest digits, with an exponent below 1e-4 and from 1e16.
fn float(number: f64) -> String {
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if number == 0.0 || (-4..16).contains(&exponent) {
        let plain = number.to_string();
        if plain.contains('.') { plain } else { format!("{plain}.0") }
    } else {
        let sign = if exponent < 0 { '-' } else { '+' };
        format!("{digits}e{sign}{:02}", exponent.unsigned_abs())
    }
}

/// Escapes everything that is not printable ASCII, as Python does with `ensure_ascii`.
struct Ascii;

impl serde_json::ser::Formatter for Ascii {
    fn write_string_fragment<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        for character in fragment.chars() {
            if matches!(character, ' '..='~') {
                writer.write_all(&[character as u8])?;
            } else {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    write!(writer, "\\u{unit:04x}")?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use minijinja::{Environment, value::Rest};

    use super::*;

    /// Each expected text is the output of Python 3.11.
    #[test]
    fn prints_what_python_prints() {
        let check = |expression: &str| {
            let mut environment = Environment::new();
            let filter = |value: Value, positional: Rest<Value>, keywords: Kwargs| {
                to_json(&value, &positional, &keywords)
            };
            environment.add_filter("tojson", filter);
            environment
                .render_str(&format!("{{{{ {expression} }}}}"), ())
                .unwrap_or_else(|error| error.to_string())
        };
        assert_eq!(
            check("{'b': [1, 2.0], 'a': {}, 'c': none, 'd': true} | tojson"),
            r#"{"b": [1, 2.0], "a": {}, "c": null, "d": true}"#
        );
        assert_eq!(
            check("{'b': [1, 2], 'a': {}} | tojson(indent=4)"),
            "{\n    \"b\": [\n        1,\n        2\n    ],\n    \"a\": {}\n}"
        );
        assert_eq!(
            check("{'b': 1, 'a': [2, 3]} | tojson(sort_keys=True, separators=(',', ':'))"),
            r#"{"a":[2,3],"b":1}"#
        );
        assert_eq!(check("'é<&>☂😀\\x7f' | tojson"), "\"é<&>☂😀\u{7f}\"");
        assert_eq!(check("'é' | tojson(ensure_ascii=False)"), r#""é""#);
        assert_eq!(
            check("'é☂😀\\x7f' | tojson(ensure_ascii=True)"),
            r#""\u00e9\u2602\ud83d\ude00\u007f""#
        );
        assert_eq!(
            check("[1e-05, 1e16, 123456.75, 0.0001, {1: {none: 1}}] | tojson"),
            r#"[1e-05, 1e+16, 123456.75, 0.0001, {"1": {"null": 1}}]"#
        );
        assert_eq!(check("[1, [2]] | tojson(indent='\\t')"), "[\n\t1,\n\t[\n\t\t2\n\t]\n]");
        assert!(check("1 | tojson(indents=4)").contains("indents"));
    }
}
