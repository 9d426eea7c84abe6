//! JSON schemas of the words that users write, as a CRD can hold them.

use schemars::Schema;
use serde_json::Value;

/// Turns the schema of an enum without data into a plain list of its words.
///
/// Derived from documented variants it is a `oneOf` with a description for each, which no structural
/// schema may have; the field that uses the type describes its words.
pub(crate) fn words(schema: &mut Schema) {
    let Some(Value::Array(variants)) = schema.remove("oneOf") else { return };
    let one = |variant: &Value| variant.get("const").cloned().map(|word| vec![word]);
    let several = |variant: &Value| variant.get("enum").and_then(Value::as_array).cloned();
    let words: Vec<Value> = variants
        .iter()
        .filter_map(|variant| one(variant).or_else(|| several(variant)))
        .flatten()
        .collect();
    schema.remove("description");
    schema.insert("type".to_owned(), "string".into());
    schema.insert("enum".to_owned(), words.into());
}
