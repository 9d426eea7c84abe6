//! Python's methods of strings, dictionaries and lists that templates may call.
//!
//! Methods that `minijinja_contrib` implements exactly are left to it.

use minijinja::{
    Error, ErrorKind, State, Value,
    value::{Kwargs, ValueKind, from_args},
};
use minijinja_contrib::pycompat::unknown_method_callback;

/// Calls a method that minijinja does not have.
pub(super) fn call_method(
    state: &mut State,
    value: &Value,
    method: &str,
    arguments: &[Value],
) -> Result<Value, Error> {
    let own = match value.kind() {
        ValueKind::String => string_method(value.as_str().unwrap_or_default(), method, arguments)?,
        ValueKind::Map | ValueKind::Seq if method == "copy" => Some(value.clone()),
        ValueKind::Seq if method == "index" => Some(index_of(value, arguments)?),
        _ => None,
    };
    match own {
        Some(result) => Ok(result),
        None => unknown_method_callback(state, value, method, arguments),
    }
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

fn index_of(list: &Value, arguments: &[Value]) -> Result<Value, Error> {
    let (wanted,): (Value,) = from_args(arguments)?;
    let found = list.try_iter()?.position(|item| item == wanted);
    found.map(Value::from).ok_or_else(|| invalid(format!("{wanted} is not in list")))
}

fn string_method(text: &str, method: &str, arguments: &[Value]) -> Result<Option<Value>, Error> {
    let result = match method {
        "strip" | "lstrip" | "rstrip" => Value::from(strip(text, method, arguments)?),
        "split" | "rsplit" => split(text, method == "rsplit", arguments)?,
        "splitlines" => split_lines(text, arguments)?,
        "partition" | "rpartition" => partition(text, method == "rpartition", arguments)?,
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(arguments)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(arguments)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "find" | "rfind" | "index" | "rindex" => find(text, method, arguments)?,
        "ljust" | "rjust" | "center" | "zfill" => Value::from(pad(text, method, arguments)?),
        "title" | "swapcase" | "casefold" | "capitalize" => {
            let () = from_args(arguments)?;
            Value::from(change_case(text, method))
        }
        "isdecimal" | "isdigit" => {
            let () = from_args(arguments)?;
            Value::from(!text.is_empty() && text.chars().all(|digit| digit.is_ascii_digit()))
        }
        "istitle" => {
            let () = from_args(arguments)?;
            Value::from(text.chars().any(char::is_alphabetic) && change_case(text, "title") == text)
        }
        _ => return Ok(None),
    };
    Ok(Some(result))
}

/// Returns whether Python considers a character white space: as Rust, and the four ASCII separators.
fn is_space(character: char) -> bool {
    character.is_whitespace() || matches!(character, '\u{1c}'..='\u{1f}')
}

fn strip<'a>(text: &'a str, method: &str, arguments: &[Value]) -> Result<&'a str, Error> {
    let (characters,): (Option<&str>,) = from_args(arguments)?;
    let drop = |character: char| match characters {
        Some(characters) => characters.contains(character),
        None => is_space(character),
    };
    let text = if method == "rstrip" { text } else { text.trim_start_matches(drop) };
    Ok(if method == "lstrip" { text } else { text.trim_end_matches(drop) })
}

fn split(text: &str, from_right: bool, arguments: &[Value]) -> Result<Value, Error> {
    let (separator, maximum, keywords): (Option<Value>, Option<i64>, Kwargs) =
        from_args(arguments)?;
    let separator = match separator {
        Some(separator) => Some(separator),
        None => keywords.get::<Option<Value>>("sep")?,
    };
    let maximum = match maximum {
        Some(maximum) => Some(maximum),
        None => keywords.get::<Option<i64>>("maxsplit")?,
    };
    keywords.assert_all_used()?;
    let parts = maximum
        .and_then(|maximum| usize::try_from(maximum).ok())
        .map_or(usize::MAX, |maximum| maximum.saturating_add(1));
    let separator = separator.filter(|separator| !separator.is_none());
    let found: Vec<&str> = match separator.as_ref().map(|separator| separator.as_str()) {
        Some(Some("")) => return Err(invalid("empty separator")),
        Some(None) => return Err(invalid("the separator of split is a string or none")),
        Some(Some(separator)) if from_right => {
            let mut found: Vec<&str> = text.rsplitn(parts, separator).collect();
            found.reverse();
            found
        }
        Some(Some(separator)) => text.splitn(parts, separator).collect(),
        None if from_right => words_from_right(text, parts),
        None => words(text, parts),
    };
    Ok(found.into_iter().map(Value::from).collect())
}

fn words(text: &str, parts: usize) -> Vec<&str> {
    let mut found = Vec::new();
    let mut rest = text.trim_start_matches(is_space);
    while !rest.is_empty() {
        let end = if found.len() + 1 == parts { None } else { rest.find(is_space) };
        let Some(end) = end else {
            found.push(rest);
            break;
        };
        found.push(&rest[..end]);
        rest = rest[end..].trim_start_matches(is_space);
    }
    found
}

fn words_from_right(text: &str, parts: usize) -> Vec<&str> {
    let mut found = Vec::new();
    let mut rest = text.trim_end_matches(is_space);
    while !rest.is_empty() {
        let border = if found.len() + 1 == parts {
            None
        } else {
            rest.char_indices().rfind(|(_, character)| is_space(*character))
        };
        let Some((border, space)) = border else {
            found.push(rest);
            break;
        };
        found.push(&rest[border + space.len_utf8()..]);
        rest = rest[..border].trim_end_matches(is_space);
    }
    found.reverse();
    found
}

fn split_lines(text: &str, arguments: &[Value]) -> Result<Value, Error> {
    let (keep, keywords): (Option<bool>, Kwargs) = from_args(arguments)?;
    let keep = match keep {
        Some(keep) => keep,
        None => keywords.get::<Option<bool>>("keepends")?.unwrap_or(false),
    };
    keywords.assert_all_used()?;
    let mut lines = Vec::new();
    let mut rest = text;
    while let Some((start, end)) = line_end(rest) {
        lines.push(Value::from(&rest[..if keep { end } else { start }]));
        rest = &rest[end..];
    }
    if !rest.is_empty() {
        lines.push(Value::from(rest));
    }
    Ok(Value::from(lines))
}

/// Finds the next line ending as Python's `splitlines` defines it.
fn line_end(text: &str) -> Option<(usize, usize)> {
    let (start, character) = text.char_indices().find(|(_, character)| {
        matches!(character, '\n'..='\r' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}')
    })?;
    let length = if text[start..].starts_with("\r\n") { 2 } else { character.len_utf8() };
    Some((start, start + length))
}

fn partition(text: &str, from_right: bool, arguments: &[Value]) -> Result<Value, Error> {
    let (separator,): (&str,) = from_args(arguments)?;
    if separator.is_empty() {
        return Err(invalid("empty separator"));
    }
    let parts = if from_right { text.rsplit_once(separator) } else { text.split_once(separator) };
    let parts = match parts {
        Some((before, after)) => [before, separator, after],
        None if from_right => ["", "", text],
        None => [text, "", ""],
    };
    Ok(Value::from(parts.map(Value::from).to_vec()))
}

fn find(text: &str, method: &str, arguments: &[Value]) -> Result<Value, Error> {
    let (wanted, start, end): (&str, Option<i64>, Option<i64>) = from_args(arguments)?;
    let length = text.chars().count() as i64;
    let place = |index: i64| if index < 0 { (index + length).max(0) } else { index.min(length) };
    let (start, end) = (place(start.unwrap_or(0)), place(end.unwrap_or(length)));
    let byte =
        |index: i64| text.char_indices().nth(index as usize).map_or(text.len(), |(byte, _)| byte);
    let part = text.get(byte(start)..byte(end));
    let found = part.and_then(|part| {
        let found = if method.starts_with('r') { part.rfind(wanted) } else { part.find(wanted) };
        found.map(|byte| start + part[..byte].chars().count() as i64)
    });
    match found {
        Some(index) => Ok(Value::from(index)),
        None if method.ends_with("find") => Ok(Value::from(-1)),
        None => Err(invalid("substring not found")),
    }
}

fn pad(text: &str, method: &str, arguments: &[Value]) -> Result<String, Error> {
    /// The most padding; a template that asks for more is wrong or malicious.
    const MAX_PADDING: usize = 1 << 16;
    let (width, fill): (usize, Option<&str>) = from_args(arguments)?;
    let fill = fill.unwrap_or(if method == "zfill" { "0" } else { " " });
    let missing = width.saturating_sub(text.chars().count());
    if missing > MAX_PADDING || fill.chars().count() != 1 {
        return Err(invalid(format!("{method} cannot pad to {width} with {fill:?}")));
    }
    let fill = |count: usize| fill.repeat(count);
    Ok(match method {
        "ljust" => text.to_owned() + &fill(missing),
        "rjust" => fill(missing) + text,
        "zfill" => {
            let digits = text.trim_start_matches(['+', '-']);
            let sign = &text[..text.len() - digits.len()];
            format!("{sign}{}{digits}", fill(missing))
        }
        // Python puts an odd fill character on the left if the width is odd.
        _ => {
            let left = missing / 2 + (missing & width & 1);
            fill(left) + text + &fill(missing - left)
        }
    })
}

fn change_case(text: &str, method: &str) -> String {
    let mut result = String::with_capacity(text.len());
    let mut in_word = false;
    for (index, character) in text.chars().enumerate() {
        let upper = match method {
            "title" => !in_word,
            "capitalize" => index == 0,
            "swapcase" => character.is_lowercase(),
            _ => false,
        };
        if upper {
            result.extend(character.to_uppercase());
        } else {
            result.extend(character.to_lowercase());
        }
        in_word = character.is_alphabetic();
    }
    result
}

#[cfg(test)]
mod tests {
    use minijinja::Environment;

    use super::*;

    fn check(expression: &str) -> String {
        let mut environment = Environment::new();
        environment.set_unknown_method_callback(call_method);
        environment
            .render_str(&format!("{{{{ {expression} }}}}"), ())
            .unwrap_or_else(|error| error.detail().unwrap_or_default().to_owned())
    }

    /// Each expected text is the output of Python 3.11.
    #[test]
    fn string_methods_match_python() {
        let cases = [
            ("'a-b-c'.rsplit('-', 1)", "['a-b', 'c']"),
            ("'a-b-c'.split('-', maxsplit=1)", "['a', 'b-c']"),
            ("' a  b c '.split()", "['a', 'b', 'c']"),
            ("' a  b c '.split(none, 1)", "['a', 'b c ']"),
            ("' a  b c '.rsplit(none, 1)", "[' a  b', 'c']"),
            ("''.split('x')", "['']"),
            ("''.split()", "[]"),
            ("'a:b:c'.partition(':')", "['a', ':', 'b:c']"),
            ("'a:b:c'.rpartition(':')", "['a:b', ':', 'c']"),
            ("'abc'.rpartition(':')", "['', '', 'abc']"),
            ("'hello'.removeprefix('he')", "llo"),
            ("'hello'.removesuffix('lo')", "hel"),
            ("'hello'.removesuffix('x')", "hello"),
            ("'a\\r\\nb\\x0bc\\u2028d'.splitlines()", "['a', 'b', 'c', 'd']"),
            ("'a\\nb'.splitlines(true)", "['a\\n', 'b']"),
            ("'xxaxx'.strip('x') ~ 'xxaxx'.lstrip('x') ~ 'xxaxx'.rstrip('x')", "aaxxxxa"),
            ("'\\x1ca\\x1f'.strip()", "a"),
            (
                "'héllo'.find('l') ~ 'héllo'.rfind('l') ~ 'hello'.find('z') ~ 'hello'.find('l', 3)",
                "23-13",
            ),
            (
                "'ab'.rjust(4, '.') ~ 'ab'.ljust(3) ~ '-7'.zfill(4) ~ 'ab'.center(5, '*')",
                "..abab -007**ab*",
            ),
            (
                "'they\\'re aB'.title() ~ 'éA'.swapcase() ~ 'ÉCOLE bY'.capitalize()",
                "They'Re AbÉaÉcole by",
            ),
            ("'12'.isdigit() ~ ''.isdigit()", "TrueFalse"),
            ("[1, 2].index(2)", "1"),
            ("'a'.index('b')", "substring not found"),
            ("'a'.split('')", "empty separator"),
        ];
        for (expression, expected) in cases {
            assert_eq!(check(expression), expected, "{expression}");
        }
    }
}
