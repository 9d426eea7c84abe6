//! Where a chat template comes from: the model's own files, a built-in one, a text or a URI.

use std::{collections::BTreeMap, path::Path};

use finetune_contract::{FailureReason, ObjectUri, is_template_text, template_uri};
use serde_json::Value;

use crate::{
    data::chat::template::Sources,
    failure::Failure,
    store::{self, Environment, Role, Store},
};

/// The folder of named templates beside `chat_template.jinja`, the one named `default`.
pub const FOLDER: &str = store::TEMPLATE_FOLDER;

/// ChatML: for models whose tokenizer has its two tokens.
const CHATML: &str = "{%- for message in messages -%}\
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}\
    {%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}";

/// The prompt of Stanford Alpaca, for instructions on models that were never taught a format.
///
/// # Source
/// `PROMPT_DICT` of `train.py` in tatsu-lab/stanford_alpaca; a system turn takes the place of its
/// first sentences, and what follows an answer is another instruction.
pub(crate) const ALPACA: &str = "{%- set default = 'Below is an instruction that describes a task. \
    Write a response that appropriately completes the request.' -%}\
    {%- if messages[0].role != 'system' -%}{{- default + '\\n\\n' -}}{%- endif -%}\
    {%- for message in messages -%}{%- if message.role == 'system' -%}{{- message.content + '\\n\\n' -}}\
    {%- elif message.role == 'user' -%}{{- '### Instruction:\\n' + message.content + '\\n\\n### Response:\\n' -}}\
    {%- elif message.role == 'assistant' -%}{{- message.content + (eos_token or '') -}}\
    {%- if not loop.last -%}{{- '\\n\\n' -}}{%- endif -%}\
    {%- else -%}{{- raise_exception('the alpaca template has no ' + message.role + ' turns') -}}{%- endif -%}{%- endfor -%}";

/// Vicuna 1.1: plain text, for models without special tokens.
const VICUNA: &str = "{%- for message in messages -%}\
    {%- if message.role == 'system' -%}{{- message.content + ' ' -}}\
    {%- elif message.role == 'user' -%}{{- 'USER: ' + message.content + ' ASSISTANT:' -}}\
    {%- elif message.role == 'assistant' -%}{{- ' ' + message.content + (eos_token or '') -}}\
    {%- else -%}{{- raise_exception('the vicuna template has no ' + message.role + ' turns') -}}{%- endif -%}{%- endfor -%}";

const BUILT_IN: [(&str, &str); 3] = [("chatml", CHATML), ("alpaca", ALPACA), ("vicuna", VICUNA)];

/// Lists the built-in templates.
pub(crate) fn names() -> String {
    BUILT_IN.map(|(name, _)| name).join(", ")
}

/// Finds the text of a template that a user named.
///
/// # Errors
/// A [`Failure`] if it is none of a built-in name, a text and a URI that can be read.
pub fn resolve(setting: &str, environment: &Environment) -> Result<String, Failure> {
    if is_template_text(setting) {
        return Ok(setting.to_owned());
    }
    if let Some((_, source)) = BUILT_IN.iter().find(|(name, _)| *name == setting) {
        return Ok((*source).to_owned());
    }
    let invalid = |message: String| Failure::new(FailureReason::InvalidConfiguration, message);
    let Some(uri) = template_uri(setting) else {
        return Err(invalid(format!(
            "dataset.chatTemplate is {setting:?}, which is no built-in template ({}), no text of a template and no URI",
            names()
        )));
    };
    let uri = ObjectUri::parse(uri).map_err(|error| invalid(error.to_string()))?;
    let store = Store::open(&uri, None, Role::Dataset, environment)?;
    let Some(entry) = store.list()?.into_iter().next() else {
        return Err(invalid(format!("dataset.chatTemplate: nothing is at {setting}")));
    };
    let text = store.read(&entry.path)?;
    String::from_utf8(text.to_vec())
        .map_err(|_| invalid(format!("dataset.chatTemplate: {setting} is not a text in UTF-8")))
}

/// Finds a model's templates: in files of their own, in the tokenizer's settings, or in
/// `chat_template.json`, where older processors saved it.
///
/// # Errors
/// A text if there are several, and none is the default.
pub(crate) fn of_model(
    directory: &Path,
    settings: &Value,
    processor: &Value,
) -> Result<Option<Sources>, String> {
    let mut named = in_files(directory);
    if named.is_empty() {
        let values = [settings, processor];
        let value = values
            .into_iter()
            .find_map(|file| file.get("chat_template").filter(|template| !template.is_null()));
        named = value.map(in_value).unwrap_or_default();
    }
    if named.is_empty() {
        return Ok(None);
    }
    let tool_use = named.remove("tool_use");
    if let Some(default) = named.remove("default") {
        return Ok(Some(Sources { default, tool_use }));
    }
    let only = if named.len() == 1 && tool_use.is_none() { named.pop_first() } else { None };
    match only {
        Some((_, default)) => Ok(Some(Sources { default, tool_use: None })),
        None => Err(format!(
            "the model has several chat templates and none is the default ({}): name one as dataset.chatTemplate by its text or URI",
            named
                .keys()
                .cloned()
                .chain(tool_use.map(|_| "tool_use".to_owned()))
                .collect::<Vec<_>>()
                .join(", ")
        )),
    }
}

fn in_files(directory: &Path) -> BTreeMap<String, String> {
    let mut named = BTreeMap::new();
    if let Ok(source) = std::fs::read_to_string(directory.join("chat_template.jinja")) {
        named.insert("default".to_owned(), source);
    }
    for entry in std::fs::read_dir(directory.join(FOLDER)).into_iter().flatten().flatten() {
        let path = entry.path();
        let name = path.file_stem().and_then(|name| name.to_str());
        if path.extension().is_some_and(|extension| extension == "jinja")
            && let (Some(name), Ok(source)) = (name, std::fs::read_to_string(&path))
        {
            named.insert(name.to_owned(), source);
        }
    }
    named
}

fn in_value(value: &Value) -> BTreeMap<String, String> {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    match value {
        Value::String(source) => BTreeMap::from([("default".to_owned(), source.clone())]),
        Value::Array(list) => list
            .iter()
            .filter_map(|entry| Some((text(entry.get("name")?)?, text(entry.get("template")?)?)))
            .collect(),
        Value::Object(named) => named
            .iter()
            .filter_map(|(name, template)| Some((name.clone(), text(template)?)))
            .collect(),
        _ => BTreeMap::new(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn finds_the_chat_template_wherever_it_was_saved() {
        let directory = tempfile::tempdir().unwrap();
        let check = |settings: Value, processor: Value| match of_model(
            directory.path(),
            &settings,
            &processor,
        ) {
            Ok(None) => "none".to_owned(),
            Ok(Some(Sources { default, tool_use: None })) => default,
            Ok(Some(Sources { default, tool_use: Some(tool_use) })) => {
                format!("{default}, with tools {tool_use}")
            }
            Err(reason) => reason,
        };
        let named = |name: &str| json!({"name": name, "template": name});
        let in_settings = |template: Value| check(json!({"chat_template": template}), Value::Null);
        assert_eq!(in_settings(json!("a")), "a");
        assert_eq!(in_settings(json!([named("rag"), named("default")])), "default");
        assert_eq!(
            in_settings(json!([named("tool_use"), named("default")])),
            "default, with tools tool_use"
        );
        assert_eq!(in_settings(json!({"default": "a", "rag": "b"})), "a");
        assert_eq!(in_settings(json!([named("rag")])), "rag");
        assert!(
            in_settings(json!([named("rag"), named("tool_use")]))
                .contains("none is the default (rag, tool_use)")
        );
        assert_eq!(in_settings(Value::Null), "none");
        assert_eq!(check(json!({}), json!({"chat_template": "old"})), "old");
        assert_eq!(check(json!({"chat_template": "a"}), json!({"chat_template": "old"})), "a");
        std::fs::write(directory.path().join("chat_template.jinja"), "file").unwrap();
        assert_eq!(in_settings(json!("a")), "file");
        std::fs::create_dir(directory.path().join(FOLDER)).unwrap();
        std::fs::write(directory.path().join(FOLDER).join("tool_use.jinja"), "tools").unwrap();
        assert_eq!(in_settings(json!("a")), "file, with tools tools");
    }
}
