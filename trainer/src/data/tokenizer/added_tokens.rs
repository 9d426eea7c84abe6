//! Adds the tokens that files other than `tokenizer.json` declare, as transformers does.
//!
//! # Source
//! `_from_pretrained` in `transformers/tokenization_utils_base.py` and `TokenizersBackend.__init__`
//! in `tokenization_utils_tokenizers.py`, 5.23. As there, a new token gets the next free id and not the
//! id that is declared for it.

use std::collections::BTreeMap;

use serde_json::{Map, Value};
use tokenizers::AddedToken;

/// The standard names of special tokens; any other key that ends in `_token` is a name, too.
const NAMES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// The files that declare tokens; `null` for a missing one.
#[derive(Debug, Default)]
pub(crate) struct Declarations {
    /// `tokenizer_config.json`.
    pub settings: Value,
    /// `special_tokens_map.json`.
    pub special_tokens_map: Value,
    /// `added_tokens.json`.
    pub added_tokens: Value,
}

/// A named or extra token.
#[derive(Debug, Clone, PartialEq)]
struct Declared {
    token: AddedToken,
    /// Whether only the text was given, so that the flags are the defaults of special tokens.
    is_text: bool,
}

/// Adds the declared tokens and returns the named ones, such as (`bos_token`, `<s>`).
///
/// # Errors
/// A message that names the invalid entry.
pub(crate) fn add(
    inner: &mut tokenizers::Tokenizer,
    declarations: &Declarations,
) -> Result<Vec<(String, String)>, String> {
    let decoder = declarations.settings.get("added_tokens_decoder").and_then(Value::as_object);
    let mut values = declarations.settings.as_object().cloned().unwrap_or_default();
    if decoder.is_none()
        && let Some(map) = declarations.special_tokens_map.as_object()
    {
        // Older models: this file overrides `tokenizer_config.json`.
        values.extend(map.iter().map(|(name, value)| (name.clone(), value.clone())));
    }
    let named = named(&values)?;
    let extra = extra(&values)?;
    let mut listed = match decoder {
        Some(decoder) => listed(decoder)?,
        None => legacy(&declarations.added_tokens, &named, &extra)?,
    };

    let known: Vec<AddedToken> = inner.get_added_tokens_decoder().into_values().collect();
    listed.retain(|token| !known.contains(token));
    let mut new: Vec<AddedToken> = listed;
    for Declared { token, .. } in named.iter().map(|(_, declared)| declared).chain(&extra) {
        let is_known = |other: &AddedToken| other.content == token.content;
        if !known.iter().any(is_known) && !new.iter().any(is_known) {
            new.push(token.clone());
        }
    }
    for token in &mut new {
        token.special |= named.iter().any(|(_, declared)| declared.token.content == token.content);
    }
    let fails = |error: tokenizers::Error| error.to_string();
    inner.add_tokens(new).map_err(fails)?;
    // Named tokens are special even if tokenizer.json says otherwise.
    let decoder = inner.get_added_tokens_decoder();
    let special = named.iter().map(|(_, declared)| declared).chain(&extra).map(|declared| {
        let known = decoder.values().find(|token| token.content == declared.token.content);
        match known {
            Some(known) if !declared.is_text || known.special => known.clone(),
            _ => declared.token.clone(),
        }
    });
    let special: Vec<AddedToken> =
        special.map(|token| AddedToken { special: true, ..token }).collect();
    inner.add_special_tokens(special).map_err(fails)?;
    Ok(named.into_iter().map(|(name, declared)| (name, declared.token.content)).collect())
}

fn named(values: &Map<String, Value>) -> Result<Vec<(String, Declared)>, String> {
    let mut names: Vec<&str> = NAMES.into_iter().collect();
    names.extend(
        values
            .iter()
            .filter(|(name, value)| {
                name.ends_with("_token") && !NAMES.contains(&name.as_str()) && is_token(value)
            })
            .map(|(name, _)| name.as_str()),
    );
    let mut found = Vec::new();
    for name in names {
        if let Some(value) = values.get(name).filter(|value| !value.is_null()) {
            found.push((name.to_owned(), declared(value, name)?));
        }
    }
    for key in ["model_specific_special_tokens", "extra_special_tokens"] {
        if let Some(more) = values.get(key).and_then(Value::as_object) {
            for (name, value) in more {
                found.push((name.clone(), declared(value, name)?));
            }
        }
    }
    Ok(found)
}

fn is_token(value: &Value) -> bool {
    value.is_string() || value.get("__type").is_some()
}

/// Reads the extra special tokens; `additional_special_tokens` is the older key.
fn extra(values: &Map<String, Value>) -> Result<Vec<Declared>, String> {
    let list =
        |key: &str| values.get(key).and_then(Value::as_array).filter(|list| !list.is_empty());
    let found = list("extra_special_tokens").or_else(|| list("additional_special_tokens"));
    found.into_iter().flatten().map(|value| declared(value, "extra_special_tokens")).collect()
}

fn listed(decoder: &Map<String, Value>) -> Result<Vec<AddedToken>, String> {
    let mut by_id = BTreeMap::new();
    for (id, value) in decoder {
        let number: u32 = id.parse().map_err(|_| {
            format!("added_tokens_decoder of tokenizer_config.json: {id:?} is not an id")
        })?;
        by_id.insert(number, declared(value, "added_tokens_decoder")?.token);
    }
    Ok(by_id.into_values().collect())
}

/// Reads `added_tokens.json`, which maps the text of each token to its id.
fn legacy(
    file: &Value,
    named: &[(String, Declared)],
    extra: &[Declared],
) -> Result<Vec<AddedToken>, String> {
    let mut by_id = BTreeMap::new();
    for (content, id) in file.as_object().into_iter().flatten() {
        let id = id.as_u64().ok_or_else(|| {
            format!("added_tokens.json: the id of {content:?} is {id}, which is not a number")
        })?;
        let mut special = named.iter().map(|(_, declared)| declared).chain(extra);
        let is_special = special.any(|declared| declared.token.content == *content);
        by_id.insert(id, AddedToken::from(content.as_str(), is_special));
    }
    Ok(by_id.into_values().collect())
}

/// Reads a token: its text, or an object with its flags.
fn declared(value: &Value, key: &str) -> Result<Declared, String> {
    if let Some(content) = value.as_str() {
        return Ok(Declared { token: AddedToken::from(content, true), is_text: true });
    }
    let Some(content) = value.get("content").and_then(Value::as_str) else {
        return Err(format!(
            "{key}: {value} is not a token, which is a text or an object with a \"content\""
        ));
    };
    let flag =
        |name: &str, default: bool| value.get(name).and_then(Value::as_bool).unwrap_or(default);
    let special = flag("special", false);
    let token = AddedToken {
        content: content.to_owned(),
        single_word: flag("single_word", false),
        lstrip: flag("lstrip", false),
        rstrip: flag("rstrip", false),
        normalized: flag("normalized", !special),
        special,
    };
    Ok(Declared { token, is_text: false })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::data::chat::goldens::tokenizer_json;

    fn tokens(text: &str, declarations: &Declarations) -> String {
        let mut inner: tokenizers::Tokenizer =
            tokenizer_json("<s>", "</s>").to_string().parse().unwrap();
        match add(&mut inner, declarations) {
            Err(reason) => reason,
            Ok(named) => {
                let tokens = inner.encode(text, false).unwrap().get_tokens().join("|");
                let named: Vec<_> =
                    named.iter().map(|(name, token)| format!(" {name}={token}")).collect();
                tokens + &named.concat()
            }
        }
    }

    #[test]
    fn tokens_are_found_wherever_they_are_declared() {
        let turn = json!({"content": "<|turn|>", "special": true});
        let settings = |settings: Value| Declarations { settings, ..Declarations::default() };
        let text = "a<|turn|>b";
        assert_eq!(tokens(text, &Declarations::default()), "a|<|||t|u|r|n|||>|b");
        let cases = [
            settings(json!({"added_tokens_decoder": {"999": turn}})),
            settings(json!({"additional_special_tokens": ["<|turn|>"]})),
            settings(
                json!({"extra_special_tokens": [{"__type": "AddedToken", "content": "<|turn|>"}]}),
            ),
            Declarations { added_tokens: json!({"<|turn|>": 999}), ..Declarations::default() },
            Declarations {
                special_tokens_map: json!({"additional_special_tokens": ["<|turn|>"]}),
                ..Declarations::default()
            },
        ];
        for case in cases {
            assert_eq!(tokens(text, &case), "a|<|turn|>|b", "{case:?}");
        }
        assert_eq!(
            tokens(text, &settings(json!({"eos_token": "<|turn|>"}))),
            "a|<|turn|>|b eos_token=<|turn|>"
        );
        assert_eq!(
            tokens(text, &settings(json!({"image_token": "<|turn|>"}))),
            "a|<|turn|>|b image_token=<|turn|>"
        );
        assert_eq!(
            tokens(text, &settings(json!({"extra_special_tokens": {"turn": "<|turn|>"}}))),
            "a|<|turn|>|b turn=<|turn|>"
        );
    }

    #[test]
    fn the_map_is_read_only_where_the_settings_list_no_tokens() {
        let map = json!({"eos_token": {"content": "<|end|>", "lstrip": false}});
        let case = |settings: Value| Declarations {
            settings,
            special_tokens_map: map.clone(),
            ..Declarations::default()
        };
        assert_eq!(
            tokens("<|end|>", &case(json!({"eos_token": "</s>"}))),
            "<|end|> eos_token=<|end|>"
        );
        assert_eq!(
            tokens("<|end|>", &case(json!({"eos_token": "</s>", "added_tokens_decoder": {}}))),
            "<|||e|n|d|||> eos_token=</s>"
        );
    }

    #[test]
    fn an_invalid_token_is_refused_by_name() {
        let settings = json!({"eos_token": 7});
        assert_eq!(
            tokens("", &Declarations { settings, ..Declarations::default() }),
            "eos_token: 7 is not a token, which is a text or an object with a \"content\""
        );
    }
}
