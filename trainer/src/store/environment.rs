//! The process environment, read once, and the role prefixes that pick one secret's variables.

use std::collections::BTreeMap;

/// Which secret's variables apply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The base model: `FINETUNE_MODEL_…`.
    Model,
    /// The rows: `FINETUNE_DATASET_…`.
    Dataset,
    /// The result and its checkpoints: `FINETUNE_OUTPUT_…`.
    Output,
}

impl Role {
    /// Returns what the operator writes before each key of the role's Secret.
    pub const fn prefix(self) -> &'static str {
        match self {
            Self::Model => "FINETUNE_MODEL_",
            Self::Dataset => "FINETUNE_DATASET_",
            Self::Output => "FINETUNE_OUTPUT_",
        }
    }
}

/// The environment variables of the process, or those of a test.
///
/// Differs from object_store's `from_env`, which reads the process itself and knows no roles.
#[derive(Clone, Default)]
pub struct Environment(BTreeMap<String, String>);

impl Environment {
    /// Reads the process environment; variables that are not Unicode are left out.
    pub fn from_process() -> Self {
        Self(
            std::env::vars_os()
                .filter_map(|(key, value)| {
                    Some((key.into_string().ok()?, value.into_string().ok()?))
                })
                .collect(),
        )
    }

    /// Makes an environment of pairs.
    pub fn from_pairs<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        Self(pairs.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect())
    }

    /// Finds a variable by its plain name; an empty value counts as absent.
    pub fn plain(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// Finds `key` for a role, with the name of the variable it came from.
    pub fn named(&self, role: Role, key: &str) -> Option<(String, &str)> {
        let prefixed = format!("{}{key}", role.prefix());
        match self.plain(&prefixed) {
            Some(value) => Some((prefixed, value)),
            None => self.plain(key).map(|value| (key.to_owned(), value)),
        }
    }

    /// Finds `key` for a role.
    pub fn get(&self, role: Role, key: &str) -> Option<&str> {
        self.named(role, key).map(|(_, value)| value)
    }

    /// Lists the variables of a role that start with `start`, with that role's prefix removed.
    ///
    /// # Guarantees
    /// When the role has a Secret with any such variable, plain *credentials* do not mix with it:
    /// an access key of one account and a session token of another never work together.
    pub fn starting_with(
        &self,
        role: Role,
        start: &str,
        is_credential: impl Fn(&str) -> bool,
    ) -> BTreeMap<String, String> {
        let of_role: BTreeMap<String, String> = self
            .0
            .iter()
            .filter_map(|(key, value)| Some((key.strip_prefix(role.prefix())?, value)))
            .filter(|(key, value)| key.starts_with(start) && !value.is_empty())
            .map(|(key, value)| (key.to_owned(), value.clone()))
            .collect();
        let role_has_credentials = of_role.keys().any(|key| is_credential(key));
        let mut found: BTreeMap<String, String> = self
            .0
            .iter()
            .filter(|(key, value)| key.starts_with(start) && !value.is_empty())
            .filter(|(key, _)| !(role_has_credentials && is_credential(key)))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        found.extend(of_role);
        found
    }
}

impl std::fmt::Debug for Environment {
    /// Shows the names only: values may be secrets.
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_set().entries(self.0.keys()).finish()
    }
}
