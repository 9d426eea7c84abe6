//! The parts of the schema that no derive can write.

use schemars::{Schema, SchemaGenerator, json_schema};

/// The schema of a small map of short strings: labels, selectors, quantities.
pub(super) fn short_strings(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "maxProperties": 32,
        "additionalProperties": {"type": "string", "maxLength": 63},
    })
}

/// The schema of module names, a list or one text, which no type of a structural schema can say:
/// whoever reads it checks the rest ([`super::Names`]).
pub(super) fn module_names(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "x-kubernetes-preserve-unknown-fields": true,
        "minItems": 1,
        "maxItems": 32,
        "minLength": 1,
        "maxLength": 1024,
        "maxProperties": 0,
    })
}

/// The schema of a point in time.
pub(super) fn time(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "string", "format": "date-time", "maxLength": 64})
}

/// The schema of `status.conditions`: one entry per type, merged by type.
pub(super) fn conditions(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "maxItems": 16,
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["type"],
        "items": {
            "type": "object",
            "required": ["type", "status", "lastTransitionTime", "reason", "message"],
            "properties": {
                "type": {"type": "string", "minLength": 1, "maxLength": 316, "description": "The condition: `Succeeded` is the summary."},
                "status": {"type": "string", "enum": ["True", "False", "Unknown"], "description": "Whether it holds."},
                "observedGeneration": {"type": "integer", "format": "int64", "minimum": 0, "maximum": 9_007_199_254_740_991_i64, "description": "The generation it was judged on."},
                "lastTransitionTime": {"type": "string", "format": "date-time", "maxLength": 64, "description": "When the status last changed."},
                "reason": {"type": "string", "minLength": 1, "maxLength": 1024, "description": "The cause, in one CamelCase word."},
                "message": {"type": "string", "maxLength": 32768, "description": "The cause, for people."},
            },
        },
    })
}
