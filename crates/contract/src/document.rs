//! Reading and writing the versioned JSON documents of the contract.

use serde::{Serialize, de::DeserializeOwned};

/// The version of every document this build writes, and the only one it reads.
pub const CONTRACT_VERSION: u32 = 1;

/// The number of bytes Kubernetes keeps of a container's termination message.
///
/// # Source
/// `kubernetes/pkg/kubelet/container: MaxPodTerminationMessageLogLength`.
pub const TERMINATION_MESSAGE_LIMIT: usize = 4096;

/// A JSON document that crosses the waist.
pub trait Document: Serialize + DeserializeOwned {
    /// What the document is called in messages, such as `"run config"`.
    const NAME: &'static str;
}

/// Why a document of the contract could not be read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ParseDocumentError {
    /// The text is not JSON or lacks a field.
    #[error("{document} is not valid: {reason}")]
    Invalid {
        /// The document's name.
        document: &'static str,
        /// What the JSON reader said.
        reason: String,
    },
    /// The document was written for another version of the contract.
    #[error(
        "{document} has contract version {found}, but this build reads only version {CONTRACT_VERSION}: \
         run the operator and the trainer image of the same release"
    )]
    UnknownVersion {
        /// The document's name.
        document: &'static str,
        /// The version it carries.
        found: u64,
    },
}

/// Parses one document of the contract.
///
/// # Errors
/// [`ParseDocumentError`] if the text is no JSON object, has another `version`, or lacks a field.
pub fn parse<D: Document>(text: &str) -> Result<D, ParseDocumentError> {
    let invalid = |reason: serde_json::Error| ParseDocumentError::Invalid {
        document: D::NAME,
        reason: reason.to_string(),
    };
    let value: serde_json::Value = serde_json::from_str(text).map_err(invalid)?;
    match value.get("version").and_then(serde_json::Value::as_u64) {
        Some(version) if version == u64::from(CONTRACT_VERSION) => {}
        Some(found) => return Err(ParseDocumentError::UnknownVersion { document: D::NAME, found }),
        None => {
            return Err(ParseDocumentError::Invalid {
                document: D::NAME,
                reason: "the field `version` is missing".to_owned(),
            });
        }
    }
    serde_json::from_value(value).map_err(invalid)
}

/// Renders one document as compact JSON.
pub fn render<D: Document>(document: &D) -> String {
    serde_json::to_string(document).expect("contract documents have string keys and finite numbers")
}
