//! `/metrics`, `/healthz` and `/readyz` over HTTP.

use std::{net::SocketAddr, sync::Arc};

use axum::{Router, extract::State, http::StatusCode, response::IntoResponse, routing::get};
use tokio::net::TcpListener;

use super::metrics::Metrics;

struct Shared {
    metrics: Metrics,
    is_ready: Box<dyn Fn() -> bool + Send + Sync>,
}

/// Serves until the future is dropped.
///
/// # Errors
/// The socket's, if the address cannot be listened on.
pub async fn serve(
    address: SocketAddr,
    metrics: Metrics,
    is_ready: impl Fn() -> bool + Send + Sync + 'static,
) -> std::io::Result<()> {
    let shared = Arc::new(Shared { metrics, is_ready: Box::new(is_ready) });
    let router = Router::new()
        .route("/metrics", get(render))
        .route("/healthz", get(|| async { "ok" }))
        .route("/readyz", get(ready))
        .with_state(shared);
    axum::serve(TcpListener::bind(address).await?, router).await
}

async fn render(State(shared): State<Arc<Shared>>) -> impl IntoResponse {
    ([("content-type", "text/plain; version=0.0.4")], shared.metrics.render())
}

async fn ready(State(shared): State<Arc<Shared>>) -> impl IntoResponse {
    if (shared.is_ready)() {
        (StatusCode::OK, "ok")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "the apiserver was not reached yet")
    }
}
