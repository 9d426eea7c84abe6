//! Buckets and directories, set up for `object_store` from a URI and the environment.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use finetune_contract::{ObjectUri, Scheme};
use futures::TryStreamExt;
use object_store::{
    BackoffConfig, ClientOptions, ObjectStore, ObjectStoreExt, RetryConfig, aws::AmazonS3Builder,
    azure::MicrosoftAzureBuilder, gcp::GoogleCloudStorageBuilder, local::LocalFileSystem,
    path::Path,
};

use super::{Entry, Environment, Error, Role, error::short, local_root};

/// How often a failed request is repeated unless `FINETUNE_STORE_RETRIES` says otherwise: with the
/// pauses below, about half a minute.
const RETRIES: usize = 8;
/// The longest a request is repeated; below the time a signature stays valid.
const RETRY_TIMEOUT: Duration = Duration::from_secs(120);

/// An object store and the place in it that a URI names.
#[derive(Debug, Clone)]
pub(super) struct Objects {
    pub store: Arc<dyn ObjectStore>,
    root: Path,
    /// Which credential is used and what to set, for messages.
    pub hint: String,
}

impl Objects {
    pub(super) fn open(
        uri: &ObjectUri,
        role: Role,
        environment: &Environment,
    ) -> Result<Self, Error> {
        let misconfigured = |detail: String| Error::Misconfigured { uri: uri.to_string(), detail };
        let library = |error: object_store::Error| misconfigured(short(&error.to_string()));
        let client = client(role, environment);
        let retry = retry(role, environment);
        let (store, hint): (Arc<dyn ObjectStore>, String) = match uri.scheme {
            Scheme::S3 => {
                let variables = environment.with_prefix(role, "AWS_");
                let mut builder =
                    AmazonS3Builder::new().with_client_options(client).with_retry(retry);
                for (key, value) in known(&variables) {
                    builder = builder.with_config(key, value);
                }
                // A plain-text endpoint must be allowed by name, unless it never leaves this machine.
                if variables
                    .get("AWS_ENDPOINT_URL")
                    .or(variables.get("AWS_ENDPOINT"))
                    .is_some_and(|url| is_loopback(url))
                {
                    builder = builder.with_allow_http(true);
                }
                let store = builder.with_bucket_name(&uri.authority).build().map_err(library)?;
                (Arc::new(store), aws_hint(&variables))
            }
            Scheme::Gs => {
                let variables = environment.with_prefix(role, "GOOGLE_");
                let mut builder =
                    GoogleCloudStorageBuilder::new().with_client_options(client).with_retry(retry);
                for (key, value) in known(&variables) {
                    builder = builder.with_config(key, value);
                }
                let store = builder.with_bucket_name(&uri.authority).build().map_err(library)?;
                (Arc::new(store), "set GOOGLE_SERVICE_ACCOUNT or use workload identity".to_owned())
            }
            Scheme::Az => {
                let variables = environment.with_prefix(role, "AZURE_");
                let mut builder =
                    MicrosoftAzureBuilder::new().with_client_options(client).with_retry(retry);
                for (key, value) in known(&variables) {
                    builder = builder.with_config(key, value);
                }
                let store = builder.with_container_name(&uri.authority).build().map_err(library)?;
                (Arc::new(store), "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY or use workload identity".to_owned())
            }
            Scheme::File | Scheme::Pvc => (
                Arc::new(LocalFileSystem::new().with_automatic_cleanup(true)),
                "give the user this runs as access to the path".to_owned(),
            ),
            Scheme::Hf => return Err(misconfigured("a hub is no bucket".to_owned())),
        };
        let root = match local_root(uri) {
            Some(path) => {
                Path::from_absolute_path(path).map_err(|error| misconfigured(error.to_string()))?
            }
            None => Path::parse(&uri.path).map_err(|error| misconfigured(error.to_string()))?,
        };
        Ok(Self { store, root, hint })
    }

    #[cfg(test)]
    pub(super) fn over(store: Arc<dyn ObjectStore>) -> Self {
        Self { store, root: Path::from("prefix"), hint: "no credentials are needed".to_owned() }
    }

    /// Returns the key of a path below the URI.
    pub(super) fn at(&self, path: &str) -> Path {
        let below = path.split('/').filter(|segment| !segment.is_empty());
        below.fold(self.root.clone(), |location, segment| location.join(segment))
    }

    pub(super) async fn list(&self) -> Result<Vec<Entry>, Error> {
        let error = |error: object_store::Error| {
            Error::from_object_store(&error, self.root.to_string(), &self.hint)
        };
        if !self.root.as_ref().is_empty()
            && let Ok(meta) = self.store.head(&self.root).await
        {
            return Ok(vec![Entry { path: String::new(), size: meta.size }]);
        }
        let metas: Vec<_> = match self.store.list(Some(&self.root)).try_collect().await {
            Ok(metas) => metas,
            Err(object_store::Error::NotFound { .. }) => Vec::new(),
            Err(other) => return Err(error(other)),
        };
        let entries = metas.into_iter().filter_map(|meta: object_store::ObjectMeta| {
            let below: Vec<_> = meta.location.prefix_match(&self.root)?.collect();
            let path = below.iter().map(AsRef::as_ref).collect::<Vec<&str>>().join("/");
            // Some tools leave an empty object as the marker of a directory.
            (!path.is_empty()).then_some(Entry { path, size: meta.size })
        });
        Ok(entries.collect())
    }
}

/// Picks the variables a builder knows, by its own spelling.
fn known<K: std::str::FromStr>(variables: &BTreeMap<String, String>) -> Vec<(K, String)> {
    let pick = |(name, value): (&String, &String)| {
        Some((name.to_ascii_lowercase().parse().ok()?, value.clone()))
    };
    variables.iter().filter_map(pick).collect()
}

fn client(role: Role, environment: &Environment) -> ClientOptions {
    let allow_http = environment
        .get(role, "AWS_ALLOW_HTTP")
        .is_some_and(|value| value == "true" || value == "1");
    ClientOptions::new()
        .with_connect_timeout(Duration::from_secs(10))
        .with_timeout(Duration::from_secs(120))
        .with_allow_http(allow_http)
}

fn retry(role: Role, environment: &Environment) -> RetryConfig {
    let retries =
        environment.get(role, "FINETUNE_STORE_RETRIES").and_then(|value| value.parse().ok());
    RetryConfig {
        backoff: BackoffConfig::default(),
        max_retries: retries.unwrap_or(RETRIES),
        retry_timeout: RETRY_TIMEOUT,
    }
}

fn is_loopback(url: &str) -> bool {
    let host = url.split("://").nth(1).unwrap_or(url).split(['/', '?']).next().unwrap_or_default();
    let host = host.rsplit_once(':').map_or(host, |(host, _)| host);
    host == "localhost"
        || host
            .trim_matches(['[', ']'])
            .parse::<std::net::IpAddr>()
            .is_ok_and(|ip| ip.is_loopback())
}

fn aws_hint(variables: &BTreeMap<String, String>) -> String {
    match variables.get("AWS_ACCESS_KEY_ID") {
        Some(key) => format!(
            "the access key {key:?} was used: check it, its secret, the region and the bucket's policy"
        ),
        None => "no AWS_ACCESS_KEY_ID is set: set it with AWS_SECRET_ACCESS_KEY, or use a role"
            .to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::is_loopback;

    #[test]
    fn only_this_machine_is_loopback() {
        assert!(
            is_loopback("http://127.0.0.1:8333")
                && is_loopback("http://localhost/")
                && is_loopback("http://[::1]:9000")
        );
        assert!(
            !is_loopback("http://10.0.0.1:8333") && !is_loopback("http://localhost.example.com")
        );
    }
}
