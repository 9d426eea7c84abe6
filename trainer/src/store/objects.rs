//! Opens an object store for a URI with the options of one role.
//!
//! Requests are retried at most `FINETUNE_STORE_RETRIES` times (default 5) within 60 seconds. The timeouts
//! are 10 seconds for connecting, 30 seconds between bytes, and 120 seconds for one request.

use std::{collections::BTreeMap, str::FromStr, sync::Arc, time::Duration};

use finetune_contract::{ObjectUri, Scheme, process::environment::STORE_RETRIES};
use object_store::{
    BackoffConfig, ClientConfigKey, ObjectStore, RetryConfig,
    aws::{AmazonS3Builder, AmazonS3ConfigKey},
    azure::{AzureConfigKey, MicrosoftAzureBuilder},
    gcp::{GoogleCloudStorageBuilder, GoogleConfigKey},
    local::LocalFileSystem,
};

use crate::store::{Environment, Error, Role};

/// Returns the maximum number of retries of a request.
pub(super) fn retries(environment: &Environment) -> usize {
    environment.plain(STORE_RETRIES).and_then(|text| text.parse().ok()).unwrap_or(5)
}

/// Opens the object store of `uri`; `hf` is not an object store.
pub(super) fn open(
    uri: &ObjectUri,
    role: Role,
    environment: &Environment,
) -> Result<Arc<dyn ObjectStore>, Error> {
    let failed = |error| Error::object("open", uri.to_string(), error);
    let retry = RetryConfig {
        backoff: BackoffConfig {
            init_backoff: Duration::from_millis(200),
            max_backoff: Duration::from_secs(10),
            base: 2.0,
        },
        max_retries: retries(environment),
        retry_timeout: Duration::from_mins(1),
    };
    Ok(match uri.scheme {
        Scheme::S3 => {
            let options = options(environment, role, "AWS_", &["AWS_BUCKET", "AWS_BUCKET_NAME"]);
            let endpoint = options.get("AWS_ENDPOINT_URL").or_else(|| options.get("AWS_ENDPOINT"));
            let mut builder = AmazonS3Builder::new()
                .with_config(
                    AmazonS3ConfigKey::Client(ClientConfigKey::AllowHttp),
                    is_loopback(endpoint),
                )
                .with_retry(retry);
            for (key, value) in client_options(AmazonS3ConfigKey::Client) {
                builder = builder.with_config(key, value);
            }
            for (key, value) in known::<AmazonS3ConfigKey>(&options) {
                builder = builder.with_config(key, value);
            }
            Arc::new(builder.with_bucket_name(&uri.authority).build().map_err(failed)?)
        }
        Scheme::Gs => {
            let options =
                options(environment, role, "GOOGLE_", &["GOOGLE_BUCKET", "GOOGLE_BUCKET_NAME"]);
            let mut builder = GoogleCloudStorageBuilder::new()
                .with_config(
                    GoogleConfigKey::Client(ClientConfigKey::AllowHttp),
                    is_loopback(options.get("GOOGLE_BASE_URL")),
                )
                .with_retry(retry);
            for (key, value) in client_options(GoogleConfigKey::Client) {
                builder = builder.with_config(key, value);
            }
            for (key, value) in known::<GoogleConfigKey>(&options) {
                builder = builder.with_config(key, value);
            }
            Arc::new(builder.with_bucket_name(&uri.authority).build().map_err(failed)?)
        }
        Scheme::Az => {
            let options = options(environment, role, "AZURE_", &["AZURE_CONTAINER_NAME"]);
            let endpoint =
                options.get("AZURE_STORAGE_ENDPOINT").or_else(|| options.get("AZURE_ENDPOINT"));
            let mut builder = MicrosoftAzureBuilder::new()
                .with_config(
                    AzureConfigKey::Client(ClientConfigKey::AllowHttp),
                    is_loopback(endpoint),
                )
                .with_retry(retry);
            for (key, value) in client_options(AzureConfigKey::Client) {
                builder = builder.with_config(key, value);
            }
            for (key, value) in known::<AzureConfigKey>(&options) {
                builder = builder.with_config(key, value);
            }
            Arc::new(builder.with_container_name(&uri.authority).build().map_err(failed)?)
        }
        // fsync: a manifest must not reach the disk before the files that it lists.
        Scheme::File | Scheme::Pvc => Arc::new(LocalFileSystem::new().with_fsync(true)),
        Scheme::Hf => {
            return Err(Error::Misconfigured {
                action: "open",
                uri: uri.to_string(),
                detail: "a hub repository is not an object store".to_owned(),
            });
        }
    })
}

/// Collects the options of a role; the bucket always comes from the URI.
fn options(
    environment: &Environment,
    role: Role,
    start: &str,
    except: &[&str],
) -> BTreeMap<String, String> {
    let is_credential = |key: &str| {
        ["KEY", "TOKEN", "SECRET", "ACCOUNT", "CREDENTIALS", "ROLE_ARN", "CLIENT_ID", "TENANT_ID"]
            .iter()
            .any(|word| key.contains(word))
            && !key.contains("KMS")
    };
    let mut found = environment.starting_with(role, start, is_credential);
    found.retain(|key, _| !except.contains(&key.as_str()));
    found
}

/// Returns the options that object_store knows; others (`AWS_PROFILE`, …) are for other programs.
fn known<K: FromStr>(options: &BTreeMap<String, String>) -> impl Iterator<Item = (K, &String)> {
    options
        .iter()
        .filter_map(|(key, value)| Some((key.to_ascii_lowercase().parse::<K>().ok()?, value)))
}

/// Returns the timeouts; variables with the names of these options override them.
fn client_options<K>(wrap: fn(ClientConfigKey) -> K) -> [(K, &'static str); 3] {
    [
        (wrap(ClientConfigKey::ConnectTimeout), "10 seconds"),
        (wrap(ClientConfigKey::ReadTimeout), "30 seconds"),
        (wrap(ClientConfigKey::Timeout), "120 seconds"),
    ]
}

/// Returns whether an endpoint is plain HTTP on this machine, which needs no `AWS_ALLOW_HTTP`.
fn is_loopback(endpoint: Option<&String>) -> &'static str {
    let host = endpoint
        .and_then(|endpoint| endpoint.strip_prefix("http://"))
        .and_then(|rest| rest.split('/').next())
        .map(|host| host.rsplit_once(':').map_or(host, |(host, _)| host));
    match host {
        Some("localhost" | "127.0.0.1" | "[::1]") => "true",
        _ => "false",
    }
}
