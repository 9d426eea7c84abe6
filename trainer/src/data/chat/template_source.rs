//! Finds a chat template: in the files of the model, among the built-in ones, as a text or at a URI.

use std::{collections::BTreeMap, path::Path};

use finetune_contract::{FailureReason, ObjectUri, is_template_text, template_uri};
use serde_json::Value;

use crate::{
    data::chat::template::Sources,
    failure::Failure,
    store::{self, Environment, Role, Store},
};

/// The folder of named templates beside `chat_template.jinja`, which is the default.
pub const FOLDER: &str = store::TEMPLATE_FOLDER;

/// ChatML: for models whose tokenizer has its two tokens.
const CHATML: &str = "{%- for message in messages -%}\
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}\
    {%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}";

/// The prompt of Stanford Alpaca, for base models without a chat format.
///
/// # Source
/// `PROMPT_DICT` of `train.py` in tatsu-lab/stanford_alpaca; a system turn replaces its first
/// sentences, and another instruction may follow an answer.
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

/// Returns the names of the built-in templates, separated by commas.
pub(crate) fn names() -> String {
    BUILT_IN.map(|(name, _)| name).join(", ")
}

/// Returns the source of the template that a user chose: a text, a built-in name or a URI.
///
/// # Errors
/// A [`Failure`] if it is none of these, or the URI cannot be read.
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
            "dataset.chatTemplate is {setting:?}, which is neither a built-in template ({}), nor the text of a template, nor a URI",
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
        .map_err(|_| invalid(format!("dataset.chatTemplate: {setting} is not UTF-8 text")))
}

/// Finds the templates of a model: in `.jinja` files, in `tokenizer_config.json`, or in
/// `chat_template.json`, where older versions of transformers saved them.
///
/// # Errors
/// A message if there are several and none is the default.
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
            "the model has several chat templates and none is the default ({}): set dataset.chatTemplate to the text or URI of one",
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
    fn finds_the_chat_template_in_every_file_that_may_have_it() {
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
