//! Object URIs: `scheme://authority/path`, parsed once.

use std::{fmt, path::Path, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A storage scheme this product reads or writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scheme {
    /// A repository of a Hugging Face hub; read only.
    Hf,
    /// Amazon S3 or any server that speaks its API.
    S3,
    /// Google Cloud Storage.
    Gs,
    /// Azure Blob Storage.
    Az,
    /// A PersistentVolumeClaim of the job's namespace: `pvc://CLAIM/PATH`.
    Pvc,
    /// The local file system; only without a cluster.
    File,
}

impl Scheme {
    /// All schemes, in documentation order.
    pub const ALL: [Self; 6] = [Self::Hf, Self::S3, Self::Gs, Self::Az, Self::Pvc, Self::File];

    /// Returns the scheme as written in a URI.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Hf => "hf",
            Self::S3 => "s3",
            Self::Gs => "gs",
            Self::Az => "az",
            Self::Pvc => "pvc",
            Self::File => "file",
        }
    }
}

/// A parsed object URI.
///
/// # Guarantees
/// `path` has no leading, trailing or doubled slash, no `.` or `..` segment and no control
/// character; `authority` is empty only for `file`, whose paths are absolute.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectUri {
    /// The scheme.
    pub scheme: Scheme,
    /// The bucket, container or claim; for `hf` the owner and name (`owner/name`, after `datasets/` or
    /// `models/` if the text has it); empty for `file`.
    pub authority: String,
    /// The key or path below it, without a leading slash.
    pub path: String,
    /// Whether the text ended in `/`: the URI names a prefix.
    pub is_prefix: bool,
}

/// Why a text is no object URI.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseUriError {
    /// No `scheme://`.
    #[error(
        "{uri:?} has no scheme: write one of hf://, s3://, gs://, az://, pvc:// or file:// before it"
    )]
    NoScheme {
        /// The text.
        uri: String,
    },
    /// A scheme nobody here knows.
    #[error("{uri:?} has the unknown scheme {scheme:?}: use hf, s3, gs, az, pvc or file")]
    UnknownScheme {
        /// The text.
        uri: String,
        /// Its scheme.
        scheme: String,
    },
    /// The bucket, repository or claim is missing.
    #[error("{uri:?} does not name {missing}")]
    NoAuthority {
        /// The text.
        uri: String,
        /// What is missing, with its form.
        missing: &'static str,
    },
    /// A part that has no place in an object URI.
    #[error("{uri:?} contains {found}, which an object URI cannot have")]
    Forbidden {
        /// The text.
        uri: String,
        /// What was found.
        found: String,
    },
}

impl ObjectUri {
    /// Parses an object URI.
    ///
    /// # Errors
    /// [`ParseUriError`], which names the text and what to write instead.
    pub fn parse(text: &str) -> Result<Self, ParseUriError> {
        let uri = text.to_owned();
        let forbidden =
            |found: &str| ParseUriError::Forbidden { uri: uri.clone(), found: found.to_owned() };
        let Some((scheme, rest)) = text.split_once("://") else {
            return Err(ParseUriError::NoScheme { uri });
        };
        let Some(scheme) = Scheme::ALL.into_iter().find(|known| known.as_str() == scheme) else {
            return Err(ParseUriError::UnknownScheme { scheme: scheme.to_owned(), uri });
        };
        if rest.chars().any(char::is_control) {
            return Err(forbidden("a control character"));
        }
        if rest != rest.trim() {
            return Err(forbidden("leading or trailing white space"));
        }
        for (mark, what) in
            [('?', "a query (`?`)"), ('#', "a fragment (`#`)"), ('\\', "a backslash")]
        {
            if rest.contains(mark) {
                return Err(forbidden(what));
            }
        }
        let (authority, path) = match scheme {
            Scheme::File => match rest.strip_prefix('/') {
                Some(path) => (String::new(), path),
                None => {
                    return Err(ParseUriError::NoAuthority {
                        uri,
                        missing: "an absolute path (file:///path)",
                    });
                }
            },
            Scheme::Hf => {
                let (kind, below) = hub_kind(rest);
                let mut parts = below.splitn(3, '/');
                let (owner, name) =
                    (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
                if owner.is_empty() || name.is_empty() {
                    return Err(ParseUriError::NoAuthority {
                        uri,
                        missing: "a repository (hf://owner/name)",
                    });
                }
                (format!("{kind}{owner}/{name}"), parts.next().unwrap_or_default())
            }
            Scheme::S3 | Scheme::Gs | Scheme::Az | Scheme::Pvc => {
                let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
                if authority.is_empty() {
                    let missing = match scheme {
                        Scheme::Pvc => "a claim (pvc://claim/path)",
                        Scheme::Az => "a container (az://container/path)",
                        _ => "a bucket (s3://bucket/path)",
                    };
                    return Err(ParseUriError::NoAuthority { uri, missing });
                }
                (authority.to_owned(), path)
            }
        };
        if let Some((_, host)) = authority.split_once('@') {
            // The message must not repeat a password.
            let uri = format!("{}://…@{host}", scheme.as_str());
            return Err(ParseUriError::Forbidden {
                uri,
                found: "credentials before `@` (put them into a Secret)".to_owned(),
            });
        }
        let is_prefix = rest.ends_with('/');
        let path = path.trim_end_matches('/');
        for segment in path.split('/') {
            match segment {
                "" if !path.is_empty() => return Err(forbidden("an empty path segment (`//`)")),
                "." | ".." => return Err(forbidden("a relative path segment (`.` or `..`)")),
                _ => {}
            }
        }
        Ok(Self { scheme, authority, path: path.to_owned(), is_prefix })
    }

    /// Returns the URI of an absolute path of this machine.
    ///
    /// # Errors
    /// [`ParseUriError`] if the path has characters that no object URI can have.
    pub fn of_path(path: &Path) -> Result<Self, ParseUriError> {
        Self::parse(&format!("file://{}", path.display()))
    }

    /// Returns the URI beside this one whose name has `suffix` appended.
    #[must_use]
    pub fn with_suffix(&self, suffix: &str) -> Self {
        Self { path: format!("{}{suffix}", self.path), is_prefix: false, ..self.clone() }
    }

    /// Returns the URI of `name` below this one.
    #[must_use]
    pub fn join(&self, name: &str) -> Self {
        let path =
            if self.path.is_empty() { name.to_owned() } else { format!("{}/{name}", self.path) };
        Self { path, is_prefix: false, ..self.clone() }
    }

    /// Returns the last segment of the path, or of the authority when there is no path.
    pub fn file_name(&self) -> &str {
        let whole = if self.path.is_empty() { &self.authority } else { &self.path };
        whole.rsplit('/').next().unwrap_or(whole)
    }
}

/// Splits `datasets/` or `models/` off a hub's repository, as its own libraries write it. An owner may
/// have such a name, so it counts only before an owner and a name.
fn hub_kind(repository: &str) -> (&str, &str) {
    for kind in ["datasets/", "models/"] {
        if let Some(below) = repository.strip_prefix(kind)
            && below.split('/').filter(|part| !part.is_empty()).count() >= 2
        {
            return repository.split_at(kind.len());
        }
    }
    ("", repository)
}

impl ObjectUri {
    /// Returns the kind of a hub's repository, `datasets` or `models`, if the URI names it, and the
    /// repository's owner and name.
    pub fn hub_repository(&self) -> (Option<&str>, &str) {
        match hub_kind(&self.authority) {
            ("", repository) => (None, repository),
            (kind, repository) => (Some(kind.trim_end_matches('/')), repository),
        }
    }
}

impl fmt::Display for ObjectUri {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { scheme, authority, path, is_prefix } = self;
        write!(formatter, "{}://{authority}", scheme.as_str())?;
        if !path.is_empty() || *scheme == Scheme::File {
            write!(formatter, "/{path}")?;
        }
        let is_root = path.is_empty() && *scheme == Scheme::File;
        if *is_prefix && !is_root { formatter.write_str("/") } else { Ok(()) }
    }
}

impl FromStr for ObjectUri {
    type Err = ParseUriError;

    fn from_str(text: &str) -> Result<Self, ParseUriError> {
        Self::parse(text)
    }
}

impl Serialize for ObjectUri {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ObjectUri {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::parse(&String::deserialize(deserializer)?).map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::ObjectUri;

    fn check(text: &str) -> String {
        match ObjectUri::parse(text) {
            Ok(uri) => {
                assert_eq!(uri.to_string(), text);
                format!("{:?} {:?} {:?} {}", uri.scheme, uri.authority, uri.path, uri.is_prefix)
            }
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn parses_every_scheme_and_prints_it_back() {
        insta::assert_snapshot!(check("hf://HuggingFaceTB/SmolLM2-135M"), @r#"Hf "HuggingFaceTB/SmolLM2-135M" "" false"#);
        insta::assert_snapshot!(check("hf://o/n/sub/model.gguf"), @r#"Hf "o/n" "sub/model.gguf" false"#);
        insta::assert_snapshot!(check("hf://datasets/o/n/data/train.jsonl"), @r#"Hf "datasets/o/n" "data/train.jsonl" false"#);
        insta::assert_snapshot!(check("hf://datasets/n"), @r#"Hf "datasets/n" "" false"#);
        insta::assert_snapshot!(check("s3://acme/tickets/"), @r#"S3 "acme" "tickets" true"#);
        insta::assert_snapshot!(check("s3://acme/"), @r#"S3 "acme" "" true"#);
        insta::assert_snapshot!(check("file:///"), @r#"File "" "" true"#);
        insta::assert_snapshot!(check("pvc://models/llama"), @r#"Pvc "models" "llama" false"#);
        insta::assert_snapshot!(check("file:///data/train.jsonl"), @r#"File "" "data/train.jsonl" false"#);
    }

    #[test]
    fn says_what_is_wrong_and_what_to_write() {
        insta::assert_snapshot!(check("models/llama"), @r#""models/llama" has no scheme: write one of hf://, s3://, gs://, az://, pvc:// or file:// before it"#);
        insta::assert_snapshot!(check("ftp://x/y"), @r#""ftp://x/y" has the unknown scheme "ftp": use hf, s3, gs, az, pvc or file"#);
        insta::assert_snapshot!(check("hf://llama"), @r#""hf://llama" does not name a repository (hf://owner/name)"#);
        insta::assert_snapshot!(check("file://data"), @r#""file://data" does not name an absolute path (file:///path)"#);
        insta::assert_snapshot!(check("s3:///key"), @r#""s3:///key" does not name a bucket (s3://bucket/path)"#);
        insta::assert_snapshot!(check("s3://a/../b"), @r#""s3://a/../b" contains a relative path segment (`.` or `..`), which an object URI cannot have"#);
        insta::assert_snapshot!(check("s3://key:secret@a/b"), @r#""s3://…@a" contains credentials before `@` (put them into a Secret), which an object URI cannot have"#);
    }
}
