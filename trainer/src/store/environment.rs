//! Credentials and endpoints, read from the process's environment once.
//!
//! Three stores of one run may need three credentials of the same name. In a cluster each
//! `secretRef` is mounted with a prefix (`FINETUNE_MODEL_`, `FINETUNE_DATASET_`,
//! `FINETUNE_OUTPUT_`); without one, plain names (`AWS_ACCESS_KEY_ID`, `HF_TOKEN`) apply to all.

use std::collections::BTreeMap;

/// What a store is opened for; decides whose credentials apply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The base model.
    Model,
    /// The rows.
    Dataset,
    /// The result and the checkpoints.
    Output,
}

impl Role {
    const fn prefix(self) -> &'static str {
        match self {
            Self::Model => "FINETUNE_MODEL_",
            Self::Dataset => "FINETUNE_DATASET_",
            Self::Output => "FINETUNE_OUTPUT_",
        }
    }
}

/// The environment variables of the process, or of a test.
#[derive(Clone, Default)]
pub struct Environment(BTreeMap<String, String>);

impl std::fmt::Debug for Environment {
    /// Shows names only: values are secrets.
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_set().entries(self.0.keys()).finish()
    }
}

impl<const N: usize> From<[(&str, &str); N]> for Environment {
    fn from(variables: [(&str, &str); N]) -> Self {
        Self(variables.map(|(name, value)| (name.to_owned(), value.to_owned())).into())
    }
}

impl Environment {
    /// Reads the process's variables; those that are not text are left out.
    pub fn from_process() -> Self {
        let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        };
        Self(std::env::vars_os().filter_map(text).collect())
    }

    /// Returns a variable for a role: the prefixed one if it is set, else the plain one.
    pub fn get(&self, role: Role, name: &str) -> Option<&str> {
        let prefixed = self.0.get(&format!("{}{name}", role.prefix()));
        prefixed.or_else(|| self.0.get(name)).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// Lists the variables of one cloud (such as `AWS_`) for a role, by their plain names.
    ///
    /// As soon as the role has any of its own, plain credentials are left out: half of one key and
    /// half of another would only give a confusing error.
    pub fn with_prefix(&self, role: Role, cloud: &str) -> BTreeMap<String, String> {
        let own_prefix = format!("{}{cloud}", role.prefix());
        let own: BTreeMap<String, String> = self
            .0
            .iter()
            .filter(|(name, value)| name.starts_with(&own_prefix) && !value.is_empty())
            .map(|(name, value)| (name[role.prefix().len()..].to_owned(), value.clone()))
            .collect();
        let is_credential = |name: &str| {
            ["ACCESS_KEY", "SECRET", "TOKEN", "CREDENTIAL", "SERVICE_ACCOUNT", "ACCOUNT_KEY"]
                .iter()
                .any(|word| name.contains(word))
        };
        let plain = self.0.iter().filter(|(name, value)| {
            name.starts_with(cloud) && !value.is_empty() && (own.is_empty() || !is_credential(name))
        });
        let mut variables: BTreeMap<String, String> =
            plain.map(|(name, value)| (name.clone(), value.clone())).collect();
        variables.extend(own);
        variables
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_roles_own_credentials_shut_out_plain_ones_but_not_settings() {
        let environment = Environment::from([
            ("AWS_ACCESS_KEY_ID", "plain"),
            ("AWS_SESSION_TOKEN", "plain"),
            ("AWS_REGION", "eu-west-1"),
            ("FINETUNE_OUTPUT_AWS_ACCESS_KEY_ID", "own"),
        ]);
        let shown = |role| format!("{:?}", environment.with_prefix(role, "AWS_"));
        insta::assert_snapshot!(shown(Role::Output), @r#"{"AWS_ACCESS_KEY_ID": "own", "AWS_REGION": "eu-west-1"}"#);
        insta::assert_snapshot!(shown(Role::Model), @r#"{"AWS_ACCESS_KEY_ID": "plain", "AWS_REGION": "eu-west-1", "AWS_SESSION_TOKEN": "plain"}"#);
    }

    #[test]
    fn debug_output_shows_no_values() {
        let environment = Environment::from([("HF_TOKEN", "hf_secret")]);
        assert_eq!(format!("{environment:?}"), r#"{"HF_TOKEN"}"#);
    }
}
