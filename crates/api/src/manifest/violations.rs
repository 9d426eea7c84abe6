//! Walks a value along a structural schema and collects every disagreement.

use std::fmt;

use serde_json::{Map, Value};

use crate::Names;

/// One fault of a manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// The field, such as `spec.loraConfig.r`.
    pub path: String,
    /// What was seen and what is allowed.
    pub message: String,
}

impl Violation {
    pub(super) fn new(path: impl Into<String>, message: impl Into<String>) -> Self {
        Self { path: path.into(), message: message.into() }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, message } = self;
        if path.is_empty() {
            formatter.write_str(message)
        } else {
            write!(formatter, "{path}: {message}")
        }
    }
}

/// Checks `value` and everything below it against `schema`.
pub(super) fn walk(path: &str, schema: &Value, value: &Value, violations: &mut Vec<Violation>) {
    if schema["x-kubernetes-preserve-unknown-fields"] == true {
        return walk_names(path, schema, value, violations);
    }
    let wanted = schema["type"].as_str().unwrap_or("object");
    let fits = match wanted {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "integer" => value.as_f64().is_some_and(|number| number.fract() == 0.0),
        _ => value.as_f64().is_some_and(f64::is_finite),
    };
    if !fits {
        if !(path == "spec" && value.is_null()) {
            violations.push(Violation::new(
                path,
                format!(
                    "is {}, must be {}{}",
                    seen(value),
                    article(wanted),
                    unquoted(value, wanted)
                ),
            ));
        }
        return;
    }
    match value {
        Value::Object(object) => walk_object(path, schema, object, violations),
        Value::Array(items) => {
            length(path, schema, items.len(), ("minItems", "maxItems", "entries"), violations);
            for (index, item) in items.iter().enumerate() {
                walk(&format!("{path}[{index}]"), &schema["items"], item, violations);
            }
        }
        Value::String(text) => match schema["enum"].as_array() {
            Some(words) if !words.contains(value) => {
                let words: Vec<&str> = words.iter().filter_map(Value::as_str).collect();
                let hint = nearest(text, &words);
                violations.push(Violation::new(
                    path,
                    format!("is {value}{hint}; allowed: {}", words.join(", ")),
                ));
            }
            Some(_) => {}
            None => length(
                path,
                schema,
                text.chars().count(),
                ("minLength", "maxLength", "characters"),
                violations,
            ),
        },
        Value::Number(number) => {
            let (low, high) = (schema["minimum"].as_f64(), schema["maximum"].as_f64());
            let seen = number.as_f64().unwrap_or(f64::NAN);
            if low.is_some_and(|low| seen < low) || high.is_some_and(|high| seen > high) {
                let bound = |bound: Option<f64>| bound.map(number_text).unwrap_or_default();
                let allowed = if high.is_some_and(|high| high > 1e15) {
                    format!("at least {}", bound(low))
                } else {
                    format!("from {} to {}", bound(low), bound(high))
                };
                violations.push(Violation::new(path, format!("is {number}, must be {allowed}")));
            }
        }
        Value::Null | Value::Bool(_) => {}
    }
}

/// Checks module names, which are a list or one text.
fn walk_names(path: &str, schema: &Value, value: &Value, violations: &mut Vec<Violation>) {
    let characters = ("minLength", "maxLength", "characters");
    let before = violations.len();
    match value {
        Value::String(text) => length(path, schema, text.chars().count(), characters, violations),
        Value::Array(items) => {
            length(path, schema, items.len(), ("minItems", "maxItems", "entries"), violations);
            for (index, item) in items.iter().enumerate() {
                let path = format!("{path}[{index}]");
                match item.as_str() {
                    Some(text) => {
                        length(&path, schema, text.chars().count(), characters, violations);
                    }
                    None => violations
                        .push(Violation::new(path, format!("is {}, must be a text", seen(item)))),
                }
            }
        }
        _ => {}
    }
    if value.is_array() && violations.len() > before {
        return;
    }
    let fault = serde_json::from_value(value.clone()).ok().and_then(|names: Names| names.fault());
    violations.extend(fault.map(|fault| Violation::new(path, fault)));
}

fn walk_object(
    path: &str,
    schema: &Value,
    object: &Map<String, Value>,
    violations: &mut Vec<Violation>,
) {
    if let Some(values) = schema.get("additionalProperties") {
        length(
            path,
            schema,
            object.len(),
            ("minProperties", "maxProperties", "entries"),
            violations,
        );
        for (key, value) in object {
            walk(&format!("{path}.{key}"), values, value, violations);
        }
        return;
    }
    let empty = Map::new();
    let properties = schema["properties"].as_object().unwrap_or(&empty);
    for required in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        if !object.contains_key(required) {
            violations.push(Violation::new(
                format!("{path}.{required}"),
                "is missing and has no default",
            ));
        }
    }
    let known: Vec<&str> = properties.keys().map(String::as_str).collect();
    unknown_fields(path, object, &known, violations);
    for (name, property) in properties {
        if let Some(value) = object.get(name) {
            walk(&format!("{path}.{name}"), property, value, violations);
        }
    }
}

/// Reports the fields that are not `known`, each with the likeliest intention.
pub(super) fn unknown_fields(
    path: &str,
    object: &Map<String, Value>,
    known: &[&str],
    violations: &mut Vec<Violation>,
) {
    for name in object.keys().filter(|name| !known.contains(&name.as_str())) {
        let place = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        let hint = match elsewhere(name).filter(|(word, _)| known.contains(word)) {
            Some((word, note)) => format!("; it is {word} here{note}"),
            None => nearest(name, known),
        };
        let hint =
            if hint.is_empty() { format!("; known here: {}", known.join(", ")) } else { hint };
        violations.push(Violation::new(place, format!("is not a field{hint}")));
    }
}

/// What trainers call a field that has another name here, and what differs.
///
/// # Source
/// `TrainingArguments` of transformers, PEFT's `LoraConfig`, Axolotl and LLaMA-Factory.
const ELSEWHERE: [(&str, &str, &str); 30] = [
    ("warmupratio", "numWarmupSteps", ", a number of steps and not a share of them"),
    ("warmupsteps", "numWarmupSteps", ""),
    ("numtrainepochs", "numEpochs", ""),
    ("epochs", "numEpochs", ""),
    ("lr", "learningRate", ""),
    ("batchsize", "trainBatchSizePerDevice", ""),
    ("perdevicetrainbatchsize", "trainBatchSizePerDevice", ""),
    ("microbatchsize", "trainBatchSizePerDevice", ""),
    ("gradientaccumulation", "gradientAccumulationSteps", ""),
    ("maxseqlength", "contextLength", ""),
    ("maxlength", "contextLength", ""),
    ("sequencelen", "contextLength", ""),
    ("cutofflen", "contextLength", ""),
    ("samplepacking", "packing", ""),
    ("lrscheduler", "lrSchedulerType", ""),
    ("optim", "optimizer", ""),
    ("bf16", "dtype", ": write dtype: bf16"),
    ("fp16", "dtype", ": bf16 or fp32"),
    ("gradientcheckpointing", "recompute", ": write recompute: block"),
    ("evalsteps", "evaluationSteps", ""),
    ("savesteps", "checkpointSteps", ""),
    ("savetotallimit", "numCheckpointsToKeep", ""),
    ("rank", "r", ""),
    ("lorar", "r", ""),
    ("alpha", "loraAlpha", ""),
    ("dropout", "loraDropout", ""),
    ("valsetsize", "validationFraction", ""),
    ("valsize", "validationFraction", ""),
    ("datasets", "sources", ""),
    ("path", "uri", ""),
];

/// Returns our word for a field of other trainers, in whichever spelling.
fn elsewhere(name: &str) -> Option<(&'static str, &'static str)> {
    let plain: String = name
        .chars()
        .filter(char::is_ascii_alphanumeric)
        .map(|character| character.to_ascii_lowercase())
        .collect();
    let found = ELSEWHERE.iter().find(|(word, _, _)| *word == plain)?;
    Some((found.1, found.2))
}

fn nearest(text: &str, known: &[&str]) -> String {
    let score = |word: &&str| strsim::jaro_winkler(&text.to_lowercase(), &word.to_lowercase());
    known
        .iter()
        .copied()
        .max_by(|left, right| score(left).total_cmp(&score(right)))
        .filter(|word| score(word) > 0.8)
        .map(|word| format!("; did you mean {word}?"))
        .unwrap_or_default()
}

fn length(
    path: &str,
    schema: &Value,
    found: usize,
    (low, high, unit): (&str, &str, &str),
    violations: &mut Vec<Violation>,
) {
    let low = schema[low].as_u64().unwrap_or(0);
    let high = schema[high].as_u64().unwrap_or(u64::MAX);
    if !(low..=high).contains(&(found as u64)) {
        let message = if found == 0 {
            "is empty".to_owned()
        } else {
            format!("has {found} {unit}, must have from {low} to {high}")
        };
        violations.push(Violation::new(path, message));
    }
}

/// Returns a bound as a person writes it.
fn number_text(number: f64) -> String {
    if number != 0.0 && number.abs() < 1e-3 { format!("{number:e}") } else { number.to_string() }
}

fn article(wanted: &str) -> &str {
    match wanted {
        "object" => "an object",
        "array" => "a list",
        "string" => "a text",
        "boolean" => "true or false",
        "integer" => "a whole number",
        _ => "a number",
    }
}

/// Describes how to write a number that is given as a text.
fn unquoted(value: &Value, wanted: &str) -> String {
    match value.as_str() {
        Some(text) if ["number", "integer"].contains(&wanted) && text.parse::<f64>().is_ok() => {
            format!(": write {text} without quotation marks")
        }
        _ => String::new(),
    }
}

fn seen(value: &Value) -> String {
    match value {
        Value::Null => "empty".to_owned(),
        Value::Object(_) => "an object".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::String(_) | Value::Number(_) | Value::Bool(_) => format!("{value}"),
    }
}
