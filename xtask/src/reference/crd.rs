//! docs/reference/finetunejob.md: the fields of a FineTuneJob, from the schema of its CRD.

use std::fmt::Write;

use anyhow::{Context, Result};
use serde_json::{Map, Value};

const HEAD: &str = "# FineTuneJob\n\n\
    Every field of `finetune.dev/v1alpha1`, generated from the CRD by `cargo xtask generate`. \
    [Examples](../../examples) are complete manifests; `kubectl explain finetunejob.spec` prints the same texts.\n";

/// Renders the page from the CRD as YAML.
pub(crate) fn page(crd: &str) -> Result<String> {
    let crd: Value = serde_saphyr::from_str(crd).context("the CRD is not YAML")?;
    let schema = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
    let mut page = HEAD.to_owned();
    for part in ["spec", "status"] {
        let object = schema["properties"][part].as_object().context("the CRD has no schema")?;
        let _ = write!(page, "\n## `{part}`\n\n{}\n\n", description(object));
        page += "| field | type | meaning |\n|---|---|---|\n";
        fields(object, "", &mut page);
        let mut rules = Vec::new();
        collect_rules(object, part, &mut rules);
        if !rules.is_empty() {
            page += "\nRules that the apiserver and `finetune` check:\n\n";
        }
        for (field, rule) in rules {
            let _ = writeln!(page, "- `{field}`: {}", one_line(&rule));
        }
    }
    Ok(page)
}

/// Writes a row for each field below an object, those of objects after their own.
fn fields(object: &Map<String, Value>, prefix: &str, page: &mut String) {
    let Some(properties) = object.get("properties").and_then(Value::as_object) else { return };
    let required = object.get("required").and_then(Value::as_array);
    for (name, schema) in properties {
        let Some(schema) = schema.as_object() else { continue };
        let is_required =
            required.is_some_and(|names| names.iter().any(|required| required == name));
        let path = format!("{prefix}{name}");
        let mark = if is_required { ", required" } else { "" };
        let _ = writeln!(
            page,
            "| `{path}` | {}{mark} | {} |",
            kind(schema),
            description(schema).replace('|', "\\|")
        );
        fields(schema, &format!("{path}."), page);
        if let Some(items) = schema.get("items").and_then(Value::as_object) {
            fields(items, &format!("{path}[]."), page);
        }
    }
}

/// Returns a field's type with its values or bounds.
fn kind(schema: &Map<String, Value>) -> String {
    if let Some(values) = schema.get("enum").and_then(Value::as_array) {
        let values: Vec<_> =
            values.iter().filter_map(Value::as_str).map(|value| format!("`{value}`")).collect();
        return values.join(", ");
    }
    let text = |key: &str| schema.get(key).and_then(Value::as_str);
    let bound = |key: &str| schema.get(key).and_then(Value::as_f64);
    match text("type") {
        Some("array") => {
            let items = schema.get("items").and_then(Value::as_object);
            format!("list of {}", items.map_or_else(|| "any".to_owned(), kind))
        }
        Some(name @ ("integer" | "number")) => match (bound("minimum"), bound("maximum")) {
            (Some(least), Some(most)) => format!("{name}, {least} to {most}"),
            (Some(least), None) => format!("{name}, at least {least}"),
            (None, Some(most)) => format!("{name}, at most {most}"),
            (None, None) => name.to_owned(),
        },
        Some("string") if text("format") == Some("date-time") => "time".to_owned(),
        Some(name) => name.to_owned(),
        None => "see the text".to_owned(),
    }
}

/// Collects the messages of CEL rules with the fields they are on.
fn collect_rules(schema: &Map<String, Value>, path: &str, rules: &mut Vec<(String, String)>) {
    let own = schema.get("x-kubernetes-validations").and_then(Value::as_array);
    for rule in own.into_iter().flatten() {
        if let Some(message) = rule["message"].as_str() {
            rules.push((path.to_owned(), message.to_owned()));
        }
    }
    for (name, property) in
        schema.get("properties").and_then(Value::as_object).into_iter().flatten()
    {
        if let Some(property) = property.as_object() {
            collect_rules(property, &format!("{path}.{name}"), rules);
        }
    }
    if let Some(items) = schema.get("items").and_then(Value::as_object) {
        collect_rules(items, &format!("{path}[]"), rules);
    }
}

fn description(schema: &Map<String, Value>) -> String {
    one_line(schema.get("description").and_then(Value::as_str).unwrap_or_default())
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::page;

    const CRD: &str = "
spec:
  versions:
  - schema:
      openAPIV3Schema:
        properties:
          spec:
            description: What to do.
            required: [rows]
            x-kubernetes-validations:
            - {message: 'rows or\n  files'}
            properties:
              rows:
                description: |-
                  The rows,
                  all of them.
                type: array
                items:
                  type: object
                  properties:
                    weight: {description: a|b, type: number, minimum: 0.5}
              mode: {enum: [fast, slow], type: string}
          status:
            description: What was done.
            properties:
              at: {type: string, format: date-time}
";

    #[test]
    fn every_field_and_rule_has_a_line() {
        let page = page(CRD).unwrap();
        let lines: Vec<&str> =
            page.lines().filter(|line| line.starts_with("| `") || line.starts_with("- ")).collect();
        assert_eq!(
            lines,
            [
                "| `rows` | list of object, required | The rows, all of them. |",
                "| `rows[].weight` | number, at least 0.5 | a\\|b |",
                "| `mode` | `fast`, `slow` |  |",
                "- `spec`: rows or files",
                "| `at` | time |  |",
            ]
        );
    }
}
