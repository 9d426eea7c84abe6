//! The process environment, read once, and the prefixes that assign variables to roles.

use std::collections::BTreeMap;

pub use finetune_contract::Role;
use finetune_contract::process::environment::ALLOWED_ENDPOINTS;
use reqwest::Url;

/// The prefixes of the variables that stores read.
const STORE_PREFIXES: [&str; 4] = ["AWS_", "AZURE_", "GOOGLE_", "HF_"];

/// The environment variables of the process, or those of a test.
///
/// Differs: `from_env` of object_store reads the process environment and has no roles.
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

    /// Creates an environment from pairs.
    pub fn from_pairs<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        Self(pairs.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect())
    }

    /// Returns a variable by its exact name; an empty value counts as absent.
    pub fn plain(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// Returns `key` for a role, with the name of the variable that defines it.
    pub fn named(&self, role: Role, key: &str) -> Option<(String, &str)> {
        let prefixed = format!("{}{key}", role.prefix());
        match self.plain(&prefixed) {
            Some(value) => Some((prefixed, value)),
            None => self.plain(key).map(|value| (key.to_owned(), value)),
        }
    }

    /// Returns `key` for a role.
    pub fn get(&self, role: Role, key: &str) -> Option<&str> {
        self.named(role, key).map(|(_, value)| value)
    }

    /// Finds a variable of a store that points to a server which the administrator does not allow.
    /// Returns its name, the server, and the allowed servers. Proxies and token servers count, too.
    pub fn forbidden_server(&self) -> Option<(&str, String, &str)> {
        let allowed = self.plain(ALLOWED_ENDPOINTS)?;
        let is_allowed = |server: &str, host: &str| {
            allowed.split(',').map(str::trim).any(|entry| entry == server || entry == host)
        };
        self.0.iter().find_map(|(name, value)| {
            let key =
                Role::ALL.iter().find_map(|role| name.strip_prefix(role.prefix())).unwrap_or(name);
            let is_store_variable = STORE_PREFIXES.iter().any(|store| key.starts_with(store));
            let url = Url::parse(value).ok().filter(|_| is_store_variable)?;
            let host = url.host_str()?;
            let server = format!("{host}:{}", url.port_or_known_default()?);
            (!is_allowed(&server, host)).then(|| (name.as_str(), server.clone(), allowed))
        })
    }

    /// Returns the variables of a role that start with `start`, without the prefix of the role.
    ///
    /// # Guarantees
    /// If the role has credentials of its own, unprefixed credentials are not mixed with them: an access
    /// key of one account never works with a session token of another.
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
    /// Formats only the names, because values may be secrets.
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_set().entries(self.0.keys()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::Environment;

    fn forbidden(allowed: &str, name: &str, value: &str) -> Option<String> {
        let environment =
            Environment::from_pairs([("FINETUNE_ALLOWED_ENDPOINTS", allowed), (name, value)]);
        environment.forbidden_server().map(|(name, server, _)| format!("{name} {server}"))
    }

    #[test]
    fn only_allowed_servers_may_be_configured() {
        let s3 = "FINETUNE_OUTPUT_AWS_ENDPOINT_URL";
        assert_eq!(forbidden("", s3, "http://10.0.0.1"), None, "no list, no limit");
        assert_eq!(forbidden("s3.acme.com", s3, "https://s3.acme.com/x"), None);
        assert_eq!(forbidden("s3.acme.com:9000", s3, "http://s3.acme.com:9000"), None);
        assert_eq!(forbidden("a, s3.acme.com", s3, "https://s3.acme.com"), None);
        let other = Some(format!("{s3} 169.254.169.254:80"));
        assert_eq!(forbidden("s3.acme.com", s3, "http://169.254.169.254/"), other);
        assert_eq!(
            forbidden("s3.acme.com:443", s3, "http://s3.acme.com"),
            Some(format!("{s3} s3.acme.com:80")),
            "a port is part of what is allowed"
        );
        assert_eq!(
            forbidden("a", "AWS_PROXY_URL", "http://b"),
            Some("AWS_PROXY_URL b:80".to_owned())
        );
        assert_eq!(
            forbidden("a", "HF_ENDPOINT", "https://b"),
            Some("HF_ENDPOINT b:443".to_owned())
        );
        for role in super::Role::ALL {
            let name = &format!("{}AWS_ENDPOINT_URL", role.prefix());
            assert_eq!(forbidden("a", name, "https://b"), Some(format!("{name} b:443")));
        }
        assert_eq!(forbidden("a", "MY_URL", "https://b"), None, "no store reads it");
        assert_eq!(forbidden("a", "AWS_REGION", "us-east-1"), None);
    }
}
