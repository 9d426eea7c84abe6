//! Reads one FineTuneJob from a file, and says everything that is wrong with it at once.
//!
//! The text is checked against the very schema the CRD carries, with the same CEL rules an
//! apiserver runs, so that `finetune plan` accepts what `kubectl apply` accepts. It must not
//! decide anything: defaults are the plan's.

mod violations;

use finetune_contract::ObjectUri;
use kube::core::cel::{ErrorKind, Validator};
use serde_json::Value;

use crate::{FineTuneJob, FineTuneJobSpec, OUTPUT, crd};

pub use violations::Violation;

/// Why a manifest could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The text is neither YAML nor JSON.
    #[error("the manifest is not valid YAML or JSON: {reason}")]
    Syntax {
        /// What the reader said, with line and column.
        reason: String,
    },
    /// The text holds nothing.
    #[error("the manifest is empty: write one FineTuneJob")]
    Empty,
    /// The text holds several documents.
    #[error(
        "the manifest holds {found} documents, but one run needs exactly one FineTuneJob: split the file"
    )]
    DocumentCount {
        /// How many there are.
        found: usize,
    },
    /// The document is not an acceptable FineTuneJob.
    #[error("the manifest is not an acceptable FineTuneJob ({} problems)", .0.len())]
    Violations(Vec<Violation>),
}

/// Reads and checks a manifest.
///
/// # Errors
/// [`Error`]; [`Error::Violations`] holds every fault, in the schema's order.
pub fn parse(text: &str) -> Result<FineTuneJob, Error> {
    let syntax = |error: serde_saphyr::Error| Error::Syntax { reason: error.to_string() };
    let mut documents: Vec<Value> = serde_saphyr::from_multiple(text).map_err(syntax)?;
    documents.retain(|document| !document.is_null());
    let found = documents.len();
    let document = match (found, documents.pop()) {
        (0, _) | (_, None) => return Err(Error::Empty),
        (1, Some(document)) => document,
        (_, Some(_)) => return Err(Error::DocumentCount { found }),
    };
    let mut violations = envelope(&document);
    let schema = crd::openapi();
    violations::walk("spec", &schema["properties"]["spec"], &document["spec"], &mut violations);
    unknown_uris(&document, &mut violations);
    rules(&schema, &document, &mut violations);
    overlaps(&document, &mut violations);
    if !violations.is_empty() {
        return Err(Error::Violations(violations));
    }
    let job: Result<FineTuneJob, _> = serde_json::from_value(document);
    let mut job = job.map_err(|error| Error::Syntax { reason: error.to_string() })?;
    // What was read from a cluster is no object of it: its runs are others.
    job.metadata.uid = None;
    Ok(job)
}

/// Checks what the apiserver itself checks: the kind, the name and the top-level fields.
fn envelope(document: &Value) -> Vec<Violation> {
    let mut violations = Vec::new();
    let Some(object) = document.as_object() else {
        return vec![Violation::new(
            "",
            "must be a FineTuneJob object with apiVersion, kind, metadata and spec",
        )];
    };
    for (field, expected) in [("apiVersion", "finetune.dev/v1alpha1"), ("kind", "FineTuneJob")] {
        match &document[field] {
            Value::String(found) if found == expected => {}
            Value::Null => {
                violations.push(Violation::new(field, format!("is missing: write {expected}")));
            }
            other => {
                violations.push(Violation::new(field, format!("is {other}, must be {expected}")));
            }
        }
    }
    let known = ["apiVersion", "kind", "metadata", "spec", "status"];
    violations::unknown_fields("", object, &known, &mut violations);
    match &document["metadata"]["name"] {
        Value::String(name) if is_name(name) => {}
        Value::Null => violations.push(Violation::new("metadata.name", "is missing: it names the run, such as support-tickets")),
        other => violations.push(Violation::new(
            "metadata.name",
            format!("is {other}, must have at most 52 characters, only a-z, 0-9 and '-', and start and end with a letter or digit"),
        )),
    }
    if document["spec"].is_null() {
        violations.push(Violation::new(
            "spec",
            "is missing: it needs model.uri, dataset.train and output.uri",
        ));
    }
    violations
}

fn is_name(name: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=crate::NAME_LIMIT).contains(&name.len())
        && name.bytes().all(inner)
        && !name.starts_with('-')
        && !name.ends_with('-')
}

/// Parses every URI, for messages a pattern cannot give.
fn unknown_uris(document: &Value, violations: &mut Vec<Violation>) {
    let spec = &document["spec"];
    let mut fields = vec![
        ("model.uri".to_owned(), &spec["model"]["uri"]),
        ("output.uri".to_owned(), &spec["output"]["uri"]),
    ];
    for field in ["train", "validation"] {
        fields.push((format!("dataset.{field}"), &spec["dataset"][field]));
    }
    for (index, source) in spec["dataset"]["sources"].as_array().into_iter().flatten().enumerate() {
        fields.push((format!("dataset.sources[{index}].uri"), &source["uri"]));
    }
    for (field, value) in fields {
        let Some(text) = value.as_str().filter(|text| !text.is_empty()) else { continue };
        let path = format!("spec.{field}");
        match ObjectUri::parse(text) {
            Err(finetune_contract::ParseUriError::NoScheme { uri }) => {
                let absolute = std::path::absolute(&uri).unwrap_or_else(|_| uri.clone().into());
                let slash = if uri.ends_with('/') { "/" } else { "" };
                let absolute = absolute.display().to_string();
                let absolute = absolute.trim_end_matches('/');
                violations.push(Violation::new(
                    path,
                    format!("{uri:?} has no scheme: for a file here write file://{absolute}{slash}, else one of hf://, s3://, gs://, az://, pvc://"),
                ));
            }
            Err(error) => violations.push(Violation::new(path, error.to_string())),
            Ok(uri) if field == "output.uri" && uri.scheme == finetune_contract::Scheme::Hf => violations.push(
                Violation::new(path, format!("{text:?} is a hub repository, which is read only here: use s3, gs, az, pvc or file")),
            ),
            Ok(_) => {}
        }
    }
}

/// Refuses an output that touches an input, in what could be read.
fn overlaps(document: &Value, violations: &mut Vec<Violation>) {
    let Ok(spec) = serde_json::from_value::<FineTuneJobSpec>(document["spec"].clone()) else {
        return; // What cannot be read is reported above.
    };
    violations.extend(spec.overlaps().into_iter().map(|message| Violation::new(OUTPUT, message)));
}

/// Runs the CRD's CEL rules; a place already found faulty is not reported twice.
fn rules(schema: &Value, document: &Value, violations: &mut Vec<Violation>) {
    let Some(spec) = document.get("spec").filter(|spec| spec.is_object()) else { return };
    let Err(errors) = Validator::new().validate(&schema["properties"]["spec"], spec, None) else {
        return;
    };
    for error in errors.into_vec() {
        if error.kind != ErrorKind::ValidationFailure {
            continue; // A rule that cannot be evaluated stands on a value reported above.
        }
        let path = match error.field_path.as_str() {
            "" => "spec".to_owned(),
            field => format!("spec.{field}"),
        };
        if !violations.iter().any(|violation| violation.path == path) {
            violations.push(Violation::new(path, error.message));
        }
    }
}
