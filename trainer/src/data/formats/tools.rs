//! Parses tools and tool calls.

use serde_json::{Map, Value, json};

use crate::data::{
    conversation::ToolCall,
    formats::{
        check_keys,
        error::RowError,
        fields::{is_empty, list, non_empty_text, non_null, optional_text, shortened},
        keys::KeyScope,
    },
};

/// Parses the tools of a row: a list or its JSON text. Bare functions are the older format of OpenAI.
pub(super) fn read_tools(row: &Map<String, Value>) -> Result<Vec<Value>, RowError> {
    let mut tools = Vec::new();
    let mut named = Vec::new();
    for key in ["tools", "functions"] {
        let Some(value) = non_null(row, key).filter(|value| !is_empty(value)) else { continue };
        named.push(key);
        for (index, tool) in list(value, key)?.into_iter().enumerate() {
            tools.push(read_tool(tool, key).map_err(|error| error.at(key, index))?);
        }
    }
    if named.len() > 1 {
        return Err(RowError::new("\"tools\" and \"functions\" both list tools: keep one"));
    }
    Ok(tools)
}

fn read_tool(tool: Value, key: &str) -> Result<Value, RowError> {
    // Datasets without nested columns have tools as JSON text.
    let tool = match tool {
        Value::String(text) => serde_json::from_str(&text).unwrap_or(Value::String(text)),
        tool => tool,
    };
    let tool = without_nulls(tool);
    let Value::Object(object) = &tool else {
        return Err(RowError::of_kind(
            format!("{key} entry"),
            format!("{} is not a tool: it must be an object", shortened(&tool)),
        ));
    };
    let whole = if object.contains_key("function") {
        object.clone()
    } else {
        let mut whole = Map::new();
        whole.insert("type".to_owned(), json!("function"));
        whole.insert("function".to_owned(), tool.clone());
        whole
    };
    let function = whole.get("function").and_then(Value::as_object);
    let is_named = function.is_some_and(|function| {
        function.get("name").and_then(Value::as_str).is_some_and(|name| !name.is_empty())
    });
    if !is_named {
        return Err(RowError::new("the tool's function has no \"name\""));
    }
    if whole.get("type").is_some_and(|kind| kind != "function") {
        return Err(RowError::of_kind(
            format!("{key} type"),
            format!("the tool has the type {}: only functions are supported", whole["type"]),
        ));
    }
    Ok(Value::Object(whole))
}

/// Parses the tool calls of a turn.
pub(super) fn read_calls(turn: &Map<String, Value>) -> Result<Vec<ToolCall>, RowError> {
    let mut calls = Vec::new();
    if let Some(value) = non_null(turn, "tool_calls").filter(|value| !is_empty(value)) {
        for (index, call) in list(value, "tool_calls")?.iter().enumerate() {
            calls.push(read_call(call).map_err(|error| error.at("tool_calls", index))?);
        }
    }
    if let Some(value) = non_null(turn, "function_call").filter(|value| !is_empty(value)) {
        if !calls.is_empty() {
            return Err(RowError::new(
                "\"tool_calls\" and \"function_call\" both list calls: keep one",
            ));
        }
        calls.push(read_call(value)?);
    }
    Ok(calls)
}

/// Parses the calls of a turn whose text is their JSON, as `function_call` in ShareGPT.
pub(super) fn read_call_text(text: &str) -> Result<Vec<ToolCall>, RowError> {
    let calls = match serde_json::from_str(text) {
        Ok(Value::Array(calls)) => calls,
        Ok(call @ Value::Object(_)) => vec![call],
        _ => {
            return Err(RowError::new(
                "the turn is a function call, but its text is not the JSON of a call: {\"name\": …, \"arguments\": {…}}",
            ));
        }
    };
    calls.iter().map(read_call).collect()
}

fn read_call(call: &Value) -> Result<ToolCall, RowError> {
    let parsed = call.as_str().and_then(|text| serde_json::from_str::<Value>(text).ok());
    let call = parsed.as_ref().unwrap_or(call);
    let Some(call) = call.as_object() else {
        return Err(RowError::of_kind(
            "tool call",
            format!("{} is not a tool call: it must be an object", shortened(call)),
        ));
    };
    let function = match non_null(call, "function") {
        Some(Value::Object(function)) => function,
        // Some datasets omit the object around the function.
        _ => call,
    };
    for object in [call, function] {
        let unknown = object.iter().filter(|(_, value)| !is_empty(value));
        let mut refused =
            unknown.filter_map(|(key, _)| check_keys::refusal_of_key(KeyScope::Call, key));
        if let Some(error) = refused.next() {
            return Err(error);
        }
    }
    if let Some(kind) = optional_text(call, "type")?.filter(|kind| kind != "function") {
        return Err(RowError::of_kind(
            "tool call type",
            format!("the call has the type {kind:?}: only functions are supported"),
        ));
    }
    Ok(ToolCall {
        id: optional_text(call, "id")?,
        name: non_empty_text(function, "name")?,
        arguments: read_arguments(function)?,
    })
}

/// Parses arguments to an object, as templates require; OpenAI has them as JSON text.
fn read_arguments(function: &Map<String, Value>) -> Result<Value, RowError> {
    let key = if non_null(function, "arguments").is_none()
        && non_null(function, "parameters").is_some()
    {
        "parameters"
    } else {
        "arguments"
    };
    let arguments = match function.get(key) {
        None | Some(Value::Null) => Value::Object(Map::new()),
        Some(Value::String(text)) if text.trim().is_empty() => Value::Object(Map::new()),
        Some(Value::String(text)) => serde_json::from_str(text).map_err(|error| {
            RowError::of_kind(
                "arguments are not JSON",
                format!(
                    "{key:?} is {}, which is not JSON ({error}): give the arguments as an object or its JSON text",
                    shortened(&json!(text))
                ),
            )
        })?,
        // Nested columns contain nulls for the arguments that a call does not have.
        Some(value) => without_nulls(value.clone()),
    };
    if !arguments.is_object() {
        let message = format!("{key:?} is {}, but it must be an object", shortened(&arguments));
        return Err(RowError::of_kind("arguments are not an object", message));
    }
    if has_rounded_number(&arguments) {
        return Err(RowError::new(format!(
            "{key:?} has an integer of more than 19 digits, which would be rounded: give it as a string"
        )));
    }
    Ok(arguments)
}

fn has_rounded_number(value: &Value) -> bool {
    match value {
        Value::Number(number) => {
            number.is_f64()
                && number
                    .as_f64()
                    .is_some_and(|number| number.fract() == 0.0 && number.abs() > 1e18)
        }
        Value::Array(list) => list.iter().any(has_rounded_number),
        Value::Object(object) => object.values().any(has_rounded_number),
        Value::Null | Value::Bool(_) | Value::String(_) => false,
    }
}

fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(object) => Value::Object(
            object
                .into_iter()
                .filter(|(_, value)| !value.is_null())
                .map(|(key, value)| (key, without_nulls(value)))
                .collect(),
        ),
        Value::Array(list) => Value::Array(list.into_iter().map(without_nulls).collect()),
        value => value,
    }
}
