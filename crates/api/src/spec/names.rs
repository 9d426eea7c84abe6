//! Modules of a model, as one text or a list of names.

use serde::{Deserialize, Serialize};

/// Module names as PEFT takes them: a list, or one text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Names {
    /// Each a whole path or its end at a dot.
    List(Vec<String>),
    /// A regular expression for whole paths, or a word with a meaning of its own.
    Text(String),
    /// Neither, which the schema of a field without a type cannot refuse.
    Other(serde_json::Value),
}

impl Names {
    /// Explains why they cannot be used, if they cannot.
    pub fn fault(&self) -> Option<String> {
        match self {
            Self::List(list) if list.len() > 1 && list.iter().any(|name| is_all_linear(name)) => {
                Some("has all-linear beside other names: it stands for every linear layer, so name it alone, or list modules without it".to_owned())
            }
            Self::List(_) | Self::Text(_) => None,
            Self::Other(value) => {
                Some(format!("is {value}, must be a list of names, or one text"))
            }
        }
    }
}

/// Returns whether a name is the word for every linear layer; PEFT compares it without regard to case.
pub fn is_all_linear(word: &str) -> bool {
    word.eq_ignore_ascii_case("all-linear")
}
