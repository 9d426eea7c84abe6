//! The connection to the apiserver, with every call counted.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use http::{Request, Response};
use kube::{
    Client, Config,
    client::{Body, ClientBuilder},
};
use tower::{BoxError, Layer, Service};

use super::metrics::Metrics;

/// Connects as the pod's ServiceAccount, or as the kubeconfig says.
///
/// # Errors
/// kube's, if there is neither or it cannot be used.
pub async fn connect(metrics: Metrics) -> anyhow::Result<Client> {
    let config = Config::infer().await?;
    Ok(ClientBuilder::try_from(config)?.with_layer(&Count { metrics }).build())
}

/// Counts calls by method, resource and status.
#[derive(Clone)]
pub struct Count {
    /// Where to.
    pub metrics: Metrics,
}

impl<S> Layer<S> for Count {
    type Service = Counted<S>;

    fn layer(&self, inner: S) -> Counted<S> {
        Counted { inner, metrics: self.metrics.clone() }
    }
}

/// A service whose calls are counted.
#[derive(Clone)]
pub struct Counted<S> {
    inner: S,
    metrics: Metrics,
}

impl<S, B> Service<Request<Body>> for Counted<S>
where
    S: Service<Request<Body>, Response = Response<B>, Error = BoxError>,
    S::Future: Send + 'static,
{
    type Response = Response<B>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Response<B>, BoxError>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let method = request.method().as_str().to_owned();
        let resource = resource(request.uri().path());
        let metrics = self.metrics.clone();
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await;
            let code = answer
                .as_ref()
                .map_or_else(|_| "error".to_owned(), |answer| answer.status().as_u16().to_string());
            metrics.api_requests.with_label_values(&[&method, &resource, &code]).inc();
            answer
        })
    }
}

/// Returns the resource a path of the apiserver is about, with its subresource: `finetunejobs/status`.
fn resource(path: &str) -> String {
    let mut words = path.trim_matches('/').split('/').peekable();
    // `api/v1/…` and `apis/GROUP/VERSION/…`.
    let skip = if words.peek() == Some(&"api") { 2 } else { 3 };
    let words: Vec<&str> = words.skip(skip).collect();
    match words.as_slice() {
        ["namespaces", _, resource, _, sub] => format!("{resource}/{sub}"),
        ["namespaces", _, resource, ..] | [resource, ..] => (*resource).to_owned(),
        [] => "none".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::resource;

    #[test]
    fn names_what_a_path_is_about() {
        for (path, expected) in [
            ("/api/v1/namespaces/team/pods", "pods"),
            ("/api/v1/pods", "pods"),
            ("/apis/batch/v1/namespaces/team/jobs/a-0", "jobs"),
            ("/apis/finetune.dev/v1alpha1/finetunejobs", "finetunejobs"),
            (
                "/apis/finetune.dev/v1alpha1/namespaces/team/finetunejobs/a/status",
                "finetunejobs/status",
            ),
            ("/version", "none"),
        ] {
            assert_eq!(resource(path), expected, "{path}");
        }
    }
}
